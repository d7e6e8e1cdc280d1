"""What the verbs that look at data share: rows of a path with errors in their places, evaluation rows, safe texts, pages."""

from __future__ import annotations

import itertools
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from srde.artifacts import MANIFEST_NAME
from srde.data.build.contamination import EvaluationIndex, hash_rows, passages
from srde.data.build.finish import OUTPUT
from srde.data.build.settings import BuildSettings
from srde.data.build.write import write_text
from srde.data.rows import Row, try_row
from srde.data.sources.files import data_files, open_file, read_span
from srde.data.tokenize import Encoded, encode_rows
from srde.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1024
"""Rows that are tokenised and compared at once."""

# What damaged files make the readers raise, besides DataError.
UNREADABLE = (
    ArithmeticError, EOFError, LookupError, MemoryError, OSError, RecursionError, TypeError, ValueError, pa.ArrowException,
    zlib.error,
)  # fmt: skip

# Control characters, halves of surrogate pairs, line separators and marks that turn the direction of writing: none of them
# may reach a terminal or a page as it is.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)

T = TypeVar("T")


def printable(text: str, keep: str = "") -> str:
    r"""The text with `\x1b` and the like in the place of characters that steer a terminal or cannot be written.

    Args:
        text: Any text.
        keep: Such characters that may stay, as a rule line breaks and tabs.
    """

    def escape(match: re.Match[str]) -> str:
        found = match.group()
        return found if found in keep else found.encode("unicode_escape").decode()

    return _UNSAFE.sub(escape, text)


def batched(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """The items in lists of `size`."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def find_set(path: str | Path) -> Path | None:
    """The packed set at a path: the path itself or, for a build's work folder, its `tokenized`. None if there is none.

    A set is known by its manifest or its shards, so that one that has lost either is still taken for a set.
    """
    path = Path(path)
    if (path / OUTPUT).is_dir():
        return path / OUTPUT
    if path.is_dir() and ((path / MANIFEST_NAME).exists() or any(path.glob("*/data-*.arrow"))):
        return path
    return None


def each_row(path: str | Path) -> Iterator[Row | DataError]:
    """All rows of the data files at a path, in order; in the place of a row or file that cannot be used, the error.

    Args:
        path: A file (`.jsonl`, `.jsonl.gz`, `.json`, `.parquet`) or a folder of them.
    """
    return (row for _, row in numbered_rows(path))


def numbered_rows(path: str | Path) -> Iterator[tuple[int, Row | DataError]]:
    """The same with the rows' lines, counted from 1 in each file; errors that mean a whole file have 0."""
    try:
        files = data_files(path)
    except DataError as error:
        yield 0, error
        return
    except UNREADABLE as error:
        yield 0, DataError.at(path, None, "file", f"cannot be read ({error})")
        return
    for file in files:
        empty = True
        with tempfile.TemporaryDirectory() as scratch:
            try:
                for span in open_file(file, str(file), Path(scratch)).spans:
                    for line, record in read_span(span):
                        empty = False
                        yield (
                            line,
                            record if isinstance(record, DataError) else try_row(record, span.file, line),
                        )
            except DataError as error:
                empty = False
                yield 0, error
            except UNREADABLE as error:
                empty = False
                yield 0, DataError.at(file, None, "file", f"cannot be read ({type(error).__name__}: {error})")
        if empty:
            yield 0, DataError.at(file, None, "file", "is empty; it must hold at least one row")


def encoded(
    tokenizer: PreTrainedTokenizerBase | None, rows: Sequence[Row]
) -> list[Encoded | DataError | None]:
    """As `encode_rows`; None for each row if there is no tokenizer."""
    return [None] * len(rows) if tokenizer is None else list(encode_rows(tokenizer, rows))


def evaluation_index(paths: Sequence[str | Path]) -> EvaluationIndex | None:
    """The index of all rows of evaluation files, named ``file:line``; None if no file is given.

    Raises:
        DataError: One of their rows breaks a rule.
    """
    rows = []
    for path in paths:
        for row in each_row(path):
            if isinstance(row, DataError):
                raise row
            rows.append(row)
    if not rows:
        return None
    names = [f"{row.file}:{row.line}" for row in rows]
    return EvaluationIndex.of(names, passages(rows, BuildSettings.decontamination_ngram))


def leaks(index: EvaluationIndex | None, rows: Sequence[Row]) -> list[str | None]:
    """For each row the evaluation question that it holds, by the rule and the defaults of `srde data build`."""
    if index is None or not rows:
        return [None] * len(rows)
    found = index.find(*hash_rows(rows), BuildSettings.decontamination_overlap)
    return [index.names[place] if place >= 0 else None for place in found.tolist()]


def write_file(path: str | Path, text: str) -> None:
    """Writes a file that appears whole or not at all.

    Raises:
        UsageError: It cannot be written there.
    """
    try:
        write_text(Path(path), iter([text]))
    except OSError as error:
        raise UsageError.of(
            "file", str(path), rule=f"it cannot be written ({error.strerror})", fix="name a file where you may write"
        ) from error  # fmt: skip
