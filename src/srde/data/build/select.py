"""Which of all rows become the data set: duplicates out, domains and sources balanced, whole documents held out.

Everything here is decided by the rows' fingerprints and the settings, never by the order in which chunks were finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from srde.data.build import fingerprint as prints
from srde.data.build.chunks import Chunks
from srde.data.domains import number_domains
from srde.errors import DataError

MOST_DOMAINS = 127
"""Each token's domain is one byte."""
NEIGHBOURS = 8
"""Rows of a bucket that each row of it is compared with, besides the first."""


@dataclass(frozen=True)
class Selection:
    """The rows that were chosen, by their numbers.

    Attributes:
        train: Training rows in their final, shuffled order.
        validation: Held-out rows, the same.
        domains: int8 [rows]: the domain of every row, as a place in `domain_names`.
        domain_names: The six domains, then others by name.
        sources: int32 [rows]: the source of every row, as a place in `source_names`.
        source_names: In order of first appearance.
        exact: Row -> the earlier row that it repeats.
        near: Row -> the earlier row that it nearly repeats.
        available: Domain -> source -> rows left after duplicates, for training.
    """

    train: np.ndarray
    validation: np.ndarray
    domains: np.ndarray
    domain_names: list[str]
    sources: np.ndarray
    source_names: list[str]
    exact: dict[int, int]
    near: dict[int, int]
    available: dict[str, dict[str, int]]


def select(
    chunks: Chunks,
    *,
    per_domain: int,
    validation_fraction: float,
    threshold: float,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Selection:
    """Chooses the rows; arguments as in `BuildSettings`. `advance` is told of each of the `BANDS` that are compared.

    Raises:
        DataError: There are too many domains.
    """
    texts, answers = chunks.numbers("text"), chunks.numbers("answer")
    codes, names = chunks.codes("domain")
    numbers = number_domains(sorted(names))
    domain_names = list(numbers)
    if len(domain_names) > MOST_DOMAINS:
        raise DataError.at(
            "rows",
            None,
            "domain",
            f"there are {len(domain_names)} different ones, and at most {MOST_DOMAINS} can be told apart; is it free text?",
        )
    to_number = np.array([numbers[name] for name in names], dtype=np.int8)
    domains = to_number[codes] if len(names) else np.zeros(0, dtype=np.int8)
    sources, source_names = chunks.codes("source")

    exact = exact_duplicates(texts)
    alive = np.ones(len(chunks), dtype=bool)
    alive[list(exact)] = False
    near = near_duplicates(chunks, alive, answers, threshold, advance) if threshold <= 1 else {}
    alive[list(near)] = False

    # A hash of the text orders the rows: a shuffle that no other row can change.
    order = _mixed(texts, seed)
    held_out = _mixed(chunks.numbers("document"), seed + 1) < np.uint64(int(validation_fraction * 2**64))
    train, validation, available = [], [], {}
    for domain, name in enumerate(domain_names):
        for part, chosen, count in (
            (train, alive & ~held_out, per_domain),
            (validation, alive & held_out, round(per_domain * validation_fraction)),
        ):
            rows = np.flatnonzero(chosen & (domains == domain))
            of_source = sources[rows]
            counts = np.bincount(of_source, minlength=len(source_names))
            if part is train and len(rows):
                available[name] = {
                    source_names[place]: int(counts[place]) for place in np.flatnonzero(counts)
                }
            quotas = fair_shares(counts, count)
            by_source = np.lexsort((order[rows], of_source))
            rows, of_source = rows[by_source], of_source[by_source]
            rank = np.arange(len(rows)) - (np.cumsum(counts) - counts)[of_source]
            part.append(rows[rank < quotas[of_source]])
    return Selection(
        _shuffled(train, order),
        _shuffled(validation, order),
        domains,
        domain_names,
        sources,
        source_names,
        exact,
        near,
        available,
    )


def fair_shares(available: Sequence[int] | np.ndarray, wanted: int) -> np.ndarray:
    """How many each gives so that together they give `wanted`, as evenly as possible: small ones give all they have."""
    left = np.array(available, dtype=np.int64)
    shares = np.zeros_like(left)
    while wanted > 0 and left.any():
        open_ones = np.flatnonzero(left)
        each = max(wanted // len(open_ones), 1)
        given = np.minimum(left[open_ones], each)
        if each == 1 and given.sum() > wanted:
            given[wanted:] = 0
        shares[open_ones] += given
        left[open_ones] -= given
        wanted -= int(given.sum())
    return shares


def exact_duplicates(texts: np.ndarray) -> dict[int, int]:
    """Rows that repeat an earlier one, each with the first such."""
    _, first, inverse = np.unique(texts, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[inverse] != np.arange(len(texts)))
    return {int(row): int(first[inverse[row]]) for row in repeats}


def near_duplicates(
    chunks: Chunks,
    alive: np.ndarray,
    answers: np.ndarray,
    threshold: float,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[int, int]:
    """Rows that nearly repeat an earlier one with the same answer, each with that one.

    Candidates agree in a band of their signatures; what decides is the exact Jaccard similarity of their n-grams. In a bucket of
    many rows each is compared with the first and the `NEIGHBOURS` before it, so that templates do not cost the square.

    Questions whose known answers differ are different questions however alike they look: contrasts such as WinoGrande's twins are
    what a model is to learn from.
    """
    if not len(chunks):
        return {}
    bands = chunks.numbers("bands").reshape(len(chunks), -1)
    rows = np.flatnonzero(alive & (bands != 0).any(axis=1))
    near: dict[int, int] = {}
    gone = np.zeros(len(chunks), dtype=bool)
    compared = np.zeros(0, dtype=np.int64)
    for band in range(bands.shape[1]):
        advance(1)
        keys = _mixed(bands[rows, band], band) ^ answers[rows]  # rows with other answers are in other buckets
        sort = np.argsort(keys, kind="stable")
        ordered, keys = rows[sort], keys[sort]
        begins = (
            np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, dtype=np.int64)
        )
        first = np.repeat(begins, np.diff(np.append(begins, len(keys))))
        places = np.arange(len(keys))
        pairs = [np.stack([ordered[places > first], ordered[first[places > first]]], axis=1)]
        for lag in range(1, NEIGHBOURS + 1):
            near_enough = places - lag > first
            pairs.append(np.stack([ordered[near_enough], ordered[places[near_enough] - lag]], axis=1))
        both = np.unique(np.concatenate(pairs), axis=0)
        later, earlier = both[:, 0], both[:, 1]
        codes = later * len(chunks) + earlier
        fresh = ~gone[later] & ~gone[earlier] & ~np.isin(codes, compared)
        later, earlier = later[fresh], earlier[fresh]
        compared = np.concatenate([compared, codes[fresh]])
        for part in range(0, len(later), 4096):
            _compare(chunks, later[part : part + 4096], earlier[part : part + 4096], threshold, gone, near)
    return near


def _compare(
    chunks: Chunks,
    later: np.ndarray,
    earlier: np.ndarray,
    threshold: float,
    gone: np.ndarray,
    near: dict[int, int],
) -> None:
    both = np.unique(np.concatenate([later, earlier]))
    sets = dict(zip(both.tolist(), chunks.lists("shingles", both), strict=True))
    for one, other in zip(later.tolist(), earlier.tolist(), strict=True):
        if not gone[one] and not gone[other] and prints.jaccard(sets[one], sets[other]) >= threshold:
            gone[one] = True
            near[one] = other


def shortages(selection: Selection, per_domain: int, expected: Iterable[str]) -> Mapping[str, int]:
    """Domain -> rows missing, where there are fewer than asked for.

    Args:
        selection: The rows.
        per_domain: Rows asked for.
        expected: Domains that there should be rows of, besides those that there are.
    """
    counts = np.bincount(selection.domains[selection.train], minlength=len(selection.domain_names))
    have = dict(zip(selection.domain_names, counts.tolist(), strict=True))
    names = [*selection.available, *(name for name in sorted(expected) if name not in selection.available)]
    return {name: per_domain - have.get(name, 0) for name in names if have.get(name, 0) < per_domain}


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    values = hashes.astype(np.uint64) ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):  # MurmurHash3's finaliser
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))


def _shuffled(parts: Sequence[np.ndarray], order: np.ndarray) -> np.ndarray:
    rows = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return rows[np.argsort(order[rows], kind="stable")]
