"""What changes over a run, as pure functions of the step. `srde.train.control` applies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srde.train.phases import Phases

Unlock = Literal["none", "linear", "warmup"]


@dataclass(frozen=True)
class SparsitySchedule:
    """Cubic pruning from `initial` to `target` (Zhu & Gupta, 2017, eq. 1), in a few cuts.

    Attributes:
        initial: Sparsity at the start.
        target: Sparsity from `end` on.
        begin: Share of the span after which the first cut falls; before it, values grow unpruned.
        end: Share of the span at which the target is reached; after it, the survivors settle.
        cuts: How many cuts lie between; each rebuilds the experts' parameters.
        start: The step at which the span begins: the first that trains values. It ends with the run.
    """

    initial: float
    target: float
    begin: float = 0.2
    end: float = 0.7
    cuts: int = 5
    start: int = 0

    def at(self, step: int, max_steps: int) -> float:
        """The sparsity after `step` of `max_steps` steps."""
        if step < self.start:
            return self.initial
        span = max_steps - self.start
        length = (self.end - self.begin) * span
        done = step - self.start - self.begin * span
        done = min(max(done, 0.0) / length, 1.0) if length > 0 else 1.0
        done = int(done * self.cuts + 1e-9) / self.cuts
        return self.target + (self.initial - self.target) * (1 - done) ** 3


@dataclass(frozen=True)
class LinearSchedule:
    """From `first` at step `start` to `last` at step `end`, in a straight line; constant before and after.

    Used for the router's temperature and for the mask selector's.
    """

    first: float
    last: float
    start: int
    end: int

    def at(self, step: int) -> float:
        """The value at a step."""
        if step >= self.end:
            return self.last
        if step <= self.start:
            return self.first
        return self.first + (self.last - self.first) * (step - self.start) / (self.end - self.start)


@dataclass(frozen=True)
class UnlockSchedule:
    """How many experts are open, lowest number first.

    "linear" opens one after the other, evenly over the span. "warmup" has one open for the span, and then all.

    Attributes:
        kind: "none" has all open from the start.
        num_experts: Routed experts.
        start: The first step of the span.
        end: The first step with all open.
    """

    kind: Unlock
    num_experts: int
    start: int
    end: int

    def at(self, step: int) -> int:
        """How many experts are open at a step."""
        if self.kind == "none" or step >= self.end:
            return self.num_experts
        if self.kind == "warmup" or step <= self.start:
            return 1
        done = (step - self.start) / (self.end - self.start)
        return 1 + int(done * (self.num_experts - 1) + 1e-9)


def unlock_span(phases: Phases, steps: int | None = None) -> tuple[int, int]:
    """The steps over which experts are unlocked: so many, or the first third, of those that route tokens and train values."""
    start = next((p.start for p in phases if p.values and p.name != "expert_pretraining"), phases.max_steps)
    return start, start + (max(1, (phases.max_steps - start) // 3) if steps is None else steps)
