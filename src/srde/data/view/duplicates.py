"""Exact and near duplicates among rows of data files, by the rule of `srde data build`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from srde.data.build import fingerprint as prints
from srde.data.build.contamination import hash_rows
from srde.data.build.select import exact_duplicates, near_duplicates
from srde.data.build.settings import BuildSettings
from srde.data.rows import Row
from srde.data.view.reading import same_text


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
        self._texts += [same_text(row) for row in rows]
        self._answers += [_answer(row) for row in rows]
        # Questions on one passage are alike for the passage's sake: compared among themselves, by what is their own.
        salts = np.array(
            [prints.text_hash(row.document) if row.document else 0 for row in rows], dtype=np.uint64
        )
        sets = prints.shingles(hash_rows([_without_document(row) for row in rows])[0], salts)
        self._bands.append(prints.band_keys(sets))
        self._shingles += [part.astype(np.uint32) for part in np.split(sets.hashes, sets.offsets[1:-1])]

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


def _answer(row: Row) -> int:
    return prints.text_hash(" ".join(str(row.answer).lower().split())) if row.answer is not None else 0


def _without_document(row: Row) -> Row:
    if not row.document:
        return row
    prompt = [{**turn, "content": turn["content"].replace(row.document, "")} for turn in row.prompt]
    return replace(row, prompt=prompt)
