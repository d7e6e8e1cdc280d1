"""Invented English of several kinds, plain and varied, for rows of data sets that only a test reads."""

from __future__ import annotations

from random import Random
from typing import Any

NAMES = """Ada Bela Chidi Dana Edgar Farah Goran Hana Ivo Jamila Kofi Lena Marek Nadia Oskar Priya Quentin Rosa Samir
Tilda Umar Vera Wanda Xenia Yusuf Zora Anton Bruno Celia Dmitri Elif Fiona""".split()
TOWNS = """Alder Brack Corvo Dunlin Esker Fallow Garnet Harrow Islay Juniper Kestrel Larch Merrow Nettle Osier Plover
Quarry Rowan Sorrel Thistle Umber Vellum Willow Yarrow""".split()
ADJECTIVES = """amber ancient blunt bright broad brittle calm cheap clever cold crooked damp dull eager empty faint fresh
gentle golden grey heavy hollow humble hungry idle jagged large late light loud mild narrow noisy odd pale plain proud
quiet rare rough rusty sharp shy silver slow small smooth solid sour steep stiff strange sturdy swift tall thin tidy
warm weak wide wild wise young""".split()
LINKS = """while because although whereas and but so before after until unless once since""".split()
TIMES = [
    time.strip()
    for time in """in the morning;at noon;every Tuesday;last winter;during the storm;after the harvest;in early spring;
before sunrise;on the third day;over the weekend;towards evening;twice a month;in the first hour;that autumn""".split(
        ";"
    )
]
# Things, what they do, and where: each kind of text has its own words.
TOPICS = {
    "shop": """apple basket bead biscuit bottle brush button candle carrot chair coin crayon cushion jar kite ladle lemon
marble melon mug pear pencil pie plate ribbon scarf stamp sticker ticket toy|buy count order pack sell stack trade weigh
wrap label|at the market;in the attic;near the till;behind the bakery;at the fair;on the counter;in the cellar""",
    "society": """advisor architect auditor baker barber clerk council delegate editor engineer farmer guard judge lawyer
mayor merchant nurse officer pilot planner professor reporter sailor senator teacher tenant voter witness|accept answer
defend follow ignore mention oppose praise question reject support trust|at the hearing;in the archive;by the statute;
at the congress;in the ministry;under the new rules;at the polls""",
    "home": """blanket bowl broom bucket cat cupboard curtain dog drawer fence garden hammer kettle ladder lamp pillow
rake rope saucepan shelf shovel sofa spoon stove table towel trunk wagon|carry clean cover drop fill fold hang lift
open paint push repair roll shake|in the kitchen;on the porch;under the stairs;beside the barn;in the hallway;
at the back door;in the laundry""",
    "code": """array batch branch buffer cache client counter cursor graph heap index iterator kernel ledger logger matrix
packet parser pipeline queue record schema server socket stream table tensor thread token tree|append compress decode
filter hash index load merge parse render reset scan sort split|in the worker;at start-up;on the main thread;
inside the loop;in the test suite;behind the proxy;on disk""",
    "science": """acid atom bacterium catalyst cell comet crystal current electron enzyme fossil galaxy gas gene glacier
hormone lens magnet membrane mineral molecule neuron nucleus orbit planet plasma protein root spore tissue|absorb attract
bend bind cool dissolve emit heat protect reflect release repel slow surround|in the laboratory;at low pressure;
under the microscope;in salt water;near the equator;inside the vessel;at constant volume""",
    "archive": """bishop bridge captain castle charter cousin daughter diary document duke engraving ferry garrison harbour
island legend letter lighthouse manuscript minister monument orchard painter palace scholar ship stranger tower treaty
valley|abandon admire betray borrow describe discover forget guard honour inherit observe remember visit|
beyond the river;in the northern province;at the old mill;beside the chapel;across the border;in the great hall;
below the cliffs""",
    "game": """badger beaver bison camel cobra coyote crane dolphin dragon duck falcon finch gorilla leopard liger lizard
monkey mule otter owl panther pigeon rhino seal snake starling stork swan vampire walrus wolf zebra|acquire attack beat
build call create destroy hug invest join neglect refuse reveal shout smile swear|at the table;on the board;
next to the castle;in the last round;at the river square;in the corner""",
}
WORDS = {
    topic: [
        [word.strip() for word in part.split(";" if i == 2 else None)]
        for i, part in enumerate(text.split("|"))
    ]
    for topic, text in TOPICS.items()
}


def noun(rng: Random, topic: str) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(WORDS[topic][0])}"


def place(rng: Random, topic: str) -> str:
    return rng.choice(WORDS[topic][2])


def clause(rng: Random, topic: str) -> str:
    time = f" {rng.choice(TIMES)}" if rng.random() < 0.4 else ""
    verb = rng.choice(["must", "may", "would", "can", "did not", "seldom needs to", "is said to", "will"])
    return f"the {noun(rng, topic)} {verb} {rng.choice(WORDS[topic][1])} the {noun(rng, topic)} {place(rng, topic)}{time}"


def prose(rng: Random, topic: str, low: int, high: int) -> str:
    text, goal = "", rng.randint(low, high)
    while len(text.split()) < goal:
        part = clause(rng, topic)
        if rng.random() < 0.6:
            part = f"{part}, {rng.choice(LINKS)} {clause(rng, topic)}"
        text += f"{part[0].upper()}{part[1:]}. "
    return text.strip()


def mixed(rng: Random, right: Any, wrong: list[Any]) -> tuple[list[Any], int]:
    options = [right, *wrong]
    rng.shuffle(options)
    return options, options.index(right)


def word_problem(rng: Random) -> tuple[str, list[tuple[str, str]], int]:
    """A question, its steps (a smaller question and the line that answers it), and the number it comes to."""
    name, friend = rng.sample(NAMES, 2)
    item, total = rng.choice(WORDS["shop"][0]) + "s", rng.randint(20, 99)
    text = [prose(rng, "shop", 12, 30), f"{name} has {total} {item} {place(rng, 'shop')}."]
    steps = []

    def step(asked: str, left: int, sign: str, right: int) -> int:
        value = {"*": left * right, "+": left + right, "-": left - right}[sign]
        steps.append(
            (f"{asked}?", f"It is {left} {sign} {right} = <<{left}{sign}{right}={value}>>{value} {item}.")
        )
        return value

    for kind in rng.sample(["boxes", "gift", "loss", "times"], rng.randint(2, 3)):
        if kind == "boxes":
            boxes, each = rng.randint(2, 12), rng.randint(3, 15)
            text.append(
                f"{friend} brings {boxes} {rng.choice(ADJECTIVES)} boxes with {each} {item} in each of them."
            )
            total = step(
                f"How many {item} does {name} have then",
                total,
                "+",
                step(f"How many {item} come in boxes", boxes, "*", each),
            )
        elif kind == "times":
            many = rng.randint(2, 4)
            text.append(
                f"{rng.choice(TIMES).capitalize()} the number of {item} grows to {many} times what it was."
            )
            total = step(f"How many {item} are there after the growth", total, "*", many)
        else:
            part, verb = (
                rng.randint(2, total // 2),
                rng.choice(["gives", "sells", "lends"]) if kind == "gift" else "loses",
            )
            text.append(f"Then {name} {verb} {part} {item} {place(rng, 'shop')}.")
            total = step(f"How many {item} are left with {name}", total, "-", part)
    return " ".join([*text, f"How many {item} does {name} have in the end?"]), steps, total


def argument(rng: Random) -> tuple[str, str, list[str], int]:
    name, habits = (
        rng.choice(NAMES),
        [f"{v}s the {noun(rng, 'society')}" for v in rng.sample(WORDS["society"][1], 3)],
    )
    first, second, third = habits
    rules = f"Everyone who {first} also {second}. Nobody who {second} ever {third}. It is certain that {name} {first}."
    wrong = [
        f"{name} {third} {place(rng, 'society')}.",
        f"Nobody who {first} {second}.",
        f"Everyone who {second} also {third}.",
    ]
    options, right = mixed(rng, f"{name} {second}.", wrong)
    asked = rng.choice(
        ["Which of the following must be true?", f"What follows about {name} from the statements above?"]
    )
    return f"{prose(rng, 'society', 20, 50)} {rules}", asked, options, right


KEPT = [
    ("are greater than {low}", "x > {low}"),
    ("lie below {low}", "x < {low}"),
    ("are odd", "x % 2 == 1"),
    ("can be divided by {by}", "x % {by} == 0"),
    ("differ from {low}", "x != {low}"),
    ("lie within {low} of 50", "abs(x - 50) <= {low}"),
]
CHANGED = [
    ("multiplied by {by}", "x * {by}"),
    ("squared", "x * x"),
    ("lowered by {low}", "x - {low}"),
    ("reduced modulo {by}", "x % {by}"),
    ("halved and rounded down", "x // 2"),
    ("raised by {sum}", "x + {sum}"),
]
WANTED = [
    ("their sum", "sum(picked)"),
    ("the largest of them, or 0", "max(picked, default=0)"),
    ("how many different values there are", "len(set(picked))"),
    ("them from the largest down", "sorted(picked, reverse=True)"),
    ("the first and the last of them", "picked[:1] + picked[-1:]"),
    ("them in reverse order", "picked[::-1]"),
]


def function(rng: Random) -> tuple[str, str, str, list[str]]:
    """A task in words, the name of a function, its Python code, and assertions that the code passes."""
    low, by = rng.randint(2, 40), rng.randint(2, 9)
    chosen, keep, changed, value = (
        part.format(low=low, by=by, sum=low + by) for part in (*rng.choice(KEPT), *rng.choice(CHANGED))
    )
    wanted, end = rng.choice(WANTED)
    name = f"{rng.choice(WORDS['code'][1])}_{rng.choice(ADJECTIVES)}_{rng.choice(WORDS['code'][0])}s"
    task = (
        f"Write a function {name} that takes the numbers that {chosen}, each {changed}, and returns {wanted}."
    )
    task = f"{task} {prose(rng, 'code', 15, 35)}"
    code = f"def {name}(numbers):\n    picked = [{value} for x in numbers if {keep}]\n    return {end}\n"
    scope: dict[str, Any] = {}
    exec(code, scope)
    inputs = [[rng.randrange(100) for _ in range(rng.randint(3, 7))] for _ in range(3)]
    return task, name, code, [f"assert {name}({numbers}) == {scope[name](numbers)!r}" for numbers in inputs]


MEASURED = [
    ("A {thing} moves at {first} m/s for {second} s. How far does it come?", "m"),
    ("A force of {first} N moves a {thing} by {second} m. How much work is done?", "J"),
    ("A current of {first} A flows through a {thing} of {second} ohm. What is the voltage?", "V"),
    ("A {thing} of {first} kg is accelerated by {second} m/s^2. Which force acts on it?", "N"),
]


def measured(rng: Random) -> tuple[str, int, str]:
    first, second, thing = rng.randint(2, 60), rng.randint(2, 60), noun(rng, "science")
    asked, unit = rng.choice(MEASURED)
    asked = asked.format(first=first, second=second, thing=thing)
    return f"{prose(rng, 'science', 15, 35)} {asked}", first * second, unit


def reading(rng: Random) -> tuple[str, str, list[str], int]:
    name, where, things = rng.choice(NAMES), place(rng, "archive"), [noun(rng, "archive") for _ in range(4)]
    options, right = mixed(rng, things[0], things[1:])
    text = f"{prose(rng, 'archive', 60, 120)} It was {name} who left the {things[0]} {where}. {prose(rng, 'archive', 60, 120)}"
    question = f"What did {name} leave {where} in the story in which {clause(rng, 'archive')}?"
    return text, question, options, right
