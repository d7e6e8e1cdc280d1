"""Converters: a record of a data set in, the fields of a `srde.data.rows.Row` out.

A converter is a function ``(record, fields) -> Converted | None``; None leaves the record out, because its answer is hidden or
missing. `fields` are the entry's settings. A column that is not there raises `MissingColumn`: the data set has changed, or the
entry names it wrongly. Multiple-choice questions of all data sets are put in one form, with the letter as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

Record = Mapping[str, Any]
Fields = Mapping[str, Any]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASK_LETTER = "Answer with the letter of the correct option."
ASK_STEPS = "Solve step by step and give the final answer."


class MissingColumn(Exception):
    """A record lacks a column.

    Attributes:
        column: The one that is missing.
        found: Those that are there.
    """

    def __init__(self, column: str, found: Sequence[str]) -> None:
        super().__init__(column)
        self.column, self.found = column, list(found)


class UnusableValue(Exception):
    """A value that the converter cannot use: (column, rule)."""

    def __init__(self, column: str, rule: str) -> None:
        super().__init__(rule)
        self.column, self.rule = column, rule


@dataclass(frozen=True)
class Converted:
    """What a converter makes of a record.

    Attributes:
        prompt: The question as the user puts it, or a conversation up to the last answer.
        response: What is trained.
        answer: What is scored.
        kind: How it is scored, where the record decides it.
        document: A text that several records share, such as a passage; rows of one document stay on one side of a split.
        id: The record's own name.
        metadata: What else scoring needs, such as the tests of a program.
    """

    prompt: str | list[dict[str, str]]
    response: str
    answer: str | float | int | list[str] | None = None
    kind: str | None = None
    document: str | None = None
    id: str | None = None
    metadata: Mapping[str, Any] | None = None


def column(record: Record, name: str) -> Any:
    """A column's value; `a.b` reaches into a nested one."""
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise MissingColumn(name, list(record))
        value = value[part]
    return value


def text(record: Record, name: str) -> str:
    """A column that holds a text (or a number), without spaces around it."""
    value = column(record, name)
    if value is None or isinstance(value, list | Mapping):
        raise UnusableValue(name, f"must be a text, not {type(value).__name__}")
    return str(value).strip()


def items(record: Record, name: str) -> list[Any]:
    """A column that holds a list without gaps."""
    value = column(record, name)
    if not isinstance(value, list | tuple):
        raise UnusableValue(name, f"must be a list, not {type(value).__name__}")
    if any(one is None for one in value):
        raise UnusableValue(name, "has a gap: one of its values is null")
    return list(value)


def columns(record: Record, fields: Fields) -> Converted | None:
    """Prompt and response from a column each: `prompt`, `response`, and where given `answer`, `document`, `id`."""
    return Converted(
        prompt=text(record, fields.get("prompt", "prompt")),
        response=text(record, fields.get("response", "response")),
        answer=text(record, fields["answer"]) if "answer" in fields else None,
        document=text(record, fields["document"]) if "document" in fields else None,
        id=text(record, fields["id"]) if "id" in fields else None,
    )


def messages(record: Record, fields: Fields) -> Converted | None:
    """A conversation in a column of `role` and `content`; what follows the last assistant turn is left out."""
    name = fields.get("messages", "messages")
    turns = []
    for place, turn in enumerate(items(record, name)):
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise UnusableValue(f"{name}[{place}]", "must be an object with the texts role and content")
        turns.append({"role": turn["role"], "content": turn["content"]})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2:
        return None
    own = text(record, fields["id"]) if "id" in fields else None
    return Converted(turns[:-1], turns[-1]["content"], id=own)


def alpaca(record: Record, fields: Fields) -> Converted | None:
    """Stanford Alpaca's layout: `instruction`, `input`, `output`."""
    parts = [text(record, "instruction"), str(record.get("input") or "").strip()]
    return Converted("\n\n".join(part for part in parts if part), text(record, "output"))


def gsm8k(record: Record, fields: Fields) -> Converted | None:
    """GSM8K: the calculator's marks go, and the number after ``####`` is the answer."""
    steps, mark, answer = text(record, "answer").rpartition("####")
    number = answer.strip().replace(",", "")
    if not mark or not number:
        raise UnusableValue("answer", "must end in '#### ' and the number")
    worked = re.sub(r"<<[^>]*>>", "", steps).strip()
    return Converted(
        f"{text(record, 'question')}\n\n{ASK_STEPS}", f"{worked}\nThe answer is {number}", number, "number"
    )


def choice(record: Record, fields: Fields) -> Converted | None:
    """A multiple-choice question.

    Settings: `question` (a column, or several to be joined), `options` (a column with a list of texts or with `text` and
    `label`, or a list of columns), `answer` (a column), and where wanted `context`, `rationale`, `id`, `shuffle` (for data sets
    whose right option always comes first), `ask` (a sentence after the question) and `prefix` (a pattern to cut from options).
    The answer may be one of the options' columns, or hold an option's label, its letter, its place counted from 0 (from `first`,
    where given) or its text.
    """
    asked = fields.get("question", "question")
    question = "\n".join(
        text(record, name) for name in (asked if isinstance(asked, list) else [asked]) if text(record, name)
    )
    given = fields.get("options", "options")
    labels: list[str] | None = None
    if isinstance(given, list):
        options = [text(record, name) for name in given]
    else:
        nested = isinstance(column(record, given), Mapping)
        options = [str(option).strip() for option in items(record, f"{given}.text" if nested else given)]
        labels = [str(label) for label in items(record, f"{given}.label")] if nested else None
        if labels is not None and len(labels) != len(options):
            raise UnusableValue(f"{given}.label", f"must have a label for each of the {len(options)} options")
    if not 1 < len(options) <= len(LETTERS):
        raise UnusableValue(str(given), f"must hold 2 to {len(LETTERS)} options, not {len(options)}")
    pattern = fields.get("prefix")
    if pattern:
        options = [re.sub(pattern, "", option) for option in options]
    answer = fields.get("answer", "answer")
    if isinstance(given, list) and answer in given:
        right: int | None = given.index(answer)
    else:
        right = _right(record, answer, options, labels, int(fields.get("first", 0)))
    if right is None:
        return None
    if fields.get("shuffle"):
        order = Random(question).sample(range(len(options)), len(options))
        options, right = [options[place] for place in order], order.index(right)
    context = str(column(record, fields["context"]) or "").strip() if "context" in fields else ""
    rationale = str(column(record, fields["rationale"]) or "").strip() if "rationale" in fields else ""
    return Converted(
        prompt=as_question(question, options, context, fields.get("ask")),
        response=as_choice(options, right, rationale),
        answer=LETTERS[right],
        kind="choice",
        document=context or None,
        id=text(record, fields["id"]) if "id" in fields else None,
    )


def as_question(question: str, options: Sequence[str], context: str = "", ask: str | None = None) -> str:
    """A multiple-choice question in the one form that all data sets share."""
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    parts = [context, question, ask or "", f"Options:\n{listed}", ASK_LETTER]
    return "\n\n".join(part for part in parts if part)


def as_choice(options: Sequence[str], right: int, rationale: str = "") -> str:
    """The response to it."""
    return f"{rationale}\nThe answer is {LETTERS[right]}) {options[right]}".strip()


def _right(
    record: Record, name: str, options: Sequence[str], labels: Sequence[str] | None, first: int
) -> int | None:
    """The place of the right option; None where the answer is hidden, as in the test splits of some data sets."""
    value = column(record, name)
    if value is None or str(value).strip() in ("", "-1"):
        return None
    said = str(value).strip()
    if labels is not None and said in labels:
        return labels.index(said)
    if len(said) == 1 and said in LETTERS[: len(options)]:
        return LETTERS.index(said)
    if said.isdecimal() and 0 <= int(said) - first < len(options):
        return int(said) - first
    if said in options:
        return list(options).index(said)
    raise UnusableValue(name, f"{said[:40]!r} names none of the {len(options)} options")


def bigbench(record: Record, fields: Fields) -> Converted | None:
    """BIG-bench as tasksource publishes it: choices with scores where there are choices, else the first target."""
    question = text(record, "inputs")
    options = [str(option) for option in items(record, "multiple_choice_targets")]
    scores = items(record, "multiple_choice_scores")
    if len(options) < 2:
        targets = [str(target) for target in items(record, "targets")]
        return Converted(question, f"The answer is {targets[0]}", targets, "one_of") if targets else None
    if len(options) > len(LETTERS) or len(scores) != len(options) or max(scores) <= 0:
        return None
    order = Random(question).sample(range(len(options)), len(options))
    options, right = [options[place] for place in order], order.index(scores.index(max(scores)))
    return Converted(as_question(question, options), as_choice(options, right), LETTERS[right], "choice")


def boardgame(record: Record, fields: Fields) -> Converted | None:
    """BoardgameQA: a game's situation, rules and preferences; is the statement proved, disproved or unknown?"""
    example, label = text(record, "example"), text(record, "label")
    if label not in ("proved", "disproved", "unknown"):
        raise UnusableValue("label", f"{label[:40]!r} must be proved, disproved or unknown")
    proof = str(record.get("proof") or "").strip()
    return Converted(
        f"{example}\n\nAnswer with proved, disproved or unknown.",
        f"{proof}\nThe answer is {label}".strip(),
        label,
        "exact",
    )


def hotpotqa(record: Record, fields: Fields) -> Converted | None:
    """HotpotQA with the paragraphs that hold the supporting facts, in their order."""
    titles, texts = items(record, "context.title"), items(record, "context.sentences")
    facts = items(record, "supporting_facts.title")
    if len(titles) != len(texts) or not all(isinstance(one, list | tuple) for one in texts):
        raise UnusableValue(
            "context.sentences", f"must have a list of sentences for each of the {len(titles)} titles"
        )
    paragraphs = [
        f"{title}: {''.join(map(str, sentences)).strip()}"
        for title, sentences in zip(titles, texts, strict=True)
        if title in facts
    ]
    answer = text(record, "answer")
    if not answer:
        return None
    passage = "\n\n".join(paragraphs)
    return Converted(
        f"{passage}\n\n{text(record, 'question')}", f"The answer is {answer}", answer, "short_text",
        document=passage or None, id=text(record, "id"),
    )  # fmt: skip


def scrolls(record: Record, fields: Fields) -> Converted | None:
    """SCROLLS: a question and a long document in `input`, the answer in `output`; answers of test splits are hidden."""
    if column(record, "output") in (None, ""):
        return None
    question, _, document = text(record, "input").partition("\n\n")
    answer = text(record, "output")
    return Converted(
        f"{document}\n\n{question}" if document else question, f"The answer is {answer}", answer, "short_text",
        document=document or None, id=text(record, "id"),
    )  # fmt: skip


def scibench(record: Record, fields: Fields) -> Converted | None:
    """SciBench: a college textbook's problem whose answer is a number with a unit."""
    unit = str(record.get("unit") or "").strip()
    number = text(record, "answer_number").replace("\u2212", "-")
    solution = str(record.get("solution") or "").strip()
    asked = f"{text(record, 'problem_text')}\n\n{ASK_STEPS}" + (f" The unit is {unit}." if unit else "")
    return Converted(
        asked,
        f"{solution}\nThe answer is {number}".strip(),
        number,
        "number_tol5pct",
        id=text(record, "problemid"),
    )


def mbpp(record: Record, fields: Fields) -> Converted | None:
    """MBPP: a task with its first test in the prompt, so that the function's name is known."""
    tests = [str(test) for test in items(record, "test_list")]
    if not tests:
        raise UnusableValue("test_list", "must hold at least one test")
    setup = str(record.get("test_setup_code") or "").strip()
    code = text(record, "code").replace("\r\n", "\n")
    return Converted(
        f"{text(record, fields.get('prompt', 'text'))}\nYour code should satisfy this test:\n{tests[0]}",
        f"```python\n{code}\n```",
        code,
        "code",
        id=text(record, "task_id"),
        metadata={"tests": "\n".join([*([setup] if setup else []), *tests])},
    )


def humaneval(record: Record, fields: Fields) -> Converted | None:
    """HumanEval: a function's head to be completed; never trained on."""
    head = str(column(record, "prompt"))
    body = str(column(record, "canonical_solution"))
    entry = text(record, "entry_point")
    return Converted(
        f"Complete this function.\n\n```python\n{head.strip()}\n```",
        f"```python\n{head}{body}\n```",
        head + body,
        "code",
        id=text(record, "task_id"),
        metadata={"tests": f"{column(record, 'test')}\ncheck({entry})", "entry_point": entry},
    )


def winogrande(record: Record, fields: Fields) -> Converted | None:
    """WinoGrande: which of two names fills the blank."""
    options = [text(record, "option1"), text(record, "option2")]
    right = _right(record, "answer", options, ["1", "2"], 1)
    if right is None:
        return None
    question = f"{text(record, 'sentence')}\n\nWhat does the blank _ stand for?"
    return Converted(as_question(question, options), as_choice(options, right), LETTERS[right], "choice")


_COLUMN, _COLUMNS = (str,), (str, list)
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "columns": dict.fromkeys(("prompt", "response", "answer", "document", "id"), _COLUMN),
    "messages": dict.fromkeys(("messages", "id"), _COLUMN),
    "mbpp": {"prompt": _COLUMN},
    "choice": {
        **dict.fromkeys(("answer", "context", "rationale", "id", "ask", "prefix"), _COLUMN),
        **dict.fromkeys(("question", "options"), _COLUMNS),
        "shuffle": (bool,),
        "first": (int,),
    },
}
"""The settings that each converter takes, and their types; those that are not here take none."""

CONVERTERS: dict[str, Callable[[Record, Fields], Converted | None]] = {
    function.__name__: function
    for function in (
        alpaca,
        bigbench,
        boardgame,
        choice,
        columns,
        gsm8k,
        hotpotqa,
        humaneval,
        mbpp,
        messages,
        scibench,
        scrolls,
        winogrande,
    )
}
"""By the names that entries use."""
