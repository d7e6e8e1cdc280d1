"""What changes over a run, as pure functions of the step, and the callback that applies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from srde.tuner.prune import prune_adapter


@dataclass(frozen=True)
class SparsitySchedule:
    """Cubic pruning from `initial` to `target` (Zhu & Gupta, 2017, eq. 1), in a few cuts.

    Attributes:
        initial: Sparsity at the start.
        target: Sparsity from `end` on.
        begin: Share of the run after which the first cut falls; before it, values grow unpruned.
        end: Share of the run at which the target is reached; after it, the survivors settle.
        cuts: How many cuts lie between; each rebuilds the experts' parameters.
    """

    initial: float
    target: float
    begin: float = 0.2
    end: float = 0.7
    cuts: int = 5

    def at(self, step: int, max_steps: int) -> float:
        """The sparsity after `step` of `max_steps` steps."""
        span = (self.end - self.begin) * max_steps
        done = min(max(step - self.begin * max_steps, 0.0) / span, 1.0) if span > 0 else 1.0
        done = int(done * self.cuts + 1e-9) / self.cuts
        return self.target + (self.initial - self.target) * (1 - done) ** 3


class PruneCallback(TrainerCallback):
    """Prunes an adapter as the schedule says, parameters and optimizer state together."""

    def __init__(self, schedule: SparsitySchedule, adapter: str = "default") -> None:
        self.schedule = schedule
        self.adapter = adapter

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        wanted = self.schedule.at(state.global_step, state.max_steps)
        if wanted < model.peft_config[self.adapter].current_sparsity:
            prune_adapter(model, wanted, self.adapter, optimizer)
