"""The last step of a build: the chosen rows as files (see `srde.data.packed`), and an account of all the others."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from srde.artifacts import atomic_folder
from srde.data.build.card import card
from srde.data.build.chunks import Chunks
from srde.data.build.plan import Plan
from srde.data.build.select import Selection
from srde.data.build.tasks import COUNTS_FILE
from srde.data.build.workers import workers
from srde.data.build.write import write_jsonl, write_split, write_text
from srde.data.packed import CARD_FILE, DROPPED_FILE, KIND, OUTPUT, REPORT_FILE, TRAIN_FILE, VALIDATION_FILE
from srde.progress import bar


def finish(
    plan: Plan,
    work_dir: Path,
    chunks: Chunks,
    folders: Sequence[Path],
    selection: Selection,
    console: Console,
) -> dict[str, Any]:
    """Writes all files of the result; the packed set comes last and says that the others are complete.

    Returns:
        The report.
    """
    splits = {"train": selection.train, "validation": selection.validation}
    total = sum(len(rows) for rows in splits.values())
    lengths = chunks.lengths()
    metadata: dict[str, Any] = {
        "kind": KIND,
        "model": plan.identity["model"],
        "tokenizer": plan.identity["tokenizer"],
        "max_length": plan.settings.max_length,
        "domains": selection.domain_names,
        "sources": selection.source_names,
        "splits": {},
        "files": {},
    }
    with (
        workers(
            1, None
        ) as pool,  # one process writes the rows for people while this one packs those for training
        bar(console, "packing", total) as advance,
        _output(work_dir, metadata, lengths, splits) as folder,
    ):
        readable = pool.start(write_rows, work_dir, chunks, selection.train, selection.validation)
        for name, rows in splits.items():
            metadata["splits"][name] = write_split(
                folder / name,
                chunks,
                rows,
                selection.domains,
                selection.sources,
                plan.settings.max_length,
                advance,
            )
        report = _report(plan, chunks, folders, selection, metadata["splits"], lengths)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        with (folder / DROPPED_FILE).open("w", encoding="utf-8") as sink:
            sink.writelines(_dropped(chunks, folders, selection))
        if not (work_dir / CARD_FILE).exists():  # or else somebody may have added to it
            write_text(work_dir / CARD_FILE, iter([card(plan, report)]))
        pool.result(readable)
        metadata["files"] = {name: digest(work_dir / name) for name in (TRAIN_FILE, VALIDATION_FILE)}
    return report


def write_rows(work_dir: Path, chunks: Chunks, train: np.ndarray, validation: np.ndarray) -> None:
    """Writes the chosen rows as JSONL."""
    write_jsonl(work_dir / TRAIN_FILE, chunks, train)
    write_jsonl(work_dir / VALIDATION_FILE, chunks, validation)


def _output(
    work_dir: Path, metadata: dict[str, Any], lengths: np.ndarray, splits: Mapping[str, np.ndarray]
) -> Any:
    tokens = sum(int(lengths[rows].sum()) for rows in splits.values())
    return atomic_folder(work_dir / OUTPUT, metadata, expected_bytes=13 * tokens)


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _dropped(chunks: Chunks, folders: Sequence[Path], selection: Selection) -> Iterator[str]:
    """A line for each row that was left out by itself or for another row's sake, with the reason."""
    for folder in folders:
        yield (folder / DROPPED_FILE).read_text(encoding="utf-8")
    for reason, pairs in (("exact duplicate", selection.exact), ("near duplicate", selection.near)):
        rows = np.array(sorted(pairs), dtype=np.int64)
        kept = np.array([pairs[row] for row in rows.tolist()], dtype=np.int64)
        for row, own, other in zip(rows, chunks.texts("id", rows), chunks.texts("id", kept), strict=True):
            entry = {
                "source": selection.source_names[selection.sources[row]],
                "id": own,
                "reason": reason,
                "detail": other,
            }
            yield json.dumps(entry, ensure_ascii=False) + "\n"


def _report(
    plan: Plan,
    chunks: Chunks,
    folders: Sequence[Path],
    selection: Selection,
    splits: Mapping[str, Any],
    lengths: np.ndarray,
) -> dict[str, Any]:
    """Counts of everything, by source and by domain."""
    by_entry: dict[str, Counter[str]] = {}
    for folder in folders:  # .build/rows/<source>/<split>/<chunk>
        counts = json.loads((folder / COUNTS_FILE).read_text())
        by_entry.setdefault(folder.parent.parent.name, Counter()).update(counts)
    near = np.array(sorted(selection.near), dtype=np.int64)
    exact = np.array(sorted(selection.exact), dtype=np.int64)

    def counted(of: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, int]]:
        size = len(names)
        columns = {
            "usable": np.bincount(of, minlength=size),
            "exact_duplicates": np.bincount(of[exact], minlength=size),
            "near_duplicates": np.bincount(of[near], minlength=size),
            "train": np.bincount(of[selection.train], minlength=size),
            "validation": np.bincount(of[selection.validation], minlength=size),
            "train_tokens": np.bincount(of[selection.train], lengths[selection.train], minlength=size).astype(
                np.int64
            ),
        }
        return {
            name: {column: int(values[place]) for column, values in columns.items()}
            for place, name in enumerate(names)
            if columns["usable"][place]
        }

    return {
        "examples_per_domain": plan.settings.examples_per_domain,
        "splits": dict(splits),
        "domains": counted(selection.domains, selection.domain_names),
        "sources": counted(selection.sources, selection.source_names),
        "entries": {name: dict(sorted(counts.items())) for name, counts in by_entry.items()},
        "evaluation": sorted({planned.source.name for planned in plan.evaluation}),
    }
