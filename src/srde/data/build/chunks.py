"""Reads the finished chunks back: whole columns as arrays, or chosen rows of a column, never all rows at once.

A chunk's file is mapped into memory while something is copied out of it and unmapped at once, so that the pages of a large
data set do not add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from srde.artifacts import verify
from srde.data.build.tasks import ROWS_FILE, SCHEMA
from srde.errors import ArtifactError


class Chunks:
    """The rows of several chunks, numbered through in the order given.

    Args:
        folders: Finished chunks.

    Raises:
        ArtifactError: A chunk is damaged.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.files = [verify(folder).folder / ROWS_FILE for folder in folders]
        sizes = []
        for file in self.files:
            with pa.memory_map(str(file)) as source:
                reader = pa.ipc.open_file(source)
                if reader.schema != SCHEMA:
                    raise ArtifactError.of(
                        "chunk",
                        str(file.parent),
                        rule="it was made by another version of srde",
                        fix="delete the folder, build again",
                    )
                sizes.append(
                    sum(reader.get_batch(place).num_rows for place in range(reader.num_record_batches))
                )
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, or one row of numbers per row for `bands`."""
        parts = []
        for table in self._tables(name):
            column = table[name].combine_chunks()
            if pa.types.is_fixed_size_list(column.type):
                parts.append(
                    column.flatten()
                    .to_numpy(zero_copy_only=False)
                    .reshape(len(column), column.type.list_size)
                    .copy()
                )
            else:
                parts.append(column.to_numpy(zero_copy_only=False).copy())
            del column, table
        return np.concatenate(parts) if parts else np.zeros(0)

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        parts = [
            pc.list_value_length(table["input_ids"].combine_chunks())
            .to_numpy(zero_copy_only=False)
            .astype(np.int32)
            for table in self._tables("input_ids")
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column of few texts as numbers, and the texts in order of first appearance."""
        values: dict[str, int] = {}
        parts = []
        for table in self._tables(name):
            for chunk in table[name].chunks:
                own = [values.setdefault(value, len(values)) for value in chunk.dictionary.to_pylist()]
                parts.append(np.array(own, dtype=np.int32)[chunk.indices.to_numpy(zero_copy_only=False)])
        return (np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)), list(values)

    def texts(self, name: str, rows: np.ndarray) -> list[str]:
        """Chosen rows of a column of texts, in the order asked for."""
        found: list[str] = [""] * len(rows)
        for table, places, within in self._gather(name, rows):
            for place, value in zip(places, table[name].take(pa.array(within)).to_pylist(), strict=True):
                found[place] = value
        return found

    def lists(self, name: str, rows: np.ndarray) -> list[np.ndarray]:
        """Chosen rows of a column of lists of numbers, in the order asked for; copies."""
        found: list[np.ndarray] = [np.zeros(0)] * len(rows)
        for table, places, within in self._gather(name, rows):
            column = table[name].combine_chunks()
            offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
            for place, row in zip(places, within, strict=True):
                found[place] = values[offsets[row] : offsets[row + 1]].copy()
            del column, offsets, values
        return found

    def _gather(self, name: str, rows: np.ndarray):
        order = np.argsort(rows, kind="stable")
        of_chunk = np.searchsorted(self.starts, rows[order], side="right") - 1
        borders = np.flatnonzero(np.diff(of_chunk, prepend=-1, append=-1))
        for start, end in itertools.pairwise(borders):
            chunk = of_chunk[start]
            places = order[start:end]
            yield self._table(self.files[chunk], name), places, rows[places] - self.starts[chunk]

    def _tables(self, name: str):
        for file in self.files:
            yield self._table(file, name)

    @staticmethod
    def _table(file: Path, name: str) -> pa.Table:
        options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name)])
        return pa.ipc.open_file(pa.memory_map(str(file)), options=options).read_all()
