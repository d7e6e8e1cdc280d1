"""Progress that is always shown: a bar with rate and time left in a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[..., None]


class RateColumn(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        """Draws it."""
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Advance]:
    """Yields `advance(count, note="")`."""
    if console.is_terminal:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total, note="")

            def advance(count: int, note: str = "") -> None:
                progress.update(task, advance=count, note=note)

            yield advance
        return
    done, told, start = 0, 0, time.monotonic()

    def tell(count: int, note: str = "") -> None:
        nonlocal done, told
        done += count
        if done * 10 // max(total, 1) > told:
            told = done * 10 // max(total, 1)
            seconds = time.monotonic() - start
            rate = f"{done / seconds:,.0f}/s, " if seconds > 1 else ""
            console.print(f"  {title} {done:,}/{total:,} ({rate}{seconds:.0f} s) {note}".rstrip())

    yield tell
