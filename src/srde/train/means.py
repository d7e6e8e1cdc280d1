"""Means of what a run measures between two lines of its log, kept so that a resumed run goes on with the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Means:
    """Sums and counts by name. Values stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Adds a number with a weight."""
        value = value.detach().double() * weight
        self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0.0) + weight

    def drain(self, reduce: Any = None) -> dict[str, float]:
        """The means since the last call, in order of first appearance; starts anew.

        Args:
            reduce: Takes the mean of a tensor over the processes.
        """
        result = {}
        for name, total in self._sums.items():
            mean = total / max(self._counts[name], 1e-12)
            result[name] = float(reduce(mean) if reduce else mean)
        self._sums.clear()
        self._counts.clear()
        return result

    def copy(self) -> Means:
        """A copy; the original may go on."""
        other = Means()
        other._sums, other._counts = dict(self._sums), dict(self._counts)
        return other

    def state(self) -> dict[str, list[float]]:
        """Plain numbers that JSON keeps exactly."""
        return {name: [float(total), self._counts[name]] for name, total in self._sums.items()}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Goes on from a state."""
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}
