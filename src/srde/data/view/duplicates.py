"""Exact and near duplicates among rows of data files, by the rule of `srde data build`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from srde.data.build.row_prints import answer_print, hash_rows, near_prints, text_print
from srde.data.build.select import exact_duplicates, near_duplicates
from srde.data.build.settings import BuildSettings
from srde.data.rows import Row


class Fingerprints:
    """Fingerprints of rows, gathered batch by batch; `near_duplicates` reads them as it reads a build's chunks."""

    def __init__(self) -> None:
        self._texts: list[int] = []
        self._answers: list[int] = []
        self._bands: list[np.ndarray] = []
        self._shingles: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, rows: Sequence[Row]) -> None:
        """Takes the next rows."""
        if not rows:
            return
        self._texts += [text_print(row) for row in rows]
        self._answers += [answer_print(row) for row in rows]
        bands, sets = near_prints(rows, hash_rows(rows)[0])
        self._bands.append(bands)
        self._shingles += np.split(sets.hashes, sets.offsets[1:-1])

    def numbers(self, name: str) -> np.ndarray:
        """The column `bands`, uint64 [rows, BANDS]."""
        return {"bands": np.concatenate(self._bands)}[name]

    def lists(self, name: str, rows: np.ndarray) -> list[np.ndarray]:
        """The column `shingles` of chosen rows."""
        column = {"shingles": self._shingles}[name]
        return [column[row] for row in rows.tolist()]

    def duplicates(self) -> tuple[dict[int, int], dict[int, int]]:
        """Rows that repeat an earlier one, and rows that nearly do, each with that row's number; counted from 0."""
        if not self._texts:
            return {}, {}
        exact = exact_duplicates(np.array(self._texts, dtype=np.uint64))
        alive = np.ones(len(self), dtype=bool)
        alive[list(exact)] = False
        answers = np.array(self._answers, dtype=np.uint64)
        return exact, near_duplicates(self, alive, answers, BuildSettings.near_duplicate_threshold)
