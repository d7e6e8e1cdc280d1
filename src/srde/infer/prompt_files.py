"""Reads prompts from a file: JSONL with ``prompt`` or ``messages``, or a text with one prompt a line."""

from __future__ import annotations

from pathlib import Path

from srde.data.rows import parse_record
from srde.errors import DataError
from srde.infer.prompts import Prompt


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads all prompts of a file; blank lines are skipped.

    A row of JSONL has ``prompt`` (a text) or ``messages`` (turns; a last one of the assistant is the known response and left
    out), so that files of `srde data` can be asked as they are. Any other file has a prompt on each line.

    Raises:
        DataError: The file does not exist or has no prompt, or a row breaks a rule.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError.at(path, None, "file", "does not exist or is not a file")
    lines = [(n, raw) for n, raw in enumerate(path.read_bytes().split(b"\n"), start=1) if raw.strip()]
    if not lines:
        raise DataError.at(path, None, "file", "is empty; it must hold at least one prompt")
    read = _row if path.suffix in (".jsonl", ".json") else _line
    return [read(raw, str(path), n) for n, raw in lines]


def _line(raw: bytes, file: str, line: int) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError.at(
            file, line, "prompt", f"is not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        ) from error


def _row(raw: bytes, file: str, line: int) -> Prompt:
    record = parse_record(raw, file, line)
    if ("prompt" in record) == ("messages" in record):
        raise DataError.at(file, line, "row", 'must have exactly one of "prompt" and "messages"')
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"].strip():
            raise DataError.at(file, line, "prompt", "must be a text that is not empty")
        return record["prompt"]
    turns = record["messages"]
    good = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not good:
        raise DataError.at(file, line, "messages", 'must be a list of {"role": text, "content": text}')
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if not turns or turns[-1]["role"] == "system":
        raise DataError.at(file, line, "messages", "must end in a question, or in a question and its answer")
    return turns
