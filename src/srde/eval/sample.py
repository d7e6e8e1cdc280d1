"""Fewer rows that stand for all: the same number of each domain as far as there are so many, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from srde.data.rows import Row
from srde.eval.results import by_domain

SEED = 0


def spread(rows: Sequence[Row], count: int, seed: int = SEED) -> list[Row]:
    """Draws rows evenly from the domains; the same ones each time, in the rows' order.

    Args:
        rows: All rows.
        count: How many to keep; all of them where there are no more.
        seed: Of the draw.
    """
    groups = sorted(by_domain(rows).values(), key=len)
    kept: list[int] = []
    left = count
    for place, group in enumerate(groups):  # small domains first: what they lack, the others give
        share = min(len(group), left // (len(groups) - place))
        kept += Random(seed).sample(group, share)
        left -= share
    return [rows[i] for i in sorted(kept)]
