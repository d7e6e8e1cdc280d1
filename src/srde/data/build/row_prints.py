"""Fingerprints of rows: which numbers must agree for two rows to be the same, nearly the same, or of one document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from srde.data.build import fingerprint as prints
from srde.data.rows import Row


def prompt_text(row: Row) -> str:
    """All that stands before the response."""
    return "\n".join(turn["content"] for turn in row.prompt)


def hash_rows(rows: Sequence[Row]) -> tuple[prints.NGrams, np.ndarray]:
    """The n-grams of rows, prompt and response together, and the n-gram of each whole prompt (0 for plain text)."""
    pieces = prints.hash_words([piece for row in rows for piece in (prompt_text(row), row.response)])
    ngrams = prints.NGrams(prints.Words(pieces.hashes, pieces.offsets[::2]))
    return ngrams, ngrams.whole(pieces.offsets[:-1:2], pieces.offsets[1::2])


def text_print(row: Row) -> int:
    """Stands for the whole text, blanks aside; case and punctuation count, as they do in code."""
    return prints.text_hash(" ".join(f"{prompt_text(row)}\n{row.response}".split()))


def answer_print(row: Row) -> int:
    """Stands for the known answer; 0 without one."""
    return prints.text_hash(" ".join(str(row.answer).lower().split())) if row.answer is not None else 0


def document_prints(rows: Sequence[Row]) -> np.ndarray:
    """Stand for the document that each row belongs to, uint64 [rows]; 0 for none."""
    return np.array([prints.text_hash(row.document) if row.document else 0 for row in rows], dtype=np.uint64)


def near_prints(rows: Sequence[Row], ngrams: prints.NGrams) -> tuple[np.ndarray, prints.Words]:
    """What near duplicates are found by.

    Questions on one passage are alike for the passage's sake: they are compared among themselves, by what is their own.

    Args:
        rows: The rows.
        ngrams: Theirs, as `hash_rows` gives them.

    Returns:
        Keys of the bands, uint64 [rows, BANDS], and the sets of n-grams.
    """
    documents = document_prints(rows)
    if documents.any():
        ngrams = hash_rows([_without_document(row) for row in rows])[0]
    sets = prints.shingles(ngrams, documents)
    return prints.band_keys(sets), sets


def _without_document(row: Row) -> Row:
    if not row.document:
        return row
    prompt = [{**turn, "content": turn["content"].replace(row.document, "")} for turn in row.prompt]
    return replace(row, prompt=prompt)
