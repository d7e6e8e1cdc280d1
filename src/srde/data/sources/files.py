"""Local files, cut into chunks that can be read on their own.

A chunk is a span of lines of a JSONL file, found by one pass over its bytes, or a span of rows of a parquet file. JSON arrays and
compressed JSONL cannot be entered in the middle: they are unpacked into JSONL once, by `unpacked`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srde.data.rows import parse_record
from srde.data.sources.registry import SUFFIXES
from srde.errors import DataError

CHUNK_ROWS = 1024
CHUNK_BYTES = 16 * 2**20
_BLOCK = 4 * 2**20


@dataclass(frozen=True)
class Span:
    """A part of a file.

    Attributes:
        file: Its name for messages and row ids, without the folder.
        path: Where it is.
        start: First byte of JSONL, or first row of parquet.
        end: Past the last.
        line: Number of the first row, counted from 1.
        rows: How many there are; of JSONL, blank lines included.
    """

    file: str
    path: str
    start: int
    end: int
    line: int
    rows: int


@dataclass(frozen=True)
class DataFile:
    """A file as it was when the build began."""

    file: str
    bytes: int
    sha256: str
    spans: tuple[Span, ...]

    def identity(self) -> dict[str, Any]:
        """What the plan remembers of it."""
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256}


def data_files(path: str | Path) -> list[Path]:
    """The data files at a path: itself, or all below a folder, sorted by name.

    Raises:
        DataError: There are none, or one is a link that leads out of the folder.
    """
    path = Path(path)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError.at(path, None, "file", f"must end in {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise DataError.at(path, None, "file", "does not exist")
    root = path.resolve()
    found = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.name.endswith(SUFFIXES) and not any(part.startswith(".") for part in parts):
            if not file.resolve().is_relative_to(root):
                raise DataError.at(
                    file, None, "file", "is a link that leads out of the folder; name its target"
                )
            if file.is_file():
                found.append(file)
    if not found:
        raise DataError.at(path, None, "file", f"is a folder without data files ({', '.join(SUFFIXES)})")
    return found


def open_file(path: Path, name: str, scratch: Path) -> DataFile:
    """Reads a file once for its hash and its chunks.

    Args:
        path: The file.
        name: Its name for messages and ids.
        scratch: Folder for the unpacked form of files that cannot be entered in the middle.

    Raises:
        DataError: It is empty or not what its name says.
    """
    if path.name.endswith(".parquet"):
        spans = _parquet_spans(path, name)
        digest = _sha256(path)
    elif path.name.endswith(".jsonl"):
        spans, digest = _line_spans(path, name)
    else:
        digest = _sha256(path)
        spans, _ = _line_spans(_unpacked(path, scratch / f"{digest[:16]}.jsonl"), name)
    if not spans:
        raise DataError.at(path, None, "file", "is empty; it must hold at least one row")
    return DataFile(name, path.stat().st_size, digest, tuple(spans))


def read_span(span: Span) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """The records of a span with their line numbers; the error in the place of a line that is not a JSON object."""
    if span.path.endswith(".parquet"):
        yield from _read_parquet(span)
        return
    with open(span.path, "rb") as stream:
        stream.seek(span.start)
        lines = stream.read(span.end - span.start).split(b"\n")
    for number, raw in enumerate(lines, start=span.line):
        if raw.strip():
            try:
                yield number, parse_record(raw, span.file, number)
            except DataError as error:
                yield number, error


def _line_spans(path: Path, name: str) -> tuple[list[Span], str]:
    """Chunks that end at line ends, after `CHUNK_ROWS` lines or `CHUNK_BYTES`, whichever comes first; and the hash."""
    digest = hashlib.sha256()
    spans: list[Span] = []
    start = position = lines = 0
    first = 1
    blank, last = True, b""
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            blank, last = blank and not block.strip(), block[-1:]
            at = 0
            while (end := block.find(b"\n", at)) >= 0:
                lines += 1
                at = end + 1
                if lines == CHUNK_ROWS or position + at - start >= CHUNK_BYTES:
                    spans.append(Span(name, str(path), start, position + at, first, lines))
                    start, first, lines = position + at, first + lines, 0
            position += len(block)
    if position > start:
        rest = 0 if last == b"\n" else 1  # a last line without an end
        spans.append(Span(name, str(path), start, position, first, lines + rest))
    return ([] if blank else spans), digest.hexdigest()


def _parquet_spans(path: Path, name: str) -> list[Span]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError.at(path, None, "file", f"is not a parquet file that can be read ({error})") from error
    ends = [*range(CHUNK_ROWS, rows, CHUNK_ROWS), rows] if rows else []
    starts = [0, *ends[:-1]] if ends else []
    return [
        Span(name, str(path), start, end, start + 1, end - start)
        for start, end in zip(starts, ends, strict=True)
    ]


def _read_parquet(span: Span) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(span.path) as file:
            at = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if at < span.end and at + rows > span.start:
                    table = file.read_row_group(group)
                    low, high = max(span.start - at, 0), min(span.end - at, rows)
                    first = span.line + at + low - span.start
                    yield from enumerate(table.slice(low, high - low).to_pylist(), start=first)
                at += rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError.at(span.file, span.line, "file", f"is a damaged parquet file ({error})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unpacked(path: Path, target: Path) -> Path:
    """A JSONL file with the records of a JSON array or of compressed JSONL."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink, _BLOCK)
        else:
            _write_lines(json.loads(path.read_text(encoding="utf-8")), path, part)
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError.at(path, None, "file", f"cannot be read ({error})") from error
    part.replace(target)
    return target


def _write_lines(content: Any, path: Path, part: Path) -> None:
    if isinstance(content, dict):  # {"data": [...]} and the like: one list and what describes it
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise DataError.at(path, None, "file", "must hold a list of objects, or one key with such a list")
    with part.open("w", encoding="utf-8") as sink:
        for record in content:
            sink.write(json.dumps(record, ensure_ascii=True) + "\n")
