"""Progress that is always shown: a bar in a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Advance = Callable[..., None]


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Advance]:
    """Yields `advance(count, note="")`."""
    if console.is_terminal:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
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
        if done * 10 // total > told:
            told = done * 10 // total
            console.print(f"  {title} {done}/{total} ({time.monotonic() - start:.0f} s) {note}".rstrip())

    yield tell


class BarCallback(TrainerCallback):
    """Moves a bar with the trainer's steps, the loss beside it."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.note = ""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        if "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.advance(1, self.note)
