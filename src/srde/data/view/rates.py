"""How many rows repeat another one or hold an evaluation question: by domain and by source, of data files and of built sets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LEAK = "contaminated"
REPEATS = (
    "A duplicate counts where it stands itself; the row that it repeats may be of another domain or source."
)
LEAKS = "Leaks are rows that hold an evaluation question."
NOT_COMPARED = "The rows were not compared with evaluation questions, so that the columns of leaks are empty."
BUILT = "Duplicates are of the rows that were left after all other checks; leaks of these rows and the leaking ones together."
BY_SOURCE = "A leaking row counts to the domain that all rows of its source in this set have: the build notes only its source."
UNKNOWN_DOMAIN = "Empty cells: {count} leaking row(s) may be of these domains or of others, and the build does not note of which."
UNKNOWN_SOURCE = (
    "Empty cells: {count} leaking row(s) may be of these sources or of others, and their ids do not tell."
)
NOWHERE = (
    "In no line: {count} leaking row(s), whose source has no row left and cannot be told from their ids."
)


def rates(of: int, **counts: int) -> dict[str, Any]:
    """The counts with the rate of each."""
    return {"of": of, **counts, **{f"{name}_rate": round(n / max(of, 1), 6) for name, n in counts.items()}}


def row_rates(
    names: Sequence[str],
    order: Iterable[str],
    of_X: np.ndarray,
    exact: Collection[int],
    near: Collection[int],
    leaking: Collection[int] | None,
) -> dict[str, Any]:
    """The rates of data files' rows.

    Args:
        names: Of the domains, or of the sources.
        order: The same, in the order of the result.
        of_X: Each row's domain or source, as a place in `names`.
        exact: The places of rows that repeat another one.
        near: The places of rows that nearly do.
        leaking: The places of rows that hold an evaluation question; None if that was not looked for.

    Returns:
        `by_name`, with `duplicates` and `contamination` for each name, and `notes`.
    """

    def counted(places: Collection[int]) -> np.ndarray:
        return np.bincount(of_X[np.array(sorted(places), dtype=np.int64)], minlength=len(names))

    rows, exactly, nearly = np.bincount(of_X, minlength=len(names)), counted(exact), counted(near)
    leaks = None if leaking is None else counted(leaking)
    by_name = {
        name: {
            "duplicates": rates(int(rows[place]), exact=int(exactly[place]), near=int(nearly[place])),
            "contamination": None
            if leaks is None
            else rates(int(rows[place]), contaminated=int(leaks[place])),
        }
        for name in order
        for place in [names.index(name)]
    }
    return {"by_name": by_name, "notes": [REPEATS, NOT_COMPARED if leaks is None else LEAKS]}


def set_rates(
    report: Mapping[str, Any],
    dropped: Path,
    domains_of: Mapping[str, Collection[str]],
    order: Mapping[str, Iterable[str]],
) -> dict[str, dict[str, Any]]:
    """The rates of a built set's rows, from what the build has noted.

    A row that leaks is noted with an id that begins with its source, and without its domain. Where a count cannot be told from
    that, it is None.

    Args:
        report: Of the build.
        dropped: The file of the rows that were left out.
        domains_of: The domains of each source's rows in the set.
        order: Names under `domains` and `sources` that come first, in order.

    Returns:
        `domains` and `sources`, each as `row_rates` returns it.
    """
    domains, sources = report["domains"], report["sources"]
    leaks_of = {"domains": Counter[str](), "sources": Counter[str]()}
    unknown: dict[str, set[str]] = {"domains": set(), "sources": set()}
    open_rows, nowhere = Counter[str](), 0
    for possible, count in _leaking(dropped, sources).items():
        if len(possible) == 1:
            leaks_of["sources"].update(dict.fromkeys(possible, count))
        elif possible:
            unknown["sources"] |= possible
            open_rows["sources"] += count
        else:
            nowhere += count
        # A source that has no row in the set may be of any domain.
        told = bool(possible) and all(domains_of.get(name) for name in possible)
        where = {domain for name in possible for domain in domains_of[name]} if told else set(domains)
        if told and len(where) == 1:
            leaks_of["domains"].update(dict.fromkeys(where, count))
        else:
            unknown["domains"] |= where
            open_rows["domains"] += count
    compared = bool(report["evaluation"])
    found = {}
    for kind, counts in (("domains", domains), ("sources", sources)):
        names = dict.fromkeys([*order[kind], *counts, *sorted(leaks_of[kind]), *sorted(unknown[kind])])
        by_name = {
            name: _of_set(counts.get(name), leaks_of[kind][name], name not in unknown[kind], compared)
            for name in names
        }
        notes = [REPEATS, *((LEAKS, BUILT) if compared else (NOT_COMPARED,))]
        if kind == "domains" and leaks_of[kind]:
            notes.append(BY_SOURCE)
        if unknown[kind]:
            notes.append(
                {"domains": UNKNOWN_DOMAIN, "sources": UNKNOWN_SOURCE}[kind].format(
                    count=f"{open_rows[kind]:,}"
                )
            )
        if kind == "sources" and nowhere:
            notes.append(NOWHERE.format(count=f"{nowhere:,}"))
        found[kind] = {"by_name": by_name, "notes": notes}
    return found


def _of_set(counts: Mapping[str, int] | None, leaking: int, known: bool, compared: bool) -> dict[str, Any]:
    usable, exact, near = (
        (0, 0, 0)
        if counts is None
        else (counts["usable"], counts["exact_duplicates"], counts["near_duplicates"])
    )
    leaks: dict[str, Any] | None = None
    if compared:
        leaks = (
            rates(usable + leaking, contaminated=leaking)
            if known
            else {"of": None, "contaminated": None, "contaminated_rate": None}
        )
    return {"duplicates": rates(usable, exact=exact, near=near), "contamination": leaks}


def _leaking(dropped: Path, known: Collection[str]) -> Counter[frozenset[str]]:
    """How many leaking rows may be of which sources: of one, if their ids tell so; of none where no name can be told."""
    found = Counter[frozenset[str]]()
    with dropped.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["reason"] == LEAK:
                names = list(_beginnings(entry["id"]))
                possible = [name for name in names if name in known or name == entry["source"]]
                found[frozenset(possible or (names if len(names) == 1 else []))] += 1
    return found


def _beginnings(row_id: str) -> Iterator[str]:
    """What stands before each slash of an id; one of these is the row's source."""
    place = row_id.find("/")
    while place >= 0:
        yield row_id[:place]
        place = row_id.find("/", place + 1)
