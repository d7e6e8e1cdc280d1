"""What a run remembers from one process to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """What a run has to remember from one process to the next, beside weights, optimizer and the trainer's own state.

    Attributes:
        tokens: Tokens seen, over all processes.
        skipped: Steps left out because a number was not finite.
        halvings: How many times micro-batches are halved for want of memory.
        pending: An evaluation was due when the run was stopped.
        base: The base's held-out loss: overall, and by domain number.
        loss_sum: Sum of the steps' losses in phases that train.
        loss_steps: How many steps these were.
    """

    tokens: int = 0
    skipped: int = 0
    halvings: int = 0
    pending: bool = False
    base: dict[str, Any] = field(default_factory=dict)
    loss_sum: float = 0.0
    loss_steps: int = 0
