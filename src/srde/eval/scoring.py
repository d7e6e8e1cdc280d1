"""Scores a model's text against the known answer of an item.

`score` is a function of text: no model, no files. It reads verbose outputs as a person would
("The sum is 153.", "**Answer:** (B) tree", a fenced block), because a base model that knows the
answer but not the form must not be counted as wrong.

Kinds, what `answer` is, and when the score is 1:

| kind             | answer                | full score                                         | part scores |
|------------------|-----------------------|----------------------------------------------------|-------------|
| `number`         | number or its text    | equal numbers                                      | no          |
| `number_tol5pct` | number or its text    | relative error of at most 5 %                      | no          |
| `choice`         | letter                | the same letter                                    | no          |
| `exact`          | text                  | the same text (`metadata["options"]`: same option) | no          |
| `one_of`         | list of texts         | the same text as one of them                       | no          |
| `short_text`     | text                  | the same words                                     | token F1    |
| `set`            | list of texts         | the same items, in any order                       | no          |
| `grid`           | rows of digits        | all cells equal                                    | no          |
| `plan`           | text of a plan        | the plan, simulated, reaches the prompt's goal     | no          |
| `reasoning_gym`  | text                  | what the task's own `score_answer` says            | as it says  |
| `code`           | -                     | the program passes the row's tests                 | no          |

`code` needs the whole row, and leave to run programs that a model wrote: `score_row` scores it, `score` does not. `choice` has a
better rule where the model is at hand: see `srde.eval.choices`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from srde.data.rows import Row
from srde.errors import UsageError

# A sign counts only where no word, number or bracket stands before it: 10-3 holds 10 and 3.
_NUMBER = re.compile(
    r"(?<![\w.)])(?P<digits>[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)"
    r"(?:\s*(?:x|\*|\u00d7|\\times|\\cdot)\s*10\s*\^\s*\{?\s*(?P<power>[-+]?\d+))?"
)
# "The answer is", "Final answer:", "The output of the code is", "result =". The verb or the sign is needed:
# the bare word also stands in sentences such as "to answer this question".
_CUE = re.compile(
    r"\b(?:answer|output|result|solution)s?\b[^\n.:=]{0,60}?(?:\bis\b|\bare\b|\bbe\b|:|=)[:*\s]*",
    re.IGNORECASE,
)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_CHOICES = (  # tried in this order on the whole text; each has exactly one group that holds the letter
    re.compile(r"\A[\s*(]*([A-Za-z])(?:[).:,*]|\s*(?:\n|\Z))"),
    re.compile(r"\(([A-Za-z])\)"),
    re.compile(r"\b(?:option|choice|letter)\s+(?:is\s+)?\(?([A-Z])\b"),
    re.compile(r"(?<![\w'])([A-Z])[).:](?!\w)"),
)
_CHOICE_AFTER_CUE = re.compile(r"\W*(?:option |choice )?(?:\(?([A-Z])(?![\w'])|\(?([a-z])[).:])")
_GRID_LINE = re.compile(r"[\s\[\](),|]*\d[\d\s\[\](),|]*")
_BULLET = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+")
_BETWEEN_ITEMS = re.compile(r"\s*[,;\n]\s*(?:and\s+)?|\s+and\s+")
_CLOSED_SETS = (("yes", "no"), ("true", "false"), ("valid", "invalid"), ("proved", "disproved", "unknown"))


CODE = "code"
PLAN = "plan"


def is_scorable(kind: str) -> bool:
    """True where `score` knows the kind."""
    return kind == PLAN or kind in _SCORERS


def is_asked(row: Row, *, confirm_run_unsafe_code: bool = False) -> bool:
    """Whether a model's text for a row can be scored: programs only with leave to run them."""
    if not row.prompt:
        return False
    if row.kind == CODE:
        return confirm_run_unsafe_code
    return row.answer is not None and is_scorable(row.kind or "")


def score_row(row: Row, text: str, *, confirm_run_unsafe_code: bool = False) -> tuple[float, str]:
    """Scores the text that a model gave to a row.

    Args:
        row: One of which `is_asked` is true.
        text: The model's text, without special tokens.
        confirm_run_unsafe_code: Leave to run programs that a model wrote.

    Returns:
        The score, 0 to 1, and why a program failed; the reason is empty for other kinds.
    """
    if row.kind == CODE:
        from srde.eval.contained import score_code

        passed, reason = score_code(text, row, confirm_run_unsafe_code=confirm_run_unsafe_code)
        return float(passed), reason
    return score(str(row.kind), text, row.answer, row.metadata, prompt=row.prompt[-1]["content"]), ""


def score(
    kind: str, prediction_text: str, answer: Any, metadata: Mapping[str, Any], *, prompt: str = ""
) -> float:
    """Scores one prediction.

    Args:
        kind: How to score; see the table at the top of this file.
        prediction_text: The model's text, without the prompt and without special tokens.
        answer: The known answer, as the row holds it.
        metadata: The row's metadata. Read are `options` (the closed list of possible answers, for `exact`),
            `n_options` (for `choice`), and, for `reasoning_gym`, `source_dataset` with what that task stores.
        prompt: The question, which only `plan` needs.

    Returns:
        A score from 0 to 1. An answer counts as right when the score is 1.

    Raises:
        UsageError: The kind has no scorer.
    """
    if not is_scorable(kind):
        raise UsageError.of(
            "kind", kind, rule=f"has no scorer (known: {', '.join([*_SCORERS, PLAN])})",
            fix="Ask is_scorable(kind) first and report the loss only",
        )  # fmt: skip
    if kind == PLAN:
        from srde.eval.blocksworld import score_plan

        return float(score_plan(prediction_text, prompt, str(answer)))
    return float(_SCORERS[kind](prediction_text, answer, metadata))


def stated_answer(text: str) -> str:
    """The part of a text that states its answer, without decoration.

    That is the first found of: what stands after the last "the answer is" (or "Output:", "result =" and the like) up to
    the end of the line; a fenced block; the whole text.
    """
    cues = [cue for cue in _CUE.finditer(text) if text[cue.end() :].strip()]
    if cues:
        text = text[cues[-1].end() :]
        if not text.startswith("```"):
            return _undress(text.split("\n")[0])
    fence = _FENCE.search(text)
    return _undress(fence.group(1) if fence else text)


def _undress(text: str) -> str:
    """Removes white space, Markdown and TeX marks, and one closing full stop."""
    text = text.strip().rstrip("*").removesuffix(".").strip().strip("*`$").strip()
    boxed = re.fullmatch(r"\\boxed\{(.*)\}", text, re.DOTALL)
    return boxed.group(1).strip() if boxed else text.removesuffix(".")


def _candidates(text: str) -> list[str]:
    """Where a person would look for the answer: the stated one, the first and last line, and what those say it *is*."""
    lines = [line for line in text.strip().split("\n") if line.strip(" `*")]
    found = [stated_answer(text)]
    for line in lines[:1] + lines[-1:]:
        found.append(_undress(line))
        found.append(_undress(re.split(r"(?:\b(?:is|are|prints|returns)\b|:|=|->)\s+", line)[-1]))
    return found


def _numbers(text: str) -> list[float]:
    found = [match.groupdict("0") for match in _NUMBER.finditer(text)]
    return [float(one["digits"].replace(",", "")) * 10.0 ** int(one["power"]) for one in found]


def _predicted_number(text: str) -> float | None:
    """The number after the last cue; else that of a first line which is only a number; else the last number."""
    for cue in reversed(list(_CUE.finditer(text))):
        stated = _numbers(text[cue.end() :].split("\n")[0].rsplit("=", 1)[-1])
        if stated:
            return stated[0]
    first_line = _undress(text.strip().split("\n")[0])
    if _NUMBER.fullmatch(first_line):
        return _numbers(first_line)[0]
    found = _numbers(text)
    return found[-1] if found else None


def _score_number(text: str, answer: Any, relative_tolerance: float) -> bool:
    predicted, wanted = _predicted_number(text.replace("\u2212", "-")), _numbers(str(answer))
    if len(wanted) != 1:
        raise UsageError.of(
            "answer", answer, rule="must be one number for the kinds number and number_tol5pct",
            fix="Correct the row, or give it another kind",
        )  # fmt: skip
    return predicted is not None and math.isclose(
        predicted, wanted[0], rel_tol=relative_tolerance, abs_tol=1e-12
    )


def _score_choice(text: str, answer: Any, metadata: Mapping[str, Any]) -> bool:
    count, wanted = metadata.get("n_options", 26), str(answer).strip("() ").upper()
    if type(count) is not int or not 2 <= count <= 26:
        raise UsageError.of(
            "n_options", count, rule="must be a whole number from 2 to 26", fix="Correct the row"
        )
    last = chr(ord("A") + count - 1)
    if len(wanted) != 1 or not "A" <= wanted <= last:
        raise UsageError.of(
            "answer",
            answer,
            rule=f"must be a letter from A to {last} for the kind choice",
            fix="Correct the row",
        )
    cues = list(_CUE.finditer(text))
    matches = [_CHOICE_AFTER_CUE.match(text, cues[-1].end())] if cues else []
    matches += [pattern.search(text) for pattern in _CHOICES]
    letters = [next(group for group in match.groups() if group).upper() for match in matches if match]
    return next((letter for letter in letters if letter <= last), None) == wanted


def _canonical(text: str) -> str:
    """One spelling for texts that differ only in spacing round punctuation, in quote marks or in a prose answer's case."""
    text = re.sub(r"\s+", " ", text.strip()).replace('"', "'")
    text = re.sub(r"\s*([,:;\[\](){}])\s*", r"\1", text)
    # Case carries meaning in literals, formulas and codes, but not in an answer made of plain words.
    return text.casefold() if re.fullmatch(r"[a-z' ,.-]*|[A-Z]?[a-z' ,.-]*|[A-Z ]*", text) else text


def _matches(text: str, answer: Any) -> bool:
    wanted = _canonical(str(answer))
    found = (_canonical(candidate) for candidate in _candidates(text))
    return any(wanted in (candidate, re.sub(r"^'(.*)'$", r"\1", candidate)) for candidate in found)


def _score_exact(text: str, answer: Any, metadata: Mapping[str, Any]) -> bool:
    wanted = str(answer).casefold()
    options = metadata.get("options") or next((known for known in _CLOSED_SETS if wanted in known), None)
    if not options:
        return _matches(text, answer)
    # Of a closed set, the first option that the stated answer (else the text) names: "No, it does not follow, yes?" is no.
    words = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
    match = pattern.search(stated_answer(text)) or pattern.search(text)
    return match is not None and match.group().casefold() == wanted


def _score_short_text(text: str, answer: Any, metadata: Mapping[str, Any]) -> float:
    def words(phrase: str) -> Counter[str]:
        return Counter(re.sub(r"\b(?:a|an|the)\b|[^\w\s]", " ", phrase.casefold()).split())

    predicted, wanted = words(stated_answer(text)), words(str(answer))
    common = (predicted & wanted).total()
    return 2 * common / (predicted.total() + wanted.total()) if common else 0.0


def _items(text: str) -> set[str]:
    """The items of a list in words: split at commas, semicolons, line breaks and "and", without bullets and brackets."""
    lines = [_BULLET.sub("", line) for line in _undress(text).strip("[](){}").split("\n")]
    parts = (_undress(part).strip("\"'") for part in _BETWEEN_ITEMS.split("\n".join(lines)))
    return {re.sub(r"\s+", " ", part).casefold() for part in parts if part}


def _score_set(text: str, answer: Any, metadata: Mapping[str, Any]) -> bool:
    wanted = set().union(*(_items(one) for one in ([answer] if isinstance(answer, str) else answer)))
    if not wanted:
        raise UsageError.of(
            "answer", answer, rule="must name at least one thing for the kind set", fix="Correct the row"
        )
    bullets = [line for line in text.split("\n") if _BULLET.match(line)]
    after_cue = [text[cue.end() :] for cue in list(_CUE.finditer(text))[-1:]]
    return any(_items(one) == wanted for one in [*_candidates(text), *after_cue, "\n".join(bullets), text])


def _grid(text: str) -> list[str]:
    """The first block of lines that hold only digits (and brackets or commas), as one string of digits a row."""
    rows: list[str] = []
    for line in text.split("\n"):
        if _GRID_LINE.fullmatch(line):
            rows.append(re.sub(r"\D", "", line))
        elif rows:
            break
    return rows


def _score_grid(text: str, answer: Any, metadata: Mapping[str, Any]) -> bool:
    cues = list(_CUE.finditer(text))
    predicted = (_grid(text[cues[-1].end() :]) if cues else []) or _grid(text)
    wanted = _grid(str(answer))
    if not wanted:
        raise UsageError.of(
            "answer", answer, rule="must be rows of digits for the kind grid", fix="Correct the row"
        )
    return predicted == wanted


@cache
def _own_score_answer(task: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym  # takes seconds to import, and only this kind needs it

    return reasoning_gym.get_score_answer_fn(task)


def _score_reasoning_gym(text: str, answer: Any, metadata: Mapping[str, Any]) -> float:
    own = _own_score_answer(metadata["source_dataset"])
    item = {"question": "", "answer": str(answer), "metadata": dict(metadata)}
    return max(own(candidate, item) for candidate in _candidates(text))


_SCORERS: dict[str, Callable[[str, Any, Mapping[str, Any]], float]] = {
    "number": lambda text, answer, metadata: _score_number(text, answer, 1e-9),
    "number_tol5pct": lambda text, answer, metadata: _score_number(text, answer, 0.05),
    "choice": _score_choice,
    "exact": _score_exact,
    "one_of": lambda text, answer, metadata: any(_matches(text, one) for one in answer),
    "short_text": _score_short_text,
    "set": _score_set,
    "grid": _score_grid,
    "reasoning_gym": _score_reasoning_gym,
}
