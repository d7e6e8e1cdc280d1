"""Rows made by reasoning-gym: tasks without end whose answers are computed, not written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from srde.data.sources import files as chunked
from srde.data.sources.files import Span
from srde.errors import ConfigError

PREFIX = "reasoning-gym:"


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
    """The records of a span: `question`, `answer`, `id` and the task's own `metadata`.

    Raises:
        ConfigError: reasoning-gym knows no such task, or refuses its settings.
    """
    import reasoning_gym

    task = span.file.removeprefix(PREFIX)
    try:
        # Item i depends on the seed and i; the size only limits i, so that it is the same for all spans.
        items = reasoning_gym.create_dataset(task, seed=seed, size=size, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError.of(
            "gym",
            task,
            rule=f"reasoning-gym refuses the task or its settings ({error})",
            fix="correct the entry",
        ) from error
    for number in range(span.start, span.end):
        item = items[number]
        yield (
            number + 1,
            {"question": item["question"], "answer": item["answer"], "id": f"{task}/{seed}/{number}"},
        )
