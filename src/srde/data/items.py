"""Generated questions with known answers: what the quickstart's data set is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any


@dataclass(frozen=True)
class Item:
    """A question whose answer is known.

    Attributes:
        prompt: The question, with how to answer it.
        answer: The answer; also the training target, word for word.
        kind: How `srde.eval.scoring.score` scores it.
        metadata: What that scorer needs, and what a second computation of the answer needs.
    """

    prompt: str
    answer: str
    kind: str
    metadata: dict[str, Any] = field(default_factory=dict)


Task = Callable[[int], Iterator[Item]]
"""Takes a seed and gives items without end, the same ones on every machine. Items may repeat."""


def drawn(draw: Callable[[Random], Item]) -> Task:
    """Makes a task of a function that draws one item."""

    def items(seed: int) -> Iterator[Item]:
        rng = Random(seed)
        while True:
            yield draw(rng)

    return items
