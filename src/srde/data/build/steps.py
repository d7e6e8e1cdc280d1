"""The steps of a build, each of which does what is not done yet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from rich.console import Console

from srde.artifacts import atomic_folder, read_manifest
from srde.data.build.chunks import Chunks
from srde.data.build.contamination import EvaluationIndex, merge_passages
from srde.data.build.fingerprint import BANDS
from srde.data.build.finish import finish
from srde.data.build.plan import Plan, Planned
from srde.data.build.select import Selection, select, shortages
from srde.data.build.settings import BuildSettings
from srde.data.build.stage import Stage, chunk_name
from srde.data.build.tasks import COUNTS_FILE, Chunk, Rules, read_passages
from srde.data.build.workers import RAW_FILE, Workers, do_passages, do_rows, fetch, workers
from srde.data.build.write import write_text
from srde.data.packed import OUTPUT
from srde.data.sources import files as chunked
from srde.data.sources.files import Span
from srde.data.tokenizers import load_tokenizer
from srde.errors import ArtifactError, DataError
from srde.progress import Advance, bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_FILE = "shard.json"


@dataclass(frozen=True)
class Built:
    """What a build left.

    Attributes:
        folder: The packed set, for `srde train --pretokenized_dir`; None for one part of several.
        report: Counts, as in its `report.json`.
        fresh: False if it was there already.
    """

    folder: Path | None
    report: dict[str, Any]
    fresh: bool = True


class Steps:
    """One build.

    Args:
        plan: What to build.
        stage: Where the parts of it are.
        tokenizer: The model's; loaded when it is needed, if not given.
        console: Where progress is shown.
    """

    def __init__(
        self, plan: Plan, stage: Stage, tokenizer: PreTrainedTokenizerBase | None, console: Console
    ) -> None:
        self.plan, self.stage, self.console = plan, stage, console
        self.settings = plan.settings
        self.tokenizer = tokenizer
        self.rules = Rules(
            seed=self.settings.seed,
            max_length=self.settings.max_length,
            domains=None if self.settings.domains is None else tuple(self.settings.domains),
            licenses=None
            if self.settings.licenses is None
            else tuple(one.lower() for one in self.settings.licenses),
            ngram=self.settings.decontamination_ngram,
            overlap=self.settings.decontamination_overlap,
            skip_bad_rows=self.settings.on_bad_row == "skip",
        )

    def run(self) -> Built:
        """Does all that is left to do.

        Raises:
            SrdeError: See `srde.data.build.build.build`.
        """
        wanted = self.plan.wanted()
        while True:
            if self._missing(wanted):
                if self.tokenizer is None:
                    self.tokenizer = load_tokenizer(self.settings.model_name)
                with workers(self.settings.processes, self.tokenizer, self.plan.identity["date"]) as pool:
                    self._read_evaluation(pool)
                    self._fetch(pool, wanted)
                    self._make_rows(pool, wanted)
            if self.settings.num_shards > 1:
                return self._close_shard()
            with bar(self.console, "choosing rows: duplicates", BANDS) as advance:
                folders = [folder for planned in self.plan.train for folder in self._folders(planned, wanted)]
                chunks = Chunks(folders)
                selection = self._select(chunks, advance)
            more = self._more(wanted, selection)
            if more == wanted:
                break
            self.console.print("some domains are short of rows: reading more of their sources")
            wanted = more
        if not len(selection.train):
            raise _nothing_left(folders, self.settings)
        short = self._short(selection)
        try:
            report = finish(self.plan, self.stage.work_dir, chunks, folders, selection, self.console)
        except BaseException:
            self.stage.sweep_files()
            raise
        self.stage.clear()
        for domain, missing in short.items():
            self.console.print(
                f"{domain}: {missing:,} rows fewer than asked for; its sources have no more", style="yellow"
            )
        return Built(self.stage.work_dir / OUTPUT, report)

    def _select(self, chunks: Chunks, advance: Advance) -> Selection:
        return select(
            chunks,
            per_domain=self.settings.examples_per_domain,
            validation_fraction=self.settings.validation_fraction,
            threshold=self.settings.near_duplicate_threshold,
            seed=self.settings.seed,
            advance=advance,
        )

    def _mine(self, number: int, planned: Planned) -> bool:
        place = [one.source.name for one in self.plan.train].index(planned.source.name)
        return (number + place) % self.settings.num_shards == self.settings.shard_index

    def _end(self, source: str, split: str) -> int | None:
        """How many chunks a split on the hub has, if that is known."""
        found = self.stage.find("raw", source, split, "end")
        return None if found is None else int(read_manifest(found).metadata["chunks"])

    def _numbers(self, planned: Planned, split: str, wanted: int) -> list[int]:
        """The chunks of a split to be used for so many rows."""
        count = -(-wanted // chunked.CHUNK_ROWS)
        if planned.spans:
            return self.plan.chunk_order(planned, len(planned.spans))[:count]
        end = self._end(planned.source.name, split)
        return list(range(count if end is None else min(count, end)))

    def _folders(self, planned: Planned, wanted: dict[str, int]) -> list[Path]:
        """The finished chunks of a training source, in order.

        Raises:
            ArtifactError: One is missing.
        """
        found = []
        for split in planned.source.train:
            for number in sorted(self._numbers(planned, split, wanted[planned.source.name])):
                names = ("rows", planned.source.name, split, chunk_name(number))
                folder = self.stage.find(*names)
                if folder is None:
                    raise ArtifactError.of(
                        "chunk",
                        "/".join(names),
                        rule="it is missing from every part",
                        fix="run its shard's command again, then merge",
                    )
                found.append(folder)
        return found

    def _open(self, planned: Planned, wanted: dict[str, int]) -> Iterator[tuple[str, int]]:
        """The chunks of a training source that this machine has still to make."""
        for split in planned.source.train:
            for number in self._numbers(planned, split, wanted[planned.source.name]):
                if self._mine(number, planned) and not self.stage.find(
                    "rows", planned.source.name, split, chunk_name(number)
                ):
                    yield split, number

    def _missing(self, wanted: dict[str, int]) -> bool:
        return any(True for planned in self.plan.train for _ in self._open(planned, wanted))

    def _short(self, selection: Selection) -> Mapping[str, int]:
        """Domains with fewer rows than asked for, and how many are missing."""
        expected = {domain for planned in self.plan.train for domain in planned.domains}
        wanted = self.settings.domains
        expected = expected if wanted is None else set(wanted)
        return shortages(selection, self.settings.examples_per_domain, expected)

    def _more(self, wanted: dict[str, int], selection: Selection) -> dict[str, int]:
        """What to read so that no domain is short: twice as much of its sources that have more."""
        short = self._short(selection)
        more = dict(wanted)
        for planned in self.plan.train:
            source = planned.source
            if short and (source.domain in short or source.domain is None):
                rows = wanted[source.name]
                has_more = any(
                    len(self._numbers(planned, split, 2 * rows + chunked.CHUNK_ROWS))
                    > len(self._numbers(planned, split, rows))
                    for split in source.train
                )
                if has_more:
                    more[source.name] = 2 * rows + chunked.CHUNK_ROWS
        return more

    def _raw(self, source: str, split: str) -> set[int]:
        """The chunks of records that are here."""
        root = self.stage.place("raw", source, split)
        return (
            {int(entry.name) for entry in root.iterdir() if entry.name.isdigit()} if root.is_dir() else set()
        )

    def _fetch(self, pool: Workers, wanted: dict[str, int]) -> None:
        """Brings the records that the open chunks are made of from the hub."""
        tasks = []
        for planned in self.plan.train:
            if planned.source.hub:
                numbers: dict[str, list[int]] = {}
                for split, number in self._open(planned, wanted):
                    if number not in self._raw(planned.source.name, split):
                        numbers.setdefault(split, []).append(number)
                for split, own in numbers.items():
                    root = str(self.stage.place("raw", planned.source.name, split))
                    tasks.append((planned.source, split, planned.commit, sorted(own), min(own), root))
        self._run(pool, "training sets from the hub", fetch, tasks)

    def _run(self, pool: Workers, title: str, function: Any, tasks: list[Any]) -> None:
        if tasks:
            with bar(self.console, title, len(tasks)) as advance:
                pool.run(function, tasks, lambda _: advance(1))

    def _read_evaluation(self, pool: Workers) -> None:
        """Makes the index of all evaluation questions."""
        if not self.plan.evaluation or self.stage.find("index"):
            return
        tasks = []
        for planned in self.plan.evaluation:
            if planned.source.hub:
                for split in planned.source.evaluation:
                    if self._end(planned.source.name, split) is None:
                        have = self._raw(planned.source.name, split)
                        root = str(self.stage.place("raw", planned.source.name, split))
                        tasks.append(
                            (planned.source, split, planned.commit, None, max(have, default=-1) + 1, root)
                        )
        self._run(pool, "evaluation sets from the hub", fetch, tasks)
        chunks = [
            self._chunk("evaluation", planned, split, number)
            for planned in self.plan.evaluation
            for split in planned.source.evaluation
            for number in (
                range(len(planned.spans))
                if planned.spans
                else range(self._end(planned.source.name, split) or 0)
            )
        ]
        open_ones = [(chunk, self.rules) for chunk in chunks if not Path(chunk.folder).is_dir()]
        with bar(
            self.console, "evaluation questions", sum(chunk.span.rows for chunk, _ in open_ones)
        ) as advance:
            pool.run(do_passages, open_ones, advance)
        with self.console.status("indexing the evaluation questions"):
            found = [read_passages(Path(chunk.folder)) for chunk in chunks]
            parts = [(part, names) for part, names in found if part is not None]
            if not parts:
                return
            joined = merge_passages([part for part, _ in parts], [len(names) for _, names in parts])
            with atomic_folder(self.stage.place("index")) as folder:
                EvaluationIndex.of([name for _, names in parts for name in names], joined).save(folder)

    def _chunk(self, kind: str, planned: Planned, split: str, number: int) -> Chunk:
        source = planned.source
        folder = str(self.stage.place(kind, source.name, split, chunk_name(number)))
        if planned.spans:
            return Chunk(source, planned.spans[number], folder, size=source.rows or 0)
        raw = self.stage.find("raw", source.name, split, chunk_name(number))
        if raw is None:
            raise ArtifactError.of(
                "chunk",
                f"{source.name}/{split}/{number}",
                rule="its records are missing",
                fix="run the same command again",
            )
        first = number * chunked.CHUNK_ROWS
        rows = pq.read_metadata(raw / RAW_FILE).num_rows
        # Named after the data set: that is what messages and row ids are to say.
        span = Span(f"{source.hub}/{split}", str(raw / RAW_FILE), 0, rows, first + 1, rows)
        return Chunk(source, span, folder)

    def _make_rows(self, pool: Workers, wanted: dict[str, int]) -> None:
        index = self.stage.find("index")
        chunks = [
            self._chunk("rows", planned, split, number)
            for planned in self.plan.train
            for split, number in self._open(planned, wanted)
        ]
        with bar(self.console, "rows", sum(chunk.span.rows for chunk in chunks)) as advance:
            tasks = [(chunk, self.rules, str(index) if index else None) for chunk in chunks]
            pool.run(do_rows, tasks, advance)

    def _close_shard(self) -> Built:
        own = {"shard_index": self.settings.shard_index, "num_shards": self.settings.num_shards}
        write_text(self.stage.own / SHARD_FILE, iter([json.dumps(own)]))
        return Built(None, own)


def _nothing_left(folders: Sequence[Path], settings: BuildSettings) -> DataError:
    counts: Counter[str] = Counter()
    for folder in folders:
        counts.update(json.loads((folder / COUNTS_FILE).read_text()))
    read = counts.pop("read", 0)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "all held out"
    sources = ", ".join(settings.sources or ["all registered sources"])
    return DataError.at(
        sources,
        None,
        "row",
        f"none of {read:,} rows is left to train on ({reasons}); change what leaves them out",
    )
