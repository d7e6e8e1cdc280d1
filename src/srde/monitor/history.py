"""What is kept of a long run's metrics: every number of every logged step in columns, loads of experts thinned out.

A hundred thousand lines with the loads of 30 layers x 8 experts are gigabytes as Python objects. Numbers are kept as arrays
(8 bytes each); loads only of the last windows, and of at most 256 steps spread over the run.

Letters in names: L layers, E experts (routed ones, in the order of the file).
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

WINDOWS = 10
"""Logged steps that "the last windows" means."""

_MOST_SPREAD = 256
_LARGEST = 1e300
_NAN = float("nan")

Floats = npt.NDArray[np.float64]


class Columns:
    """The numbers of all training lines, by name; the names of `clock` stand beside the others."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self._columns: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self.phases)

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Floats:
        """A copy of one column; NaN where a line had no such number, all NaN where none had."""
        if name not in self._columns:
            return np.full(len(self), _NAN)
        return np.array(self._columns[name])

    @property
    def names(self) -> list[str]:
        """The columns there are, in the order of their first appearance."""
        return list(self._columns)

    def append(self, record: Mapping[str, Any]) -> None:
        """Takes a training line."""
        clock = record.get("clock")
        numbers = _numbers(record) | (_numbers(clock) if isinstance(clock, Mapping) else {})
        for name in numbers:
            if name not in self._columns:
                self._columns[name] = array("d", [_NAN]) * len(self)
        for name, column in self._columns.items():
            column.append(numbers.get(name, _NAN))
        self.phases.append(sys.intern(str(record.get("phase", ""))))

    def recent(self, name: str, count: int) -> Floats:
        """The last `count` entries of a column without those that are no finite numbers."""
        column = np.array(self._columns[name][-count:]) if name in self._columns else np.empty(0)
        return column[np.isfinite(column)]

    def last(self, name: str) -> float | None:
        """The last line's number; None if it has none or it is not finite."""
        if name not in self._columns or not len(self):
            return None
        value = self._columns[name][-1]
        return value if np.isfinite(value) else None

    def median(self, name: str, count: int = 20) -> float | None:
        """The median of the last `count` entries."""
        recent = self.recent(name, count)
        return float(np.median(recent)) if len(recent) else None


def number(record: Mapping[str, Any], name: str) -> float | None:
    """A field that is a finite number, else None."""
    value = record.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return float(value)
    return None


def whole(record: Mapping[str, Any], name: str) -> int:
    """A field as a whole number; 0 if it is none."""
    return int(number(record, name) or 0)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name in record if (value := number(record, name)) is not None}


@dataclass(frozen=True)
class LoadWindow:
    """The loads that one training line tells: the mean gate of each expert in each layer since the line before.

    Attributes:
        step: Its step.
        phase: Its phase.
        open_experts: How many of the routed experts, from the first, could be chosen; None means all.
        load: A list of E numbers for each of L layers, as read.
    """

    step: float
    phase: str
    open_experts: int | None
    load: list[list[float]]

    def load_LE(self, num_experts: int | None) -> Floats | None:
        """The loads of the open routed experts; None if the lists are not rectangular or hold no numbers."""
        try:
            load_LE = np.array(self.load, dtype=np.float64)
        except (TypeError, ValueError):
            return None
        if load_LE.ndim != 2:
            return None
        return load_LE[:, : min(filter(None, (self.open_experts, num_experts)), default=load_LE.shape[1])]


@dataclass
class Loads:
    """The last windows, and some that are spread over the whole run."""

    recent: deque[LoadWindow] = field(default_factory=lambda: deque(maxlen=WINDOWS))
    spread: list[LoadWindow] = field(default_factory=list)
    _seen: int = 0
    _stride: int = 1

    def append(self, record: Mapping[str, Any]) -> None:
        """Takes a training line with an `expert_load`."""
        opened = record.get("open_experts")
        window = LoadWindow(
            float(record["step"]),
            sys.intern(str(record.get("phase", ""))),
            opened if isinstance(opened, int) and opened > 0 else None,
            record["expert_load"],
        )
        self.recent.append(window)
        if self._seen % self._stride == 0:
            self.spread.append(window)
            if len(self.spread) > _MOST_SPREAD:
                self.spread = self.spread[::2]
                self._stride *= 2
        self._seen += 1


class Metrics:
    """Takes the lines of `metrics.jsonl` apart. A sink of `LineReader`.

    Attributes:
        train: Numbers of the training lines.
        loads: Their experts' loads.
        evals: The evaluation lines as they are.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.train = Columns()
        self.loads = Loads()
        self.evals: list[dict[str, Any]] = []

    def append(self, record: dict[str, Any], /) -> None:
        """Takes the next line; one without a step, or of a kind that is not known here, is none of ours."""
        if number(record, "step") is None:
            return
        if record.get("kind") == "train":
            self.train.append(record)
            if isinstance(record.get("expert_load"), list):
                self.loads.append(record)
        elif record.get("kind") == "eval":
            self.evals.append(record)


def thinned(step_N: Floats, value_N: Floats, points: int) -> tuple[Floats, Floats]:
    """At most about `points` of a curve's finite points, each the median of equally many neighbours."""
    fine = np.isfinite(step_N) & np.isfinite(value_N)
    step_N, value_N = step_N[fine], value_N[fine]
    size = -(-len(step_N) // points)
    if size <= 1:
        return step_N, value_N
    starts = range(0, len(step_N), size)
    return (
        np.array([np.median(step_N[start : start + size]) for start in starts]),
        np.array([np.median(value_N[start : start + size]) for start in starts]),
    )
