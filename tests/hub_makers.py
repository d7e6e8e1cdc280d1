"""One invented row of each public data set, in the columns that the real one has."""

from __future__ import annotations

from random import Random
from typing import Any

from hub_text import (
    NAMES,
    TIMES,
    TOWNS,
    WORDS,
    argument,
    clause,
    function,
    measured,
    mixed,
    noun,
    place,
    prose,
    reading,
    word_problem,
)

Row = dict[str, Any]


def gsm8k(rng: Random, socratic: bool = False) -> Row:
    question, steps, value = word_problem(rng)
    lines = [f"{asked} ** {line}" if socratic else line for asked, line in steps]
    return {"question": question, "answer": "\n".join([*lines, f"#### {value}"])}


def metamath(rng: Random) -> Row:
    question, steps, value = word_problem(rng)
    kind = rng.choice(["GSM_AnsAug", "GSM_Rephrased", "MATH_AnsAug"])
    query = (
        question
        if kind.endswith("AnsAug")
        else f"{question} Say so after {noun(rng, 'shop')} and {noun(rng, 'shop')} are set aside."
    )
    lines = [line.split("<<")[0] + line.split(">>")[1] for _, line in steps]
    ending = [f"#### {value}"] if kind.startswith("GSM") else []
    response = "\n".join([prose(rng, "shop", 12, 25), *lines, *ending, f"The answer is: {value}"])
    return {"type": kind, "query": query, "original_question": question, "response": response}


def orca_math(rng: Random) -> Row:
    question, steps, value = word_problem(rng)
    lines = [line.split("<<")[0] + line.split(">>")[1] for _, line in steps]
    return {
        "question": question,
        "answer": "\n\n".join([*lines, f"Therefore, the number asked for is {value}."]),
    }


def aqua(rng: Random) -> Row:
    question, steps, value = word_problem(rng)
    options, right = mixed(rng, value, [value + gap for gap in rng.sample([-7, -5, -3, 2, 4, 6, 9], 4)])
    lines = [line.split("<<")[0] + line.split(">>")[1] for _, line in steps]
    letter = "ABCDE"[right]
    labelled = [f"{label}){option}" for label, option in zip("ABCDE", options, strict=True)]
    return {
        "question": question,
        "options": labelled,
        "rationale": "\n".join([*lines, f"Answer is {letter}."]),
        "correct": letter,
    }


def logiqa(rng: Random) -> Row:
    context, query, options, right = argument(rng)
    return {"context": context, "query": query, "options": options, "correct_option": right}


def reclor(rng: Random) -> Row:
    context, question, answers, right = argument(rng)
    name = f"train_{rng.randrange(10**9)}"
    return {"context": context, "question": question, "answers": answers, "label": right, "id_string": name}


def deduction(rng: Random) -> Row:
    first, second, third = rng.sample(WORDS["archive"][0], 3)
    inputs = f"{prose(rng, 'archive', 15, 35)} On a shelf there are three things: the {third}, the {first} and the {second}."
    inputs += f" The {first} is to the left of the {second}. The {third} is to the right of the {second}."
    options = [f"The {thing} is the leftmost." for thing in (first, second, third)]
    target, scores = [options[0]], [1, 0, 0]
    return {
        "idx": rng.randrange(10**6),
        "inputs": inputs,
        "targets": target,
        "multiple_choice_targets": options,
        "multiple_choice_scores": scores,
    }


def word_sorting(rng: Random) -> Row:
    words = rng.sample(sorted({word for topic in WORDS.values() for word in topic[0]}), rng.randint(6, 14))
    inputs = f"Sort the following words alphabetically: List: {' '.join(words)}"
    row = {"idx": rng.randrange(10**6), "inputs": inputs, "targets": [" ".join(sorted(words))]}
    return row | {"multiple_choice_targets": [], "multiple_choice_scores": []}


def hellaswag(rng: Random) -> Row:
    thing, label, source = (
        noun(rng, "home"),
        rng.choice(["Baking", "Fencing", "Gardening", "Roof repair"]),
        rng.randrange(10**6),
    )
    before, after = prose(rng, "home", 15, 40), f"the {thing}"
    wrong = [clause(rng, "home") + "." for _ in range(3)]
    right = f"is set down {place(rng, 'home')} and nobody touches the {thing} {rng.choice(TIMES)}."
    endings, index = mixed(rng, right, wrong)
    row = {
        "ind": source,
        "activity_label": label,
        "ctx_a": before,
        "ctx_b": after,
        "ctx": f"{before} {after}",
        "endings": endings,
    }
    return row | {
        "source_id": f"wikihow~{source}",
        "split": "train",
        "split_type": "indomain",
        "label": str(index),
    }


def commonsense(rng: Random) -> Row:
    name, thing, where = rng.choice(NAMES), noun(rng, "home"), WORDS["home"][2]
    right, *wrong = rng.sample(where, 5)
    options, index = mixed(rng, right, wrong)
    question = (
        f"{prose(rng, 'home', 10, 25)} {name} left the {thing} {right} and went away. Where is the {thing}?"
    )
    row = {"id": f"{rng.getrandbits(128):032x}", "question": question, "question_concept": thing.split()[1]}
    return row | {"choices": {"label": list("ABCDE"), "text": options}, "answerKey": "ABCDE"[index]}


def piqa(rng: Random) -> Row:
    thing, tool, verb = noun(rng, "home"), noun(rng, "home"), rng.choice(WORDS["home"][1])
    goal = f"How can one {verb} the {thing} {place(rng, 'home')} when {clause(rng, 'home')}?"
    good = f"{rng.choice(['Take', 'Fetch', 'Use'])} the {tool} and {verb} the {thing} with it, even if {clause(rng, 'home')}."
    solutions, index = mixed(
        rng, good, [good.replace(f" and {verb} the {thing} with it", " and then throw it away")]
    )
    return {"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": index}


def winogrande(rng: Random) -> Row:
    inner, outer = rng.sample(WORDS["home"][0], 2)
    large = rng.random() < 0.5
    why = rng.choice(["big", "bulky", "wide"] if large else ["small", "tight", "narrow"])
    sentence = (
        f"{prose(rng, 'home', 12, 25)} The {inner} did not fit into the {outer} because the _ was too {why}."
    )
    options = [inner, outer]
    return {
        "sentence": sentence,
        "option1": options[0],
        "option2": options[1],
        "answer": "1" if large else "2",
    }


def code_alpaca(rng: Random) -> Row:
    task, name, code, tests = function(rng)
    return {
        "instruction": task,
        "input": tests[0].split(name)[1].split(" ==")[0] if rng.random() < 0.5 else "",
        "output": code,
    }


def code_feedback(rng: Random) -> Row:
    task, name, code, tests = function(rng)
    asked = f"Can you show that {name} works? {prose(rng, 'code', 12, 25)}"
    said = [
        task,
        f"{prose(rng, 'code', 12, 25)}\n\n```python\n{code}```",
        asked,
        "```python\n" + "\n".join(tests) + "\n```",
    ]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    return {"id": rng.randrange(10**6), "messages": messages}


def mbpp(rng: Random) -> Row:
    task, _, code, tests = function(rng)
    row = {
        "task_id": rng.randrange(10**6),
        "text": task,
        "code": code.replace("\n", "\r\n"),
        "test_list": tests,
    }
    return row | {"test_setup_code": "", "challenge_test_list": []}


def mbpp_sanitized(rng: Random) -> Row:
    task, _, code, tests = function(rng)
    row = {
        "source_file": "Benchmark Questions Verification V2.ipynb",
        "task_id": rng.randrange(10**6),
        "prompt": task,
    }
    return row | {"code": code, "test_imports": [], "test_list": tests}


def humaneval(rng: Random) -> Row:
    task, name, code, tests = function(rng)
    head, body = code.split("\n", 1)
    checks = "\n".join("    " + test.replace(name, "candidate") for test in tests)
    row = {
        "task_id": f"HumanEval/{rng.randrange(10**6)}",
        "prompt": f'\n\n{head}\n    """ {task}\n    """\n',
        "canonical_solution": body,
    }
    return row | {"test": f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n{checks}\n", "entry_point": name}


def sciq(rng: Random) -> Row:
    right, *wrong = rng.sample(WORDS["science"][0], 4)
    verb, other, where = rng.choice(WORDS["science"][1]), noun(rng, "science"), place(rng, "science")
    question = f"Which part is known to {verb} the {other} {where}, although {clause(rng, 'science')}?"
    support = f"{prose(rng, 'science', 15, 40)} Only the {right} is known to {verb} the {other} {where}."
    wrong_answers = {"distractor3": wrong[2], "distractor1": wrong[0], "distractor2": wrong[1]}
    return {"question": question, **wrong_answers, "correct_answer": right, "support": support}


def arc(rng: Random) -> Row:
    question, value, unit = measured(rng)
    options, index = mixed(
        rng, f"{value} {unit}", [f"{value + gap} {unit}" for gap in rng.sample([1, 3, 8, 11, 20], 3)]
    )
    labels = list("ABCD") if rng.random() < 0.9 else list("1234")
    row = {
        "id": f"Mercury_{rng.randrange(10**7)}",
        "question": question,
        "choices": {"text": options, "label": labels},
    }
    return row | {"answerKey": labels[index]}


def mmlu(rng: Random, subject: str = "") -> Row:
    question, value, unit = measured(rng)
    options, index = mixed(
        rng, f"{value} {unit}", [f"{value + gap} {unit}" for gap in rng.sample([2, 5, 9, 14], 3)]
    )
    chosen = rng.choice(["college_physics", "astronomy", "virology"]) if subject == "any" else subject
    return {"question": question, "subject": chosen, "choices": options, "answer": index}


def scibench(rng: Random, source: str, solved: bool) -> Row:
    question, value, unit = measured(rng)
    solution = f"{prose(rng, 'science', 15, 30)} Hence the result is {value} {unit}." if solved else ""
    row = {"solution": solution, "problem_text": question, "answer_latex": f" {value}", "comment": " "}
    number = f" {rng.randrange(1, 999)}.{rng.randrange(1, 999)}"
    return row | {"answer_number": str(value), "problemid": number, "unit": f" ${unit}$", "source": source}


def boardgame(rng: Random) -> Row:
    a, b, c, d = rng.sample(WORDS["game"][0], 4)
    first, second, third = rng.sample(WORDS["game"][1], 3)
    label = rng.choice(["proved", "disproved", "unknown"])
    does = {"proved": f"does {third}", "disproved": f"does not {third}", "unknown": f"will later {third}"}[
        label
    ]
    facts = f"The {a} does {first} the {b}. {prose(rng, 'game', 12, 30)}"
    rules = f"Rule1: If the {a} does {first} the {b}, then the {b} does {second} the {c}. "
    rules += (
        f"Rule2: If the {b} does {second} the {c}, then the {c} {does} the {c if label == 'unknown' else d}."
    )
    preferences = f"Rule{rng.randint(1, 2)} is preferred over the other rule."
    theory = f"Facts:\n\t({a}, {first}, {b})\nRules:\n\tRule1: ({a}, {first}, {b}) => ({b}, {second}, {c})\nPreferences:\n\tnone"
    example = "A few players are playing a boardgame. The current state of the game is as follows. " + facts
    example += f" And the rules of the game are as follows. {rules} {preferences} Based on the game state and the rules and "
    example += f"preferences, does the {c} {third} the {d}?"
    proof = f"We know that the {a} does {first} the {b}, so by Rule1 the {b} does {second} the {c}. The answer is {label}."
    row = {
        "proof": proof,
        "example": example,
        "label": label,
        "rules": rules,
        "preferences": preferences,
        "theory": theory,
    }
    return row | {"goal": f"({c}, {third}, {d})", "facts": facts, "config": "BoardgameQA-Main-depth2"}


def hotpot(rng: Random) -> Row:
    firm, person = (
        f"{rng.choice(TOWNS)} {rng.choice(TOWNS)} Works",
        f"{rng.choice(NAMES)} {rng.choice(TOWNS)}",
    )
    born, built = rng.sample(TOWNS, 2)
    told = {
        firm: [
            f"{firm} is a company in {built} that keeps a {noun(rng, 'archive')}.",
            f"It was founded by {person}.",
        ]
    }
    told[person] = [f"{person} was born in the town of {born}.", prose(rng, "archive", 10, 25)]
    while len(told) < 10:
        told[f"{rng.choice(TOWNS)} {rng.choice(WORDS['archive'][0])}"] = [
            prose(rng, "archive", 8, 16) for _ in range(2)
        ]
    titles = list(told)
    rng.shuffle(titles)
    kept = told[firm][0].split("keeps ")[1][:-1]
    question = f"In which town was the founder of {firm} born, the company with {kept} in {built}, "
    question += f"given that {clause(rng, 'archive')}?"
    row = {
        "id": f"{rng.getrandbits(96):024x}",
        "question": question,
        "answer": born,
        "type": "bridge",
        "level": "medium",
    }
    facts = {"title": [firm, person], "sent_id": [1, 0]}
    return row | {
        "supporting_facts": facts,
        "context": {"title": titles, "sentences": [told[title] for title in titles]},
    }


def quality(rng: Random) -> Row:
    article, question, options, right = reading(rng)
    return {
        "article": article,
        "question": question,
        "options": options,
        "answer": right,
        "hard": rng.random() < 0.5,
    }


def scrolls(rng: Random, choices: bool) -> Row:
    text, question, options, right = reading(rng)
    listed = "\n".join(f" ({letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
    name = f"{rng.getrandbits(160):040x}"
    head = f"{question}\n\n{listed}\n\n" if choices else f"{question}\n\n"
    return {"id": name, "pid": f"{name}_0", "input": head + text, "output": options[right]}
