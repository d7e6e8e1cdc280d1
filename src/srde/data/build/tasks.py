"""The units of work: a chunk of a source in, a folder of its rows ready for selection out.

Each runs in a process of its own and writes its folder in one step, so that a killed build has either all of a chunk or
nothing of it. What a folder holds depends on the chunk and the settings alone.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from srde.artifacts import atomic_folder
from srde.data.build import fingerprint as prints
from srde.data.build.contamination import EvaluationIndex, Passages, passages
from srde.data.build.row_prints import answer_print, document_prints, hash_rows, near_prints, text_print
from srde.data.packed import DROPPED_FILE
from srde.data.rows import Row, try_row
from srde.data.sources.converters import CONVERTERS, Converted, MissingColumn, UnusableValue
from srde.data.sources.files import Span, read_span
from srde.data.sources.gym import PREFIX, read_gym
from srde.data.sources.registry import Source
from srde.data.tokenize import encode_rows
from srde.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_FILE = "rows.arrow"
COUNTS_FILE = "counts.json"
PASSAGES_FILE = "passages.npz"

_BLANK_START = re.compile(r"\A(?:[^\S\n]*\n)+")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ufeff]")
SCHEMA = pa.schema(
    [
        ("json", pa.large_string()),  # the row as a line of data.jsonl
        ("id", pa.string()),
        ("domain", pa.dictionary(pa.int32(), pa.string())),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("input_ids", pa.large_list(pa.int32())),
        ("prompt_length", pa.int32()),
        ("text", pa.uint64()),  # hashes: the whole text, the answer, the document it belongs to
        ("answer", pa.uint64()),
        ("document", pa.uint64()),
        ("bands", pa.list_(pa.uint64(), prints.BANDS)),  # all zero where near duplicates may stay
        ("shingles", pa.large_list(pa.uint32())),
    ]
)
"""What a chunk's rows are kept as until the selection."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of a source.

    Attributes:
        source: Where it is from.
        span: Which records.
        folder: Where the result goes.
        size: Rows of a gym task in all.
    """

    source: Source
    span: Span
    folder: str
    size: int = 0


@dataclass(frozen=True)
class Rules:
    """The settings that decide on a row by itself."""

    seed: int
    max_length: int
    domains: tuple[str, ...] | None
    licenses: tuple[str, ...] | None
    ngram: int
    overlap: float
    skip_bad_rows: bool


class Dropped(Exception):
    """A row that is left out, for a reason that is no defect."""


def records(chunk: Chunk, seed: int) -> Iterator[tuple[int, Row | DataError | Dropped]]:
    """The rows of a chunk with their lines; in the place of one that cannot be used, the reason.

    Raises:
        DataError: A column is missing: the source has changed, or its entry is wrong.
    """
    source, span = chunk.source, chunk.span
    gym = span.file.startswith(PREFIX)
    for line, record in read_gym(span, seed, chunk.size, source.settings) if gym else read_span(span):
        if isinstance(record, DataError):
            yield line, record
        elif source.converter is None and not gym:
            row = try_row(record, span.file, line)
            yield line, row if isinstance(row, DataError) else _labelled(row, source, span, line)
        else:
            yield line, _convert(record, source, span, line)


def _convert(record: dict[str, Any], source: Source, span: Span, line: int) -> Row | DataError | Dropped:
    name = source.converter or "columns"
    fields = source.fields or (
        {"prompt": "question", "response": "answer", "answer": "answer", "id": "id"} if source.gym else {}
    )
    try:
        made = CONVERTERS[name](record, fields)
    except MissingColumn as error:
        raise DataError.at(
            f"source {source.name}",
            None,
            error.column,
            f"there is no such column in {source.place}; it has {', '.join(error.found)}. Either the data set has changed its "
            "columns or the entry names them wrongly: give an entry of your own with other `fields`",
        ) from error
    except UnusableValue as error:
        return DataError.at(span.file, line, error.column, error.rule)
    if made is None:
        return Dropped("no answer")
    row = try_row(_as_record(made), span.file, line)
    return row if isinstance(row, DataError) else _labelled(row, source, span, line, made)


def _as_record(made: Converted) -> dict[str, Any]:
    given = {"answer": made.answer, "kind": made.kind, "document": made.document, "id": made.id}
    record = {name: value for name, value in given.items() if value not in (None, "")}
    if isinstance(made.prompt, str):
        return record | {"prompt": made.prompt, "response": made.response}
    return record | {"messages": [*made.prompt, {"role": "assistant", "content": made.response}]}


def _labelled(
    row: Row, source: Source, span: Span, line: int, made: Converted | None = None
) -> Row | DataError:
    """The row with what its source says where the row itself is silent."""
    domain = row.domain or source.domain
    if domain is None:
        return DataError.at(
            span.file,
            line,
            "domain",
            f"is missing, and source {source.name} names none; add it to the rows, or to the source's YAML entry",
        )
    name = row.source or source.name
    own = (
        f"{name}/{span.file}:{line}"
        if row.id is None
        else row.id
        if row.id.startswith(f"{name}/")
        else f"{name}/{row.id}"
    )
    return replace(
        row,
        domain=domain,
        source=name,
        id=own,
        license=row.license or source.license or "unknown",
        kind=row.kind or source.kind,
        metadata=dict(made.metadata or {}) if made else row.metadata,
    )


def clean(row: Row) -> Row:
    """The row with Unicode's NFC, Unix line ends, no control characters, no blank lines before and no blanks after its texts.

    Raises:
        Dropped: Nothing is left of the prompt or the response, or a text holds U+FFFD: it was decoded wrongly.
    """

    def tidy(text: str) -> str:
        text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).rstrip()
        text = _BLANK_START.sub("", text)  # blank lines, not the indentation of the first one
        return text if text.isascii() else unicodedata.normalize("NFC", text)

    prompt = [{**turn, "content": tidy(turn["content"])} for turn in row.prompt]
    response = tidy(row.response)
    if not response or not all(turn["content"] for turn in prompt):
        raise Dropped("empty")
    if "\ufffd" in response or any("\ufffd" in turn["content"] for turn in prompt):
        raise Dropped("garbled")
    document = tidy(row.document) if row.document else None  # as it stands in the prompt
    return replace(row, prompt=prompt, response=response, document=document)


def make_passages(chunk: Chunk, rules: Rules) -> None:
    """Writes the passages of a chunk of evaluation rows, and the rows' names."""
    rows: list[Row] = []
    for _, row in records(chunk, rules.seed):
        if isinstance(row, Row):
            rows.append(row)
        elif isinstance(row, DataError) and not rules.skip_bad_rows:
            raise row
    with atomic_folder(chunk.folder) as folder:
        arrays = passages(rows, rules.ngram)._asdict() if rows else {}
        np.savez(folder / PASSAGES_FILE, **arrays)
        (folder / "names.json").write_text(json.dumps([f"{chunk.source.name}: {row.id}" for row in rows]))


def read_passages(folder: Path) -> tuple[Passages | None, list[str]]:
    """What `make_passages` wrote; None for a chunk without rows."""
    names = json.loads((folder / "names.json").read_text())
    with np.load(folder / PASSAGES_FILE) as arrays:
        return (Passages(**arrays) if names else None), names


def make_rows(
    chunk: Chunk, rules: Rules, tokenizer: PreTrainedTokenizerBase, index: EvaluationIndex | None
) -> None:
    """Writes the rows of a chunk that stand by themselves, cleaned, short enough and in no evaluation set, with their ids.

    Raises:
        DataError: A row breaks a rule and bad rows are not to be skipped.
    """
    counts: Counter[str] = Counter()
    dropped: list[dict[str, Any]] = []
    rows: list[Row] = []

    def drop(line: int, row_id: str | None, reason: str, detail: str | None = None) -> None:
        counts[reason] += 1
        entry = {"source": chunk.source.name, "id": row_id or f"{chunk.span.file}:{line}", "reason": reason}
        dropped.append(entry | ({"detail": detail} if detail else {}))

    for line, row in records(chunk, rules.seed):
        counts["read"] += 1
        if isinstance(row, DataError):
            if not rules.skip_bad_rows:
                raise row
            drop(line, None, "bad row", str(row))
        elif isinstance(row, Dropped):
            drop(line, None, str(row))
        elif rules.domains is not None and row.domain not in rules.domains:
            counts["other domain"] += 1
        elif rules.licenses is not None and (row.license or "").lower() not in rules.licenses:
            counts["other licence"] += 1
        else:
            try:
                rows.append(clean(row))
            except Dropped as reason:
                drop(line, row.id, str(reason))
    kept: list[tuple[Row, list[int], int]] = []
    for row, encoded in zip(rows, encode_rows(tokenizer, rows), strict=True):
        if isinstance(encoded, DataError):
            if not rules.skip_bad_rows:
                raise encoded
            drop(row.line, row.id, "bad row", str(encoded))
        elif len(encoded.input_ids) > rules.max_length:
            drop(row.line, row.id, "too long", f"{len(encoded.input_ids)} tokens")
        else:
            kept.append((row, encoded.input_ids, encoded.prompt_length))
    table = _table(chunk.source, kept, rules, index, drop)
    with atomic_folder(chunk.folder) as folder:
        with pa.OSFile(str(folder / ROWS_FILE), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(table)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in dropped]
        (folder / DROPPED_FILE).write_text("".join(lines), encoding="utf-8")
        (folder / COUNTS_FILE).write_text(json.dumps(counts, sort_keys=True))


def _table(
    source: Source,
    kept: list[tuple[Row, list[int], int]],
    rules: Rules,
    index: EvaluationIndex | None,
    drop: Any,
) -> pa.Table:
    """The rows as a table, less those that hold an evaluation question."""
    ngrams, prompts = hash_rows([row for row, *_ in kept])
    chosen = np.arange(len(kept))
    if index is not None and kept:
        found = index.find(ngrams, prompts, rules.overlap)
        for place in np.flatnonzero(found >= 0):
            row = kept[place][0]
            drop(row.line, row.id, "contaminated", index.names[found[place]])
        chosen = np.flatnonzero(found < 0)
    rows = [kept[place][0] for place in chosen]
    documents = document_prints([row for row, *_ in kept])
    if source.near_duplicates:
        bands, sets = near_prints([row for row, *_ in kept], ngrams)
        bands = bands[chosen]
        shingles = [sets.hashes[sets.offsets[place] : sets.offsets[place + 1]] for place in chosen]
    else:
        bands = np.zeros((len(rows), prints.BANDS), dtype=np.uint64)
        shingles = [np.zeros(0, dtype=np.uint32)] * len(rows)
    ids = [kept[place][1] for place in chosen]
    texts = np.array([text_print(row) for row in rows], dtype=np.uint64)
    # What stays on one side of a split: the passage, else the question, else the row itself.
    sides = np.where(documents, documents, prompts)[chosen]
    return pa.table(
        {
            "json": [as_line(row) for row in rows],
            "id": [row.id for row in rows],
            "domain": pa.array([row.domain for row in rows], pa.string()).dictionary_encode(),
            "source": pa.array([row.source for row in rows], pa.string()).dictionary_encode(),
            "input_ids": _lists(ids, np.int32),
            "prompt_length": np.array([kept[place][2] for place in chosen], dtype=np.int32),
            "text": texts,
            "answer": np.array([answer_print(row) for row in rows], dtype=np.uint64),
            "document": np.where(sides, sides, texts),
            "bands": pa.FixedSizeListArray.from_arrays(pa.array(bands.reshape(-1)), prints.BANDS),
            "shingles": _lists(shingles, np.uint32),
        },
        schema=SCHEMA,
    )


def _lists(values: list[Any], dtype: Any) -> pa.LargeListArray:
    offsets = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in values], out=offsets[1:])
    flat = np.zeros(offsets[-1], dtype=dtype)
    for place, one in enumerate(values):
        flat[offsets[place] : offsets[place + 1]] = one
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))


def as_line(row: Row) -> str:
    """The row as a line of JSONL that `read_rows` reads back."""
    if row.prompt:
        content: dict[str, Any] = {"messages": [*row.prompt, {"role": "assistant", "content": row.response}]}
    else:
        content = {"text": row.response}
    for name in ("domain", "source", "license", "id", "kind", "answer"):
        value = getattr(row, name)
        if value is not None:  # a column of one type loads everywhere
            content[name] = str(value) if isinstance(value, int | float) else value
    if row.document:  # its name is enough: the text stands in the prompt
        content["document"] = f"{prints.text_hash(row.document):016x}"
    if row.metadata:
        content["metadata"] = row.metadata
    return json.dumps(content, ensure_ascii=False, default=str)
