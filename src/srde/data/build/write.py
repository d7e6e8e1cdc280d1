"""Writes the chosen rows: JSONL for people, packed token shards for training.

A split of the packed set is a folder that `datasets.load_from_disk` opens too; see `srde.data.packed`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from srde.artifacts.disk import flush, means_disk_full
from srde.artifacts.folder import disk_full
from srde.data.build.chunks import Chunks
from srde.data.pack import pack_lengths
from srde.data.packed import COLUMNS, SHARD_ROWS
from srde.data.tokenize import IGNORE

_FEATURES = {
    name: {"feature": {"dtype": kind, "_type": "Value"}, "_type": "List"} for name, kind in COLUMNS.items()
}
_BLOCK = 20_000  # rows of JSONL gathered at once

Advance = Callable[[int], None]


def write_split(
    folder: Path,
    chunks: Chunks,
    rows: np.ndarray,
    domains: np.ndarray,
    sources: np.ndarray,
    max_length: int,
    advance: Advance,
) -> dict[str, Any]:
    """Packs rows and writes them as shards.

    Args:
        folder: The split's folder; it must not exist.
        chunks: Where the rows are.
        rows: The chosen ones, in order.
        domains: Domain of every row of `chunks`.
        sources: Source of every row of `chunks`.
        max_length: Tokens per packed row.
        advance: Told how many examples have been written.

    Returns:
        Counts: packed rows, examples, tokens, trained tokens, and the share of the rows' length that is filled.
    """
    folder.mkdir()
    packed = pack_lengths(chunks.lengths()[rows].tolist(), max_length=max_length)
    prompts = chunks.numbers("prompt_length")
    count = max(-(-len(packed) // SHARD_ROWS), 1)
    schema = pa.schema(
        [(name, pa.list_(pa.type_for_alias(kind))) for name, kind in COLUMNS.items()],
        metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
    )
    files, tokens, trained = [], 0, 0
    fingerprint = (
        xxhash.xxh3_64()
    )  # of the content: `datasets` takes equal ones for the same data and reuses what it has cached
    for shard in range(count):
        own = packed[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        chosen = rows[np.array([place for row in own for place in row], dtype=np.int64)]
        sizes = np.array([len(row) for row in own], dtype=np.int64)
        table, used = _table(schema, chunks, chosen, sizes, prompts[chosen], domains[chosen], sources[chosen])
        tokens, trained = tokens + table[1], trained + used
        for column in (table[0]["input_ids"], table[0]["lengths"]):
            fingerprint.update(column.chunk(0).values.to_numpy())
        file = folder / f"data-{shard:05d}-of-{count:05d}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in table[0].to_batches(max_chunksize=256):
                writer.write_batch(batch)
        files.append({"filename": file.name})
        advance(len(chosen))
    _write_json(folder / "dataset_info.json", {"features": _FEATURES})
    state = {
        "_data_files": files,
        "_fingerprint": fingerprint.hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    _write_json(folder / "state.json", state)
    return {
        "rows": len(packed),
        "examples": len(rows),
        "tokens": tokens,
        "trained_tokens": trained,
        "filled": round(tokens / max(len(packed) * max_length, 1), 4),
    }


def _table(
    schema: pa.Schema,
    chunks: Chunks,
    chosen: np.ndarray,
    sizes: np.ndarray,
    prompts: np.ndarray,
    domains: np.ndarray,
    sources: np.ndarray,
) -> tuple[tuple[pa.Table, int], int]:
    """One shard; its tokens, and how many of them are trained."""
    ids = chunks.lists("input_ids", chosen)
    lengths = np.array([len(one) for one in ids], dtype=np.int32)
    flat = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
    del ids
    starts = np.cumsum(lengths) - lengths
    positions = (np.arange(len(flat)) - np.repeat(starts, lengths)).astype(np.int32)
    given = positions < np.repeat(
        np.maximum(prompts, 1), lengths
    )  # the first token has nothing to be predicted from
    labels = np.where(given, np.int32(IGNORE), flat)
    examples = np.concatenate([[0], np.cumsum(sizes)])
    tokens = np.concatenate([[0], np.cumsum(lengths)])[examples]

    def lists(values: np.ndarray, offsets: np.ndarray, kind: pa.DataType) -> pa.ListArray:
        return pa.ListArray.from_arrays(
            pa.array(offsets.astype(np.int32)), pa.array(values.astype(kind.to_pandas_dtype(), copy=False))
        )

    columns = {
        "input_ids": (flat, tokens),
        "labels": (labels, tokens),
        "position_ids": (positions, tokens),
        "domain_ids": (np.repeat(domains, lengths), tokens),
        "lengths": (lengths, examples),
        "domains": (domains, examples),
        "sources": (sources, examples),
    }
    arrays = [lists(*columns[field.name], field.type.value_type) for field in schema]
    return (pa.Table.from_arrays(arrays, schema=schema), len(flat)), int((~given).sum())


def write_jsonl(path: Path, chunks: Chunks, rows: np.ndarray) -> None:
    """Writes chosen rows, one a line, in one step."""

    def lines() -> Iterator[str]:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            yield "".join(line + "\n" for line in chunks.texts("json", block))

    write_text(path, lines())


def write_text(path: Path, parts: Iterator[str]) -> None:
    """Writes a file that appears whole or not at all.

    Raises:
        ArtifactError: The disk is full.
    """
    part = path.parent / f".tmp-{path.name}"
    try:
        with part.open("w", encoding="utf-8", newline="\n") as sink:
            sink.writelines(parts)
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        if means_disk_full(error):
            raise disk_full(path) from error
        raise


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
