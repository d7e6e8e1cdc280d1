"""Local files, cut into chunks that can be read on their own.

A chunk is a span of lines of a JSONL file, found by one pass over its bytes, or a span of rows of a parquet file. JSON arrays and
compressed JSONL cannot be entered in the middle: they are unpacked into JSONL once, by `unpacked`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srde.artifacts.disk import means_disk_full
from srde.artifacts.folder import disk_full
from srde.data.rows import parse_record
from srde.data.sources.registry import SUFFIXES
from srde.errors import DataError

CHUNK_ROWS = 1024
CHUNK_BYTES = 8 * 2**20
_BLOCK = 4 * 2**20
_DOMAIN = re.compile(rb'"domain"\s*:\s*"((?:[^"\\]|\\.){1,80})"')
_MOST_DOMAINS = 200


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
    """A file as it was when the build began.

    `domains` are the values that a field called domain seems to have: a file may be sorted by it, and a build that needs rows of
    one has to know that there are any further on.
    """

    file: str
    bytes: int
    sha256: str
    spans: tuple[Span, ...]
    domains: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What the plan remembers of it."""
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256}


def data_files(path: str | Path, leave_out: Path | None = None) -> list[Path]:
    """The data files at a path: itself, or all below a folder, sorted by name, less those below `leave_out`.

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
            if file.is_file() and not (leave_out and file.resolve().is_relative_to(leave_out.resolve())):
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
        digest = _sha256(path)
        spans, domains = _parquet_spans(path, name, scratch / f"{digest[:16]}.parquet")
    elif path.name.endswith(".jsonl"):
        spans, digest, domains = _line_spans(path, name)
    else:
        digest = _sha256(path)
        spans, _, domains = _line_spans(_unpacked(path, scratch / f"{digest[:16]}.jsonl"), name)
    if not spans:
        raise DataError.at(path, None, "file", "is empty; it must hold at least one row")
    return DataFile(name, path.stat().st_size, digest, tuple(spans), tuple(sorted(domains)[:_MOST_DOMAINS]))


def read_span(span: Span) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """The records of a span with their line numbers; the error in the place of a line that is not a JSON object."""
    if span.path.endswith(".parquet"):
        yield from _read_parquet(span)
        return
    try:
        with open(span.path, "rb") as stream:
            stream.seek(span.start)
            lines = stream.read(span.end - span.start).split(b"\n")
    except OSError as error:
        raise DataError.at(
            span.file, span.line, "file", f"cannot be read any more ({error.strerror}); it was at {span.path}"
        ) from error
    for number, raw in enumerate(lines, start=span.line):
        if raw.strip():
            try:
                yield number, parse_record(raw, span.file, number)
            except DataError as error:
                yield number, error


def _line_spans(path: Path, name: str) -> tuple[list[Span], str, set[str]]:
    """Chunks that end at line ends, after `CHUNK_ROWS` lines or `CHUNK_BYTES`, whichever comes first; hash and domains."""
    digest = hashlib.sha256()
    spans: list[Span] = []
    start = position = lines = 0
    first = 1
    blank, last, edge = True, b"", b""
    domains: set[bytes] = set()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            blank, last = blank and not block.strip(), block[-1:]
            domains.update(_DOMAIN.findall(edge + block[:200]))
            domains.update(_DOMAIN.findall(block))
            edge, at = block[-200:], 0
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
    names = {name for raw in domains if (name := _as_text(raw))}
    return ([] if blank else spans), digest.hexdigest(), names


def _as_text(raw: bytes) -> str | None:
    """A JSON string's text; None if it is none."""
    try:
        return json.loads(b'"' + raw + b'"')
    except ValueError:
        return None


def _parquet_spans(path: Path, name: str, target: Path) -> tuple[list[Span], set[str]]:
    """Chunks and domains. Files in large row groups, which can only be read whole, are written anew in small ones first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    domains: set[str] = set()
    try:
        with pq.ParquetFile(path) as file:
            rows = file.metadata.num_rows
            groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
            if any(one.num_rows > 4 * CHUNK_ROWS or one.total_byte_size > 4 * CHUNK_BYTES for one in groups):
                path = _regrouped(file, target)
            if "domain" in file.schema_arrow.names:
                for batch in file.iter_batches(columns=["domain"]):
                    domains.update(
                        str(one) for one in batch["domain"].unique().to_pylist() if one is not None
                    )
    except (pa.ArrowException, OSError) as error:
        if means_disk_full(error):
            raise disk_full(target) from error
        raise DataError.at(path, None, "file", f"is not a parquet file that can be read ({error})") from error
    ends = [*range(CHUNK_ROWS, rows, CHUNK_ROWS), rows] if rows else []
    starts = [0, *ends[:-1]] if ends else []
    return [
        Span(name, str(path), start, end, start + 1, end - start)
        for start, end in zip(starts, ends, strict=True)
    ], domains


def _regrouped(file: Any, target: Path) -> Path:
    """The same rows in groups of `CHUNK_ROWS`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        with _removed_on_error(part):
            with pq.ParquetWriter(part, file.schema_arrow) as writer:
                for batch in file.iter_batches(batch_size=CHUNK_ROWS):
                    writer.write_table(pa.Table.from_batches([batch]), row_group_size=CHUNK_ROWS)
            part.replace(target)
    return target


@contextmanager
def _removed_on_error(part: Path) -> Iterator[None]:
    """A file that is not finished does not stay.

    Raises:
        ArtifactError: The disk is full.
    """
    try:
        yield
    except BaseException as error:
        part.unlink(missing_ok=True)
        if means_disk_full(error):
            raise disk_full(part) from error
        raise


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
        with _removed_on_error(part):
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
