"""Processes that do the chunks, and die with the build."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import datetime, tzinfo
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from srde.artifacts import atomic_folder
from srde.data.build.contamination import EvaluationIndex
from srde.data.build.stage import chunk_name
from srde.data.build.tasks import Chunk, Rules, make_passages, make_rows
from srde.data.sources.hub import stream
from srde.data.sources.registry import Source
from srde.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW_FILE = "records.parquet"
_WATCH_SECONDS = 0.5
_tokenizer: PreTrainedTokenizerBase | None = None  # the pool's processes are forked and find it here


class Workers:
    """A pool whose tasks each write one folder."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def start(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Runs a function on its own; `result` waits for it."""
        return self._pool.submit(function, *args)

    def result(self, future: Future[Any]) -> Any:
        """What a function has returned.

        Raises:
            SrdeError: What it has raised.
            UsageError: Its process died.
        """
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise UsageError.of(
                "num_proc",
                self._pool._max_workers,
                rule="one of the build's processes died; the system kills processes when memory runs out",
                fix="run the same command with a smaller --num_proc; finished chunks are kept",
            ) from error

    def run(
        self, function: Callable[..., Any], tasks: Iterable[Sequence[Any]], done: Callable[[Any], None]
    ) -> list[Any]:
        """Runs a function on every task and returns the results in order; `done` hears of each as it comes.

        Raises:
            SrdeError: The first that a task raised, in the order of the tasks; what is finished stays.
            UsageError: A process died.
        """
        futures: list[Future[Any]] = []
        try:
            for task in tasks:
                future = self.start(function, *task)
                future.add_done_callback(lambda f: f.cancelled() or f.exception() or done(f.result()))
                futures.append(future)
            return [self.result(future) for future in futures]
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def workers(
    processes: int, tokenizer: PreTrainedTokenizerBase | None, day: str | None = None
) -> Iterator[Workers]:
    """Yields a pool of processes that know the tokenizer, and whose chat template takes `day` (ISO 8601) for today."""
    global _tokenizer
    _tokenizer = tokenizer
    # Forked, so that torch, which Transformers imports, is loaded once and its pages are shared.
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(os.getpid(), day),
    )
    try:
        yield Workers(pool)
        pool.shutdown()
    except BaseException:
        _stop(pool)
        raise
    finally:
        _tokenizer = None


def _stop(pool: ProcessPoolExecutor) -> None:
    """Ends the processes at once: whatever they are writing was not there before and will not be there after."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)


def _begin(parent: int, day: str | None) -> None:
    if day:
        _stop_the_clock(day)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    gc.freeze()  # what is inherited stays shared, and is not searched for garbage again and again
    gc.disable()  # a chunk's many small objects are no garbage; `do_rows` collects after each
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _stop_the_clock(day: str) -> None:
    """Some chat templates put today's date in; a build that goes on tomorrow has to give the same bytes."""
    from transformers.utils import chat_template_utils

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromisoformat(day)

    chat_template_utils.datetime = Stopped


def _follow(parent: int) -> None:
    """Ends this process when the build is gone: nobody would read its results, and its lock would stay closed."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def fetch(
    source: Source, split: str, commit: str, wanted: Sequence[int] | None, start: int, root: str
) -> int | None:
    """Keeps records of a split as they come from the hub.

    Args:
        source: A source on the hub.
        split: One of its splits.
        commit: The commit to read.
        wanted: The chunks to keep, rising; None for all from `start` on.
        start: The first chunk to read.
        root: The folder of the split's chunks.

    Returns:
        How many chunks the split has, if its end was reached.
    """
    last = None if wanted is None else wanted[-1]
    number = start
    for table in stream(source, split, commit, start):
        if wanted is None or number in wanted:
            with atomic_folder(Path(root) / chunk_name(number)) as folder:
                pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), folder / RAW_FILE)
        number += 1
        if number - 1 == last:
            return None
    with atomic_folder(Path(root) / "end", metadata={"chunks": number}) as folder:
        (folder / "end").write_text(str(number))
    return number


def do_passages(chunk: Chunk, rules: Rules) -> int:
    """`make_passages` in a process of the pool."""
    make_passages(chunk, rules)
    return chunk.span.rows


def do_rows(chunk: Chunk, rules: Rules, index: str | None) -> int:
    """`make_rows` in a process of the pool; returns how many rows it has read."""
    make_rows(chunk, rules, _tokenizer, _index(index) if index else None)
    gc.collect()
    return chunk.span.rows


@cache
def _index(folder: str) -> EvaluationIndex:
    return EvaluationIndex.load(Path(folder))
