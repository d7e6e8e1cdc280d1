"""From a model's answer to a program: which part of the text is code, and what of the prompt belongs to it."""

from __future__ import annotations

import re
import textwrap

from srde.data.rows import Row
from srde.errors import DataError, UsageError
from srde.eval.contained.run import run_program

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_DEFINED = re.compile(r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[^\n]*\n?", re.MULTILINE)
_INDENT = "    "


def score_code(
    text: str, row: Row, *, confirm_run_unsafe_code: bool, seconds: float = 10.0, memory_mb: int = 1024
) -> tuple[bool, str]:
    """Runs the code of an answer with the row's tests.

    Args:
        text: The model's answer.
        row: A row of kind `code`: `metadata["tests"]` is Python that raises where the code is wrong, and
            `metadata["entry_point"]`, where it is given, the function that the prompt begins and the answer completes.
        confirm_run_unsafe_code: The user's consent to run code that a model wrote.
        seconds: As for `run_program`.
        memory_mb: As for `run_program`.

    Returns:
        Whether the tests passed, and the reason, as in `Verdict`.

    Raises:
        UsageError: There is no consent, or the machine cannot contain a process.
        DataError: The row has no tests.
    """
    if confirm_run_unsafe_code is not True:
        raise UsageError.of(
            "confirm_run_unsafe_code", confirm_run_unsafe_code,
            rule="scoring code runs what a model wrote on this machine, contained but not sandboxed",
            fix="Give --confirm_run_unsafe_code if that is acceptable here",
        )  # fmt: skip
    tests = tests_of(row)
    entry_point = row.metadata.get("entry_point")
    prompt = row.prompt[-1]["content"] if row.prompt else ""
    program = program_of(text, prompt, entry_point if isinstance(entry_point, str) else None, tests)
    verdict = run_program(program, tests, seconds=seconds, memory_mb=memory_mb)
    return verdict.passed, verdict.reason


def tests_of(row: Row) -> str:
    """A row's tests.

    Raises:
        DataError: It has none.
    """
    tests = row.metadata.get("tests")
    if not isinstance(tests, str) or not tests.strip():
        raise DataError.at(
            row.file, row.line, "tests", "is missing; a row of kind code needs its tests, as text"
        )
    return tests


def program_of(text: str, prompt: str, entry_point: str | None, tests: str) -> str:
    """The program that an answer means.

    Its code is the first fenced block that defines what is asked for (the entry point, else any name that the tests use),
    else the first block, else the whole text. Where the prompt's block begins the entry point, as in HumanEval, that block
    goes before the code: an answer that defines the function again then has the prompt's imports and helpers, and one that
    is only the function's body completes it.

    Args:
        text: The model's answer.
        prompt: The last turn of the prompt.
        entry_point: The function that the tests call, if the row names it.
        tests: The tests.
    """
    wanted = {entry_point} if entry_point else set(re.findall(r"\w+", tests))
    code = _first_defining(wanted, _FENCE.findall(text)) or text
    if entry_point is None:
        return code
    begun = next((one for one in _FENCE.findall(prompt) if entry_point in _DEFINED.findall(one)), None)
    if begun is None:
        return code
    begun = begun.rstrip() + "\n"
    if entry_point in _DEFINED.findall(code):
        futures = "".join(_FUTURE.findall(code))  # they must stand first in a program
        return futures + begun + "\n\n" + _FUTURE.sub("\n", code)
    return begun + _as_body(code)


def _first_defining(wanted: set[str], blocks: list[str]) -> str | None:
    blocks = [
        textwrap.dedent(block) if block[:1] in " \t" and _has_own_margin(block) else block for block in blocks
    ]
    return next((one for one in blocks if wanted & set(_DEFINED.findall(one))), blocks[0] if blocks else None)


def _has_own_margin(block: str) -> bool:
    """Whether a block stands indented in the text, as in a list, rather than being the body of a function."""
    return bool(re.match(r"\s*(?:async def|def|class|import|from|@)\b", block))


def _as_body(code: str) -> str:
    """Code with the indentation of a function's body, as far as it has another."""
    code = re.sub(r"^[ \t]+", lambda margin: margin[0].expandtabs(4), code, flags=re.MULTILINE)
    lines = [line for line in code.split("\n") if line.strip()]
    if not lines:
        return code
    margins = [len(line) - len(line.lstrip()) for line in lines]
    if margins[0] == len(_INDENT):
        return code  # as it should be; what follows without a margin is outside the function
    opens = lines[0].rstrip().endswith(":")
    stripped = margins[0] == 0 and len(lines) > 1 and min(margins[1:]) >= len(_INDENT)
    # After a line that opens a block, the margins tell whether that line had one: the block is deeper than a body's.
    if stripped and (not opens or margins[1] >= 2 * len(_INDENT) or min(margins[1:]) < margins[1]):
        return _INDENT + code.lstrip()  # only the first line has lost its margin, as generated text does
    return textwrap.indent(textwrap.dedent(code), _INDENT)
