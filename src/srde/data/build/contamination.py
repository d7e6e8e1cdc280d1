"""Finds training rows that hold a question of an evaluation set.

What gives a question away are its **passages**: the question as a whole, its reference answer, and each line that makes up a
quarter of it or more. A row is contaminated if it has at least `overlap` (0.5) of the word n-grams of one passage, where n is 13
(as for GPT-3: Brown et al. 2020, appendix C) or, for a shorter passage, its whole length. One shared 13-gram alone says little:
on templated puzzles it condemns rows of quite other questions.

Too short or too uniform passages count only where they are a row's whole prompt: questions below 5 words, lines below 8, answers
below 13, and all with fewer than 5 different words. N-grams that stand in more than 8 questions are boilerplate ("Answer
with the letter of the correct option") and do not count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from srde.data.build.fingerprint import NGrams, hash_words
from srde.data.build.row_prints import hash_rows, prompt_text
from srde.data.rows import Row

MIN_QUESTION = 5
MIN_LINE = 8
MIN_DIFFERENT = 5
LINE_SHARE = 0.25
COMMON = 8
WHOLE = 0
"""In the place of a width: the n-gram of a whole prompt."""

_FILTER_BITS = 22


class Passages(NamedTuple):
    """The passages of some evaluation rows, and their n-grams.

    Attributes:
        questions: int32 [passages]: the row, as a place in the rows.
        telling: bool [passages]: False for lines that only serve to tell what is boilerplate.
        widths: int32 [n-grams]: words in the n-gram, or `WHOLE`.
        hashes: uint64 [n-grams].
        owners: int32 [n-grams]: the passage, as a place in `questions`.
    """

    questions: np.ndarray
    telling: np.ndarray
    widths: np.ndarray
    hashes: np.ndarray
    owners: np.ndarray


def passages(rows: Sequence[Row], width: int) -> Passages:
    """The passages of evaluation rows, with n-grams of `width` words."""
    texts: list[str] = []
    questions: list[int] = []
    least: list[int] = []
    weighty: list[bool] = []
    for place, row in enumerate(rows):
        prompt = prompt_text(row) or row.response
        length = len(prompt)
        found = [(prompt, MIN_QUESTION, True), *([(row.response, width, True)] if row.prompt else [])]
        lines = prompt.split("\n")
        if len(lines) > 1:  # by characters: words need not be told apart for a rough share
            found += [(line, MIN_LINE, len(line) >= LINE_SHARE * length) for line in lines]
        texts += [text for text, *_ in found]
        least += [words for _, words, _ in found]
        weighty += [share for *_, share in found]
        questions += [place] * len(found)
    batch = hash_words(texts)
    sizes = np.diff(batch.offsets)
    different = np.array(
        [
            len(np.unique(batch.hashes[a:b]))
            for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        ],
        dtype=np.int64,
    )
    long_enough = (sizes >= np.array(least, dtype=np.int64)) & (different >= MIN_DIFFERENT)
    ngrams = NGrams(batch)
    windows, whole = ngrams.windows(width), ngrams.whole(batch.offsets[:-1], batch.offsets[1:])
    owners = np.repeat(np.arange(len(texts)), np.diff(windows.offsets))
    long, short = long_enough[owners], long_enough & (sizes < width)
    prompts, first = hash_rows(rows)[1], len(texts)
    asked = np.flatnonzero(prompts)
    return Passages(
        np.array([*questions, *asked], dtype=np.int32),
        np.array([*weighty, *([True] * len(asked))], dtype=bool),
        np.concatenate([np.full(long.sum(), width), sizes[short], np.full(len(asked), WHOLE)]).astype(
            np.int32
        ),
        np.concatenate([windows.hashes[long], whole[short], prompts[asked]]),
        np.concatenate([owners[long], np.flatnonzero(short), first + np.arange(len(asked))]).astype(np.int32),
    )


class _Table(NamedTuple):
    """The n-grams of one width: `hashes` sorted; those of place i belong to the passages ``owners[starts[i]:starts[i + 1]]``."""

    hashes: np.ndarray
    starts: np.ndarray
    owners: np.ndarray


class EvaluationIndex:
    """All n-grams of all evaluation questions, to be looked up.

    Attributes:
        names: The questions: ``source:id``.
        questions: int32 [passages]: the question of each passage.
        sizes: int64 [passages]: its different n-grams, less the boilerplate.
        tables: By width.
    """

    def __init__(
        self, names: Sequence[str], questions: np.ndarray, sizes: np.ndarray, tables: dict[int, _Table]
    ) -> None:
        self.names, self.questions, self.sizes, self.tables = names, questions, sizes, tables
        self._filters = {width: _filter(table.hashes) for width, table in tables.items()}

    @classmethod
    def of(cls, names: Sequence[str], found: Passages) -> EvaluationIndex:
        """Builds the index of all evaluation rows' passages; `names` has one entry per row."""
        tables = {}
        # The same question asked twice is one question: else its n-grams would soon count as boilerplate.
        whole = found.widths == WHOLE
        _, same = np.unique(found.hashes[whole], return_inverse=True)
        distinct = np.arange(len(names)) + len(same)
        distinct[found.questions[found.owners[whole]]] = same
        sizes = np.zeros(len(found.questions), dtype=np.int64)
        for width in np.unique(found.widths):
            chosen = found.widths == width
            pairs = np.unique(
                np.stack([found.hashes[chosen], found.owners[chosen].astype(np.uint64)], axis=1), axis=0
            )
            hashes, starts, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
            owners = pairs[:, 1].astype(np.int32)
            if width != WHOLE:
                keys = np.repeat(np.arange(len(hashes)), counts)
                asked = np.unique(np.stack([keys, distinct[found.questions[owners]]], axis=1), axis=0)[:, 0]
                rare = np.bincount(asked, minlength=len(hashes)) <= COMMON
                stays = rare[keys] & found.telling[owners]
                counts = np.bincount(keys[stays], minlength=len(hashes))
                owners, hashes, counts = owners[stays], hashes[counts > 0], counts[counts > 0]
                starts = np.cumsum(counts) - counts
            sizes += np.bincount(owners, minlength=len(sizes))
            if len(hashes):
                tables[int(width)] = _Table(hashes, np.append(starts, len(owners)).astype(np.int64), owners)
        return cls(names, found.questions, sizes, tables)

    def find(self, ngrams: NGrams, prompts: np.ndarray, overlap: float) -> np.ndarray:
        """For each row the number of the evaluation question that it holds, or -1. Rows as `hash_rows` gives them."""
        rows, owners = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        ends = ngrams.batch.offsets[1:]
        for width, table in self.tables.items():
            hashes = prompts if width == WHOLE else ngrams.anywhere(width)
            places = np.flatnonzero(self._filters[width][hashes >> np.uint64(64 - _FILTER_BITS)])
            at = np.minimum(np.searchsorted(table.hashes, hashes[places]), len(table.hashes) - 1)
            hits = table.hashes[at] == hashes[places]
            places, at = places[hits], at[hits]
            of_row = places if width == WHOLE else np.searchsorted(ends, places, side="right")
            if width != WHOLE:  # an n-gram that runs into the next row is none
                inside = places + width <= ends[of_row]
                of_row, at = of_row[inside], at[inside]
            pairs = np.unique(np.stack([of_row, at], axis=1), axis=0)
            counts = table.starts[pairs[:, 1] + 1] - table.starts[pairs[:, 1]]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            rows.append(np.repeat(pairs[:, 0], counts))
            owners.append(table.owners[np.repeat(table.starts[pairs[:, 1]], counts) + within])
        both, shared = np.unique(
            np.stack([np.concatenate(rows), np.concatenate(owners)], axis=1), axis=0, return_counts=True
        )
        share = shared / self.sizes[both[:, 1]]
        enough = share >= overlap
        both, share = both[enough], share[enough]
        found = np.full(len(prompts), -1, dtype=np.int64)
        order = np.argsort(share, kind="stable")  # the largest share is assigned last and stays
        found[both[order, 0]] = self.questions[both[order, 1]]
        return found

    def save(self, folder: Path) -> None:
        """Writes arrays and names; `load` maps the arrays into memory."""
        (folder / "names.json").write_text(json.dumps(list(self.names)), encoding="utf-8")
        np.save(folder / "questions.npy", self.questions)
        np.save(folder / "sizes.npy", self.sizes)
        for width, table in self.tables.items():
            for name, values in table._asdict().items():
                np.save(folder / f"{name}-{width}.npy", values)

    @classmethod
    def load(cls, folder: Path) -> EvaluationIndex:
        """Reads what `save` wrote."""

        def array(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        widths = sorted(int(file.stem.partition("-")[2]) for file in folder.glob("hashes-*.npy"))
        tables = {width: _Table(*(array(f"{name}-{width}") for name in _Table._fields)) for width in widths}
        names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        return cls(names, array("questions"), array("sizes"), tables)


def merge_passages(parts: Sequence[Passages], rows: Sequence[int]) -> Passages:
    """One of several; `rows` says how many rows each part was made of."""
    first_row = np.cumsum([0, *rows])
    first_passage = np.cumsum([0, *(len(part.questions) for part in parts)])
    return Passages(
        np.concatenate([part.questions + first_row[place] for place, part in enumerate(parts)]),
        np.concatenate([part.telling for part in parts]),
        np.concatenate([part.widths for part in parts]),
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.owners + first_passage[place] for place, part in enumerate(parts)]),
    )


def _filter(hashes: np.ndarray) -> np.ndarray:
    """Which leading bits occur at all: most lookups end here."""
    table = np.zeros(1 << _FILTER_BITS, dtype=bool)
    table[hashes >> np.uint64(64 - _FILTER_BITS)] = True
    return table
