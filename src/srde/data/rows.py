"""Reads JSONL files of training and evaluation rows.

One JSON object a line, in one of five layouts:

- ``{"messages": [{"role": "user", "content": ...}, ..., {"role": "assistant", "content": ...}]}``: the last turn is the response;
- ``{"conversations": [{"from": "human", "value": ...}, ..., {"from": "gpt", "value": ...}]}`` (ShareGPT): the same;
- ``{"prompt": ..., "response": ...}`` (or ``"completion"`` for ``"response"``);
- ``{"instruction": ..., "input": ..., "output": ...}`` (Alpaca; ``input`` may be left out or empty);
- ``{"text": ...}``: plain text, every token of which is trained.

Each may add ``domain``, ``source``, ``id``, ``kind``, ``answer``, ``license``, ``document`` and ``metadata``; fields with other
names join the metadata. Blank lines are skipped. A defect is a `DataError`: ``file:line: field: rule``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from srde.errors import DataError

_LAYOUTS = ("messages", "conversations", "prompt", "instruction", "text")
_RESPONSES = ("response", "completion")
_LABELS = ("domain", "source", "id", "kind", "license", "document")  # optional, all of them strings
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
    "system": "system", "tool": "tool",
}  # fmt: skip
_Refuse = Callable[[str, str], NoReturn]  # (field, rule)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 and thus no tokenizer can


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        prompt: The conversation before the response, as ``{"role", "content"}``; empty for plain text.
        response: What is trained: the last assistant turn, or the whole of a plain text.
        file: The file that the row came from.
        line: Its line there, counted from 1.
        domain: The domain's name, if the row has one.
        source: Where the item came from.
        id: The item's name within its source.
        kind: How the answer is scored; see `srde.eval.scoring`.
        answer: The known answer: text, a number, or a list of texts for ``one_of``.
        license: The item's licence.
        document: A text, or its name, that several rows share, such as a passage with questions.
        metadata: All other fields.
    """

    prompt: list[dict[str, str]]
    response: str
    file: str
    line: int
    domain: str | None = None
    source: str | None = None
    id: str | None = None
    kind: str | None = None
    answer: str | int | float | list[str] | None = None
    license: str | None = None
    document: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def read_rows(path: str | Path) -> list[Row]:
    """Reads all rows of a file.

    Raises:
        DataError: The file does not exist or has no row, or a row breaks a rule.
    """
    rows = []
    for row in scan_rows(path):
        if not isinstance(row, Row):
            raise row
        rows.append(row)
    return rows


def scan_rows(path: str | Path) -> Iterator[Row | DataError]:
    """All rows of a file in order; in the place of a row that breaks a rule, the error that says so.

    Raises:
        DataError: The file does not exist or has no row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError.at(path, None, "file", "does not exist or is not a file")
    empty = True
    with path.open("rb") as stream:
        # Split as bytes: a broken byte then belongs to a line, and characters such as U+2028 do not end one.
        for line, raw in enumerate(stream, start=1):
            if raw.strip():
                empty = False
                yield try_row(raw, str(path), line)
    if empty:
        raise DataError.at(path, None, "file", "is empty; it must hold at least one row")


def try_row(raw: bytes | Mapping[str, Any], file: str, line: int) -> Row | DataError:
    """A row from a line of JSONL, or from a record of the same fields; the error that says why not, where it breaks a rule."""
    try:
        return to_row(parse_record(raw, file, line) if isinstance(raw, bytes) else raw, file, line)
    except DataError as error:
        return error


def parse_record(raw: bytes, file: str, line: int) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        DataError: It is none.
    """

    def refuse(name: str, rule: str) -> NoReturn:
        raise DataError.at(file, line, name, rule)

    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        refuse("row", f"is not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        refuse(
            "row", f"is not JSON: {error.msg} at column {error.colno}; the file must hold one object a line"
        )
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        refuse("row", f"is not a row: its JSON is nested too deeply or has too long a number ({error})")
    if not isinstance(record, dict):
        refuse(
            "row", f"must be a JSON object, not {_json_type(record)}; the file must hold one object a line"
        )
    return record


def to_row(record: Mapping[str, Any], file: str, line: int) -> Row:
    """Makes a row of an object in one of the layouts.

    Raises:
        DataError: It breaks a rule.
    """

    def refuse(name: str, rule: str) -> NoReturn:
        raise DataError.at(file, line, name, rule)

    def text(name: str, value: Any) -> str:
        if not isinstance(value, str):
            refuse(name, f"must be a string, not {_json_type(value)}")
        if not value.strip():
            refuse(name, "is empty")
        if lone := _LONE_SURROGATE.search(value):
            refuse(name, f"holds the lone surrogate \\u{ord(lone.group()):04x}, which is not a character")
        return value

    layout = [name for name in _LAYOUTS if name in record]
    if len(layout) != 1:
        found = (
            " and ".join(f'"{name}"' for name in layout) or f"only {', '.join(sorted(record)) or 'no field'}"
        )
        refuse(
            "row",
            'must have exactly one of "messages", "conversations", "prompt" (with "response"), "instruction" (with "output") '
            f'and "text"; it has {found}',
        )
    taken: tuple[str, ...] = ()
    if layout == ["messages"]:
        prompt, response = _conversation(record["messages"], "messages", ("role", "content"), text, refuse)
    elif layout == ["conversations"]:
        prompt, response = _conversation(
            record["conversations"], "conversations", ("from", "value"), text, refuse
        )
    elif layout == ["instruction"]:
        taken = ("input", "output")
        if "output" not in record:
            refuse("output", "is missing; an instruction needs its output")
        parts = [text("instruction", record["instruction"])]
        if record.get("input") not in (None, ""):
            parts.append(text("input", record["input"]))
        prompt = [{"role": "user", "content": "\n\n".join(parts)}]
        response = text("output", record["output"])
    elif layout == ["prompt"]:
        prompt = [{"role": "user", "content": text("prompt", record["prompt"])}]
        given = [name for name in _RESPONSES if name in record]
        if len(given) != 1:
            refuse(
                "response",
                "given twice, also as completion" if given else "is missing; a prompt needs its response",
            )
        taken = _RESPONSES
        response = text(given[0], record[given[0]])
    else:
        prompt, response = [], text("text", record["text"])

    metadata = record.get("metadata")
    metadata = {} if metadata is None else metadata
    known = {*layout, *taken, "metadata", "answer", *_LABELS}
    others = {name: value for name, value in record.items() if name not in known}
    for name, value in (*others.items(), ("metadata", metadata), ("answer", record.get("answer"))):
        if lone := _lone_surrogate(value):
            refuse(name, f"holds the lone surrogate \\u{ord(lone):04x}, which is not a character")
    if not isinstance(metadata, dict):
        refuse("metadata", f"must be an object, not {_json_type(metadata)}")
    return Row(
        prompt=prompt,
        response=response,
        file=file,
        line=line,
        answer=_answer(record.get("answer"), refuse),
        metadata={**others, **metadata},
        **{name: text(name, record[name]) for name in _LABELS if record.get(name) is not None},
    )


def _lone_surrogate(value: Any) -> str | None:
    """Half a character in a text, or in any text of a list or an object."""
    if isinstance(value, str):
        found = None if value.isascii() else _LONE_SURROGATE.search(value)
        return found.group() if found else None
    parts = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else ()
    return next((lone for part in parts if (lone := _lone_surrogate(part))), None)


def _conversation(
    messages: Any, field: str, keys: tuple[str, str], text: Callable[[str, Any], str], refuse: _Refuse
) -> tuple[list[dict[str, str]], str]:
    if not isinstance(messages, list) or len(messages) < 2:
        refuse(field, "must be a list of at least two turns, the last of them the assistant's")
    turns = []
    for index, message in enumerate(messages):
        place = f"{field}[{index}]"
        if not isinstance(message, dict):
            refuse(place, f"must be an object with {' and '.join(keys)}, not {_json_type(message)}")
        for name in keys:
            if name not in message:
                refuse(f"{place}.{name}", "is missing")
        role, content = (text(f"{place}.{name}", message[name]) for name in keys)
        if field == "conversations":
            if role not in _ROLES:
                refuse(f"{place}.from", f"must be one of {', '.join(_ROLES)}, not {role!r}")
            role = _ROLES[role]
        turns.append({"role": role, "content": content})
    if turns[-1]["role"] != "assistant":
        refuse(
            f"{field}[{len(turns) - 1}].{keys[0]}",
            f"must be 'assistant', not {turns[-1]['role']!r}: the last turn is the response",
        )
    return turns[:-1], turns[-1]["content"]


def _answer(value: Any, refuse: _Refuse) -> str | int | float | list[str] | None:
    if isinstance(value, list):
        if not value or not all(isinstance(one, str) for one in value):
            refuse("answer", "as a list must hold at least one string, and strings only")
    elif isinstance(value, bool | Mapping):
        refuse("answer", f"must be a string, a number or a list of strings, not {_json_type(value)}")
    return value


def _json_type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")
