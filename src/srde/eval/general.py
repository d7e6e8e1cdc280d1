"""General text: prose that is in no domain, on which an adapter should change as little as possible.

`general.jsonl` beside this file holds sixty paragraphs of everyday prose, written for this purpose and published nowhere else: no
puzzles, no programs, no questions. The loss on it, base and experts, is what is reported as lost.
"""

from __future__ import annotations

import re
from pathlib import Path

from srde.data.rows import Row, read_rows
from srde.errors import ConfigError, DataError

BUILT_IN = Path(__file__).with_name("general.jsonl")
NONE = "none"


def load_general(path: str | None) -> list[Row]:
    """Reads general text as rows of plain text.

    Args:
        path: A file of rows ``{"text": ...}`` whose name ends in `.jsonl`; or one of plain text whose name ends in `.txt`, of
            which each paragraph is a row: paragraphs end at blank lines. None is the built-in text, "none" is no text at all.

    Raises:
        ConfigError: The file is of another kind.
        DataError: It does not exist, has no text, or has rows of another kind.
    """
    if path == NONE:
        return []
    file = BUILT_IN if path is None else Path(path)
    if file.suffix == ".txt":
        return _paragraphs(file)
    if file.suffix != ".jsonl":
        raise ConfigError.of(
            "general_file", path, rule="its name must end in .jsonl (rows with text) or .txt (plain text)",
            fix="rename it, or pass none to measure no general text",
        )  # fmt: skip
    rows = read_rows(file)
    for row in rows:
        if row.prompt:
            raise DataError.at(
                row.file, row.line, "text", "is missing; general text has no prompt and no response"
            )
    return rows


def _paragraphs(file: Path) -> list[Row]:
    if not file.is_file():
        raise DataError.at(file, None, "file", "does not exist or is not a file")
    try:
        text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError.at(file, None, "file", f"is not UTF-8: byte {error.start}") from error
    rows, line = [], 1
    for part in re.split(r"(\n(?:[ \t]*\n)+)", text):
        if part.strip():
            rows.append(Row(prompt=[], response=part.strip(), file=str(file), line=line))
        line += part.count("\n")
    if not rows:
        raise DataError.at(file, None, "file", "is empty; it must hold at least one paragraph")
    return rows
