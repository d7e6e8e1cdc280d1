"""Plans: what the scorer reads, and that it judges as a slow, obvious simulator does."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import deque
from pathlib import Path

import pytest

from srde.eval.blocksworld import parse_plan, parse_world, score_plan

RULES = (
    "I am playing with a set of blocks where I need to arrange the blocks into stacks.\n"
    "I can only pick up a block if the block is on the table and the block is clear. A block is clear if the block has no "
    "other blocks on top of it and if the block is not picked up.\n\n"
)
PROMPT = (
    RULES
    + "As initial conditions I have that, the red block is clear, the orange block is clear, the hand is empty, the red "
    "block is on top of the blue block, the blue block is on the table and the orange block is on the table.\n"
    "My goal is to have that the orange block is on top of the red block.\n\nGive the plan, one action per line."
)
PLAN = "pick up the orange block\nstack the orange block on top of the red block"
LONGER = (
    "unstack the red block from on top of the blue block\nput down the red block\n"
    "pick up the orange block\nstack the orange block on top of the red block"
)


@pytest.mark.parametrize(
    "text",
    [
        PLAN,
        LONGER,
        "1. Pick up the orange block.\n2. Stack the orange block on top of the red block.",
        "- Pick up orange\n- Stack orange on red",
        "* **pick up the orange block**\n* **stack the orange block onto the red block**",
        "Step 1: I pick up the orange block from the table\nStep 2: then I stack the orange block on the red block",
        "First, pick up the orange block, then stack the orange block on top of the red block.",
        "Pick up the orange block. Stack the orange block on top of the red block.",
        f"Here is the plan:\n\n{PLAN}\n\nThe goal is reached.",
        f"Stack them all!\n[PLAN]\n{PLAN}\n[PLAN END]\nput down the red block",
        f"{PLAN}\n[PLAN END]\n[STATEMENT]\nput down the red block",
        "```\n(pick-up orange)\n(stack orange red)\n```",
        "(PICK-UP ORANGE) (STACK ORANGE RED)",
        "0: (pick-up orange)\n1: ( stack orange  red )",
        PLAN.replace("\n", "\r\n"),
    ],
    ids=[
        "answer", "longer", "numbers", "bullets", "bold", "steps", "sentence", "sentences", "prose", "section", "end", "pddl",
        "pddl-line", "pddl-numbers", "windows",
    ],
)  # fmt: skip
def test_a_plan_that_works_passes(text):
    assert score_plan(text, PROMPT, PLAN)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot do that.",
        "pick up the orange block",
        "stack the orange block on top of the red block",
        "pick up the orange block\nstack the orange block on top of the blue block",
        "pick up the red block\nput down the red block\n" + PLAN,
        "unstack the orange block from on top of the red block\n" + PLAN,
        "unstack the blue block from on top of the red block\nput down the blue block\n" + PLAN,
        PLAN + "\nunstack the orange block from on top of the red block",
        PLAN + "\npick up the green block",
        PLAN + "\nput down the orange block",
        "pick up the orange block\nstack the orange block on top of the orange block",
        "pick up the orange block\npick up the red block\nstack the orange block on top of the red block",
        "pick up the orange block and go home\n" + PLAN,
        "pick up the orange block\nstack the orange block and the blue block on top of the red block",
        "(pick-up orange red)\n(stack orange red)",
        "(stack orange red)\n(pick-up orange)",
    ],
    ids=[
        "empty", "prose", "held", "not-held", "not-clear", "not-on-table", "not-on", "upside-down", "undone", "unknown",
        "down-again", "on-itself", "two-hands", "unreadable", "two-blocks", "operands", "order",
    ],
)  # fmt: skip
def test_a_plan_that_does_not_work_fails(text):
    assert not score_plan(text, PROMPT, PLAN)


def test_a_goal_that_holds_already_needs_a_plan_only_if_the_answer_has_one():
    done = PROMPT.replace(
        "the orange block is on top of the red block.", "the red block is on top of the blue block."
    )
    there_and_back = "pick up the orange block\nput down the orange block"
    assert score_plan(there_and_back, done, there_and_back) and score_plan("", done, "")
    assert not score_plan("", done, there_and_back)


def test_the_last_task_of_a_prompt_counts():
    example = PROMPT.replace("orange", "white").replace("Give the plan", f"[PLAN]\n{PLAN}\n[PLAN END]")
    assert score_plan(PLAN, f"{example}\n{PROMPT}", PLAN)
    assert not score_plan(PLAN, f"{PROMPT}\n{example}", PLAN)


@pytest.mark.parametrize(
    "prompt",
    [
        "Stack the blocks.",
        PROMPT.replace("the red block is on top of the blue block", "the red block is near the blue block"),
        PROMPT.replace("the orange block is clear, ", ""),
        PROMPT.replace("the hand is empty", "the hand is holding the red block"),
        PROMPT.replace("the blue block is on the table", "the blue block is on top of the red block"),
        PROMPT.replace("orange block is on the table", "orange block is on top of the blue block"),
        PROMPT.replace("is to have that the orange", "is to have that the green"),
        PROMPT.replace(" and the orange block is on the table", ""),
    ],
    ids=[
        "none",
        "unknown-fact",
        "not-clear",
        "two-places",
        "circle",
        "two-on-one",
        "unknown-block",
        "nowhere",
    ],
)
def test_without_a_task_that_can_be_read_the_answer_must_be_the_same(prompt):
    assert parse_world(prompt) is None
    assert score_plan(f"\n{PLAN.upper()}\n", prompt, PLAN)
    assert score_plan("1. Pick up orange\n2. Stack orange on red", prompt, PLAN)
    assert not score_plan(LONGER, prompt, PLAN)
    assert not score_plan("no plan", prompt, "nor a plan") and score_plan(
        "north,  east", prompt, "North, east"
    )


def test_what_is_read():
    world = parse_world(PROMPT)
    assert world.places == {"red": "blue", "blue": "(table)", "orange": "(table)"}
    assert world.goal == {("on", "orange", "red")}
    held = PROMPT.replace("the hand is empty", "the hand is currently holding the white block")
    assert parse_world(held).places["white"] == "(hand)"
    assert not score_plan(PLAN, held, PLAN) and score_plan(f"put down the white block\n{PLAN}", held, PLAN)
    lettered = PROMPT.replace("the red block", "block a").replace("the orange block", "block C")
    assert score_plan("pick up block c\nstack block c on top of block a", lettered, "")
    assert parse_plan("Unstack the b-1 block from block 2") == [("unstack", "b-1", "2")]


# A slow reference: a state is a list of towers from the bottom up, and what the hand holds.


def apply(towers: list[list[str]], hand: str | None, action: tuple[str, ...]):
    """The state after an action, or None where it is not legal."""
    towers = [list(tower) for tower in towers]
    name, block, *other = action
    tops = [tower[-1] for tower in towers]
    if name in ("pick-up", "unstack"):
        if hand is not None or block not in tops:
            return None
        tower = towers[tops.index(block)]
        below = tower[-2] if len(tower) > 1 else None
        if below != (other[0] if other else None):
            return None
        tower.pop()
        return sorted(tower for tower in towers if tower), block
    if hand != block:
        return None
    if name == "put-down":
        return sorted([*towers, [block]]), None
    if other[0] not in tops:
        return None
    towers[tops.index(other[0])].append(block)
    return sorted(towers), None


def all_actions(blocks: list[str]) -> list[tuple[str, ...]]:
    alone = [(name, block) for name in ("pick-up", "put-down") for block in blocks]
    return alone + [(name, a, b) for name in ("stack", "unstack") for a in blocks for b in blocks if a != b]


def pairs(towers: list[list[str]]) -> set[tuple[str, str]]:
    return {(above, below) for tower in towers for below, above in itertools.pairwise(tower)}


def judge(towers, goal: set[tuple[str, str]], plan: list[tuple[str, ...]]) -> bool:
    state = (towers, None)
    for action in plan:
        state = apply(*state, action)
        if state is None:
            return False
    return goal <= pairs(state[0])


def shortest_plan(towers, goal, actions) -> list[tuple[str, ...]]:
    """Breadth first."""
    waiting, seen = deque([(towers, None, [])]), set()
    while waiting:
        now, hand, plan = waiting.popleft()
        if goal <= pairs(now):
            return plan
        for action in actions:
            after = apply(now, hand, action)
            if after is not None and repr(after) not in seen:
                seen.add(repr(after))
                waiting.append((*after, [*plan, action]))
    raise AssertionError("every world can be built")


def random_towers(blocks: list[str], rng: random.Random) -> list[list[str]]:
    towers: list[list[str]] = []
    for block in rng.sample(blocks, len(blocks)):
        if towers and rng.random() < 0.6:
            rng.choice(towers).append(block)
        else:
            towers.append([block])
    return sorted(towers)


def listed(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def written(towers, goal, rng: random.Random) -> str:
    facts = [f"the {tower[-1]} block is clear" for tower in towers] + ["the hand is empty"]
    facts += [f"the {above} block is on top of the {below} block" for above, below in pairs(towers)]
    facts += [f"the {tower[0]} block is on the table" for tower in towers]
    rng.shuffle(facts)
    wanted = [f"the {above} block is on top of the {below} block" for above, below in sorted(goal)]
    return f"{RULES}As initial conditions I have that, {listed(facts)}.\nMy goal is to have that {listed(wanted)}.\n\nThe plan:"


IN_WORDS = {
    "pick-up": "pick up the {} block",
    "put-down": "put down the {} block",
    "stack": "stack the {} block on top of the {} block",
    "unstack": "unstack the {} block from on top of the {} block",
}


def in_words(plan, rng: random.Random) -> str:
    if rng.random() < 0.3:
        return "\n".join(f"({' '.join(action)})" for action in plan)
    lines = [IN_WORDS[name].format(*blocks) for name, *blocks in plan]
    return (
        "\n".join(f"{i}. {line.capitalize()}." for i, line in enumerate(lines, 1))
        if rng.random() < 0.5
        else "\n".join(lines)
    )


def corrupted(plan, actions, rng: random.Random) -> list[tuple[str, ...]]:
    """A plan with one to three changes; some of the changed ones still work."""
    plan = list(plan)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(plan) + 1)
        kind = rng.choice(("drop", "insert", "replace", "swap", "repeat", "detour"))
        if kind == "insert":
            plan.insert(at, rng.choice(actions))
        elif kind == "detour":
            block = rng.choice(actions)[1]
            plan[at:at] = [("pick-up", block), ("put-down", block)]
        elif at < len(plan) and kind == "drop":
            del plan[at]
        elif at < len(plan) and kind == "replace":
            plan[at] = rng.choice(actions)
        elif at < len(plan) and kind == "repeat":
            plan.insert(at, plan[at])
        elif 0 < at < len(plan):
            plan[at - 1], plan[at] = plan[at], plan[at - 1]
    return plan


def test_random_worlds_are_judged_as_the_slow_reference_judges():
    rng = random.Random(20)
    judged = {True: 0, False: 0}
    for _ in range(60):
        blocks = rng.sample(["red", "blue", "orange", "yellow", "white"], rng.randint(2, 4))
        actions = all_actions(blocks)
        towers = random_towers(blocks, rng)
        goal = pairs(random_towers(blocks, rng)) or {(blocks[0], blocks[1])}
        plan = shortest_plan(towers, goal, actions)
        prompt = written(towers, goal, rng)
        answer = in_words(plan, rng)
        assert score_plan(answer, prompt, answer), (prompt, answer)
        for _ in range(40):
            changed = corrupted(plan, actions, rng)
            expected = judge(towers, goal, changed) and bool(changed or not plan)
            text = in_words(changed, rng)
            assert score_plan(text, prompt, answer) == expected, (prompt, text)
            judged[expected] += 1
    assert min(judged.values()) > 200


def test_the_shared_plans_pass():
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("SRDE_SHARED_DATA", beside))
    files = sorted(folder.glob("planning.*.jsonl"))
    if not files:
        pytest.skip(f"the shared data is not at {folder}; set SRDE_SHARED_DATA")
    rows = [json.loads(line) for path in files for line in path.read_bytes().splitlines()]
    rows = [row for row in rows if row["kind"] == "plan"]
    assert len(rows) > 500
    for row in rows:
        assert parse_world(row["prompt"]) is not None, row["id"]
        for text in (row["response"], row["pddl_plan"]):
            assert score_plan(text, row["prompt"], ""), row["id"]
        first, *rest = row["answer"].split("\n")
        assert not score_plan("\n".join(rest), row["prompt"], row["answer"]), row["id"]
        assert not score_plan("\n".join([first, *rest[:-1]]), row["prompt"], row["answer"]), row["id"]
