"""Reads JSONL files of training and evaluation rows.

One JSON object a line, in one of three layouts:

- ``{"messages": [{"role": "user", "content": ...}, ..., {"role": "assistant", "content": ...}]}``: the last turn is the response;
- ``{"prompt": ..., "response": ...}`` (or ``"completion"`` for ``"response"``);
- ``{"text": ...}``: plain text, every token of which is trained.

Each may add ``domain``, ``source``, ``id``, ``kind``, ``answer``, ``license`` and ``metadata``; fields with other names join the
metadata. Blank lines are skipped. The first defect ends the reading with a `DataError`: ``file:line: field: rule``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from srde.errors import DataError

_LAYOUTS = ("messages", "prompt", "text")
_RESPONSES = ("response", "completion")
_LABELS = ("domain", "source", "id", "kind", "license")  # optional, all of them strings
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
    metadata: dict[str, Any] = field(default_factory=dict)


def read_rows(path: str | Path) -> list[Row]:
    """Reads all rows of a file.

    Raises:
        DataError: The file does not exist or has no row, or a row breaks a rule.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError.at(path, None, "file", "does not exist or is not a file")
    rows = []
    # Split as bytes: a broken byte then belongs to a line, and characters such as U+2028 do not end one.
    for line, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if raw.strip():
            rows.append(_parse(raw, str(path), line))
    if not rows:
        raise DataError.at(path, None, "file", "is empty; it must hold at least one row")
    return rows


def _parse(raw: bytes, file: str, line: int) -> Row:
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
    except RecursionError:
        refuse("row", "is not a row: its JSON is nested too deeply")
    if not isinstance(record, dict):
        refuse(
            "row", f"must be a JSON object, not {_json_type(record)}; the file must hold one object a line"
        )

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
            f'must have exactly one of "messages", "prompt" (with "response") and "text"; it has {found}',
        )
    if layout == ["messages"]:
        prompt, response = _conversation(record["messages"], text, refuse)
    elif layout == ["prompt"]:
        prompt = [{"role": "user", "content": text("prompt", record["prompt"])}]
        given = [name for name in _RESPONSES if name in record]
        if len(given) != 1:
            refuse(
                "response",
                "given twice, also as completion" if given else "is missing; a prompt needs its response",
            )
        response = text(given[0], record[given[0]])
    else:
        prompt, response = [], text("text", record["text"])

    metadata = record.get("metadata", {})
    if not isinstance(metadata, dict):
        refuse("metadata", f"must be an object, not {_json_type(metadata)}")
    known = {*layout, "metadata", "answer", *_LABELS, *(_RESPONSES if layout == ["prompt"] else ())}
    return Row(
        prompt=prompt,
        response=response,
        file=file,
        line=line,
        answer=_answer(record.get("answer"), refuse),
        metadata={**{name: value for name, value in record.items() if name not in known}, **metadata},
        **{name: text(name, record[name]) for name in _LABELS if record.get(name) is not None},
    )


def _conversation(
    messages: Any, text: Callable[[str, Any], str], refuse: _Refuse
) -> tuple[list[dict[str, str]], str]:
    if not isinstance(messages, list) or len(messages) < 2:
        refuse("messages", "must be a list of at least two turns, the last of them the assistant's")
    turns = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, dict):
            refuse(place, f"must be an object with role and content, not {_json_type(message)}")
        for name in ("role", "content"):
            if name not in message:
                refuse(f"{place}.{name}", "is missing")
        turns.append({name: text(f"{place}.{name}", message[name]) for name in ("role", "content")})
    if turns[-1]["role"] != "assistant":
        refuse(
            f"messages[{len(turns) - 1}].role",
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
