"""Counts, lengths, duplicates and leaks of data files or a built set, as plain JSON values.

X: examples (rows of the data files), each with a domain, a source, a length and how much of it is trained.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srde.artifacts import MANIFEST_NAME
from srde.data.build.contamination import prompt_text
from srde.data.build.fingerprint import words
from srde.data.build.settings import BuildSettings
from srde.data.domains import DOMAINS
from srde.data.pack import pack_lengths
from srde.data.packed import DROPPED_FILE, REPORT_FILE
from srde.data.rows import Row
from srde.data.view.duplicates import Fingerprints
from srde.data.view.rates import rates, row_rates, set_rates
from srde.data.view.reading import batched, each_row, encoded, leaks
from srde.data.view.shards import open_set, read_shard
from srde.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from srde.data.build.contamination import EvaluationIndex
    from srde.data.tokenize import Encoded

PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}
BINS = 60
NONE = "(none)"
"""Stands for the domain or source of rows that name none."""


@dataclass(frozen=True)
class _Examples:
    domain_X: np.ndarray
    source_X: np.ndarray
    length_X: np.ndarray
    trained_X: np.ndarray
    domains: Sequence[str]
    sources: Sequence[str]


def row_stats(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    evaluation: EvaluationIndex | None = None,
) -> dict[str, Any]:
    """Statistics of data files.

    Args:
        path: A data file or a folder of them.
        tokenizer: Counts its tokens; without one, words are counted, and the response's words as trained.
        evaluation: The questions to look for in the rows.

    Returns:
        A dictionary with the keys that `set_stats` gives. Rows that cannot be used are counted in `left_out` and nowhere else.

    Raises:
        DataError: No row can be used.
    """
    names: dict[str, dict[str, int]] = {"domain": {}, "source": {}}
    places: dict[str, list[int]] = {"domain": [], "source": []}
    lengths: list[int] = []
    trained: list[int] = []
    left_out = Counter[str]()
    leaking: list[int] = []
    first: DataError | None = None
    fingerprints = Fingerprints()
    for batch in batched(each_row(path)):
        rows = []
        usable = [row for row in batch if isinstance(row, Row)]
        found = zip(usable, encoded(tokenizer, usable), strict=True)
        for defect in (row for row in batch if isinstance(row, DataError)):
            left_out["bad row"] += 1
            first = first or defect
        for row, tokens in found:
            if isinstance(tokens, DataError):
                left_out["bad row"] += 1
                first = first or tokens
                continue
            rows.append(row)
            size, own = _size(row, tokens)
            lengths.append(size)
            trained.append(own)
            for name, known in names.items():
                places[name].append(known.setdefault(getattr(row, name) or NONE, len(known)))
        fingerprints.add(rows)
        first_row = len(lengths) - len(rows)
        leaking += [
            place for place, leak in enumerate(leaks(evaluation, rows), start=first_row) if leak is not None
        ]
    if not lengths:
        raise first or DataError.at(path, None, "file", "holds no row that could be used")
    examples = _Examples(
        *(np.array(values, dtype=np.int64) for values in (*places.values(), lengths, trained)),
        *(list(known) for known in names.values()),
    )
    exact, near = fingerprints.duplicates()
    figures = _figures(examples)
    found_leaks = None if evaluation is None else leaking
    return {
        "path": str(path),
        "kind": "data files",
        "unit": "words" if tokenizer is None else "tokens",
        **figures,
        "duplicates": rates(len(lengths), exact=len(exact), near=len(near)),
        "contamination": None if evaluation is None else rates(len(lengths), contaminated=len(leaking)),
        "rates": {
            kind: row_rates(names_of, figures[kind], of_X, exact, near, found_leaks)
            for kind, names_of, of_X in (
                ("domains", examples.domains, examples.domain_X),
                ("sources", examples.sources, examples.source_X),
            )
        },
        "left_out": {
            "by_reason": dict(left_out),
            "by_entry": {},
            "read": len(lengths) + sum(left_out.values()),
        },
        "packing": {} if tokenizer is None else _packing(lengths),
    }


def _size(row: Row, tokens: Encoded | None) -> tuple[int, int]:
    if tokens is not None:
        return len(tokens.input_ids), tokens.trained_tokens
    own = len(words(row.response))
    return len(words(prompt_text(row))) + own, own


def _packing(lengths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """How full rows would be with the settings that `srde data build` has by itself."""
    longest = BuildSettings.max_length
    fitting = [length for length in lengths if length <= longest]
    count = len(pack_lengths(fitting, max_length=longest))
    filled = round(sum(fitting) / max(count * longest, 1), 4)
    name = f"if packed to {longest:,}"
    return {name: {"rows": count, "examples": len(fitting), "tokens": sum(fitting), "filled": filled}}


def set_stats(folder: Path) -> dict[str, Any]:
    """Statistics of a built set: of the training rows from its shards, of what was left out from its report.

    Args:
        folder: The packed set, with `MANIFEST.json`.

    Returns:
        `path`, `kind`, `unit` of lengths; `total`, `domains` and `sources`, each with rows, tokens, trained tokens, its share of
        the tokens, lengths and held-out rows; `histograms` by domain and by source; `duplicates` and `contamination` of all;
        `rates`, which are both by domain and by source; `left_out` and `packing`.

    Raises:
        ArtifactError: The set is damaged, or has no rows to train on.
    """
    built = open_set(folder)
    metadata = built.metadata
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("domains", "sources", "lengths", "trained")}
    held_out: list[np.ndarray] = []
    for split in ("train", "validation"):
        for shard in built.shards(split):
            for rows in read_shard(built.folder / shard):
                if split == "validation":
                    held_out.append(
                        np.stack([rows.examples["domains"], rows.examples["sources"]]).astype(np.int64)
                    )
                    continue
                for name in ("domains", "sources", "lengths"):
                    columns[name].append(rows.examples[name].astype(np.int64))
                columns["trained"].append(rows.trained_X)
    joined = [np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64) for parts in columns.values()]
    if not len(joined[0]):
        raise ArtifactError.of(
            "train", str(built.folder), rule="the set has no row to train on", fix="build it again"
        )
    for name, values in zip(("domains", "sources"), joined, strict=False):
        if values.min() < 0 or values.max() >= len(metadata[name]):
            raise ArtifactError.of(
                f"{built.folder / MANIFEST_NAME}: {name}", metadata[name], rule="the shards have numbers that it does not name",
                fix="see `srde data check`",
            )  # fmt: skip
    figures = _figures(_Examples(*joined, metadata["domains"], metadata["sources"]))
    aside = np.concatenate(held_out, axis=1) if held_out else np.zeros((2, 0), dtype=np.int64)
    for place, name in enumerate(("domains", "sources")):
        counts = np.bincount(aside[place], minlength=len(metadata[name])).tolist()
        known = dict(zip(metadata[name], counts, strict=False))
        for one, entry in figures[name].items():
            entry["held_out"] = known[one]
    figures["total"]["held_out"] = aside.shape[1]
    report = json.loads((built.folder / REPORT_FILE).read_text(encoding="utf-8"))
    pairs = np.unique(np.concatenate([np.stack(joined[:2]), aside], axis=1), axis=1)
    domains_of: dict[str, set[str]] = {}
    for domain, source in pairs.T.tolist():
        domains_of.setdefault(metadata["sources"][source], set()).add(metadata["domains"][domain])
    return {
        "path": str(folder),
        "kind": "built set",
        "unit": "tokens",
        **figures,
        **_from_report(report),
        "rates": set_rates(report, built.folder / DROPPED_FILE, domains_of, figures),
        "packing": {name: split for name, split in metadata["splits"].items() if split["rows"]},
    }


def _from_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """What became of the rows that are not in the set."""
    sources = report["sources"].values()
    usable = sum(counts["usable"] for counts in sources)
    exact, near = (sum(counts[f"{kind}_duplicates"] for counts in sources) for kind in ("exact", "near"))
    used = sum(split["examples"] for split in report["splits"].values())
    entries = {name: dict(counts) for name, counts in report["entries"].items()}
    read = sum(counts.pop("read", 0) for counts in entries.values())
    reasons = sum((Counter(counts) for counts in entries.values()), Counter[str]())
    late = {"exact duplicate": exact, "near duplicate": near, "not needed": usable - exact - near - used}
    return {
        "duplicates": rates(usable, exact=exact, near=near),
        "contamination": rates(usable + reasons["contaminated"], contaminated=reasons["contaminated"])
        if report["evaluation"]
        else None,
        "left_out": {
            "by_reason": {
                name: count for name, count in {**dict(sorted(reasons.items())), **late}.items() if count
            },
            "by_entry": entries,
            "read": read,
        },
    }


def _figures(examples: _Examples) -> dict[str, Any]:
    """The totals, by domain and by source, and the lengths' histograms."""
    total = int(examples.length_X.sum())
    order = [*DOMAINS, *sorted(set(examples.domains) - set(DOMAINS))]
    by_name = {name: place for place, name in enumerate(examples.domains)}
    domains = {
        name: _entry(examples, examples.domain_X == by_name[name], total)
        for name in order
        if name in by_name and (examples.domain_X == by_name[name]).any()
    }
    sources = {}
    for place in np.argsort(-np.bincount(examples.source_X), kind="stable").tolist():
        chosen = examples.source_X == place
        if chosen.any():
            own = [examples.domains[domain] for domain in np.unique(examples.domain_X[chosen]).tolist()]
            sources[examples.sources[place]] = {**_entry(examples, chosen, total), "domains": own}
    end, longest = _end(examples), int(examples.length_X.max())
    width = max(-(-end // BINS), 1)  # whole numbers, so that every bar stands for as many lengths
    edges = np.arange(0, end + width + 1, width)
    clipped_X = np.minimum(examples.length_X, edges[-1])

    def bars(of_X: np.ndarray, names: Iterable[str], places: Mapping[str, int]) -> dict[str, list[int]]:
        return {name: np.histogram(clipped_X[of_X == places[name]], edges)[0].tolist() for name in names}

    return {
        "total": _entry(examples, np.ones(len(clipped_X), dtype=bool), total),
        "domains": domains,
        "sources": sources,
        "histograms": {
            "edges": edges.tolist(),
            "open_end": end < longest,
            "domains": bars(examples.domain_X, domains, by_name),
            "sources": bars(examples.source_X, sources, {name: n for n, name in enumerate(examples.sources)}),
        },
    }


def _end(examples: _Examples) -> int:
    """Where the histograms end: a few very long rows must not press all others into the first bars.

    A source that has a hundredth of the rows must not lie beyond it, either, only because its rows are long.
    """
    ends = [int(np.percentile(examples.length_X, 99))]
    for length_X in (
        examples.length_X[examples.source_X == source] for source in np.unique(examples.source_X)
    ):
        if 100 * len(length_X) >= len(examples.length_X):
            ends.append(int(np.percentile(length_X, 95)))
    longest = int(examples.length_X.max())
    return longest if longest <= 2 * max(ends) else max(ends)


def _entry(examples: _Examples, chosen_X: np.ndarray, total: int) -> dict[str, Any]:
    length_X = examples.length_X[chosen_X]
    return {
        "rows": len(length_X),
        "tokens": int(length_X.sum()),
        "trained_tokens": int(examples.trained_X[chosen_X].sum()),
        "share": round(float(length_X.sum()) / max(total, 1), 6),
        "lengths": _percentiles(length_X),
    }


def _percentiles(length_X: np.ndarray) -> dict[str, int]:
    """Lengths that rows really have: no mean of two neighbours."""
    values: Iterable[int] = np.percentile(
        length_X, list(PERCENTILES.values()), method="inverted_cdf"
    ).tolist()
    return dict(zip(PERCENTILES, map(int, values), strict=True))
