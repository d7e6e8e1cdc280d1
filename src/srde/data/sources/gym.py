"""Rows made by reasoning-gym: tasks without end whose answers are computed, not written.

Several of its tasks depend on Python's hash seed, or on the global random numbers, besides their own seed. Rows are therefore
made in a process of their own with a fixed hash seed, and the global generators are set anew before each.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from srde.data.sources import files as chunked
from srde.data.sources.files import Span
from srde.errors import ConfigError

PREFIX = "reasoning-gym:"
_REFUSED = 3  # exit status


def gym_version() -> str:
    """The version of reasoning-gym; other versions may make other rows."""
    from importlib.metadata import version

    return version("reasoning-gym")


def gym_spans(task: str, rows: int) -> tuple[Span, ...]:
    """A task's rows in chunks."""
    return tuple(
        Span(PREFIX + task, "", start, (end := min(start + chunked.CHUNK_ROWS, rows)), start + 1, end - start)
        for start in range(0, rows, chunked.CHUNK_ROWS)
    )


def read_gym(
    span: Span, seed: int, size: int, settings: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a span with their lines: `question`, `answer`, `id`.

    Raises:
        ConfigError: reasoning-gym knows no such task, or refuses its settings.
    """
    task = span.file.removeprefix(PREFIX)
    wanted = json.dumps([task, seed, size, span.start, span.end, dict(settings)])
    done = subprocess.run(
        [sys.executable, "-m", __name__, wanted],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode == _REFUSED:
        raise ConfigError.of(
            "gym",
            task,
            rule=f"reasoning-gym refuses the task or its settings ({done.stderr.strip()})",
            fix="correct the entry",
        )
    done.check_returncode()
    for number, line in enumerate(done.stdout.splitlines(), start=span.start):
        question, answer = json.loads(line)
        yield number + 1, {"question": question, "answer": answer, "id": f"{task}/{seed}/{number}"}


def _make(task: str, seed: int, size: int, start: int, end: int, settings: dict[str, Any]) -> int:
    """Prints the rows from `start` to `end` as JSON lines; item i depends on the task, its settings, the seed and i alone."""
    import numpy as np
    import reasoning_gym

    try:
        items = reasoning_gym.create_dataset(task, seed=seed, size=size, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        print(error, file=sys.stderr)
        return _REFUSED
    for number in range(start, end):
        random.seed(f"{task}/{seed}/{number}")
        np.random.seed(
            random.getrandbits(32)
        )  # the tasks that use numpy's global generator need that one set
        item = items[number]
        print(json.dumps([item["question"], item["answer"]]))
    return 0


if __name__ == "__main__":
    sys.exit(_make(*json.loads(sys.argv[1])))
