"""What a run leaves alone: experts that stay as they are, bit for bit, whatever the optimizer does.

No gradient is not enough: weight decay and momentum move weights without one. So what is held is put back after each step.

Letters: M matrices of an MLP, E experts (routed, then shared), S slots of the router (routed experts, then the null slot).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srde.tuner import SrdeConfig, SrdeLayer


@dataclass(frozen=True)
class Held:
    """What is held.

    Attributes:
        experts: Places on the experts' axis of `values`.
        rows: Rows of the routers' weights.
        others: Whether all else that an adapter trains (`modules_to_save`) stays too.
    """

    experts: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    others: bool = False

    @classmethod
    def of(cls, config: SrdeConfig, only: Sequence[int] | None = None) -> Held:
        """What a configuration freezes and switches off; and where `only` some routed experts are trained, all the rest: shared
        experts and the null slot too."""
        fixed = {*(config.frozen_experts or ()), *(config.disabled_experts or ())}
        if only is None:
            return cls(tuple(sorted(fixed)), tuple(sorted(fixed)))
        trained = set(only) - fixed
        slots = config.num_experts + config.null_expert
        return cls(
            tuple(e for e in range(config.experts_in_all) if e not in trained),
            tuple(s for s in range(slots) if s not in trained),
            others=True,
        )

    def drop_gradients(self, layer: SrdeLayer, adapter: str) -> None:
        """Sets the gradients of what is held in a layer to zero."""
        values, weight = layer.srde_experts[adapter].values, layer.srde_router[adapter].weight
        if self.experts and values.grad is not None:
            values.grad[:, self.experts] = 0
        if self.rows and weight.grad is not None:
            weight.grad[list(self.rows)] = 0

    def hold(
        self, optimizer: torch.optim.Optimizer, layers: Callable[[], Sequence[SrdeLayer]], adapter: str
    ) -> None:
        """Makes an optimizer put back what is held after each of its steps.

        Args:
            optimizer: The optimizer, or Accelerate's wrapper of it.
            layers: Gives the layers; asked at each step, since pruning puts new parameters in the old ones' place.
            adapter: The adapter's name.
        """
        if not self.experts and not self.rows:
            return
        kept: list[tuple[Tensor, Any, Tensor]] = []
        places: tuple[Any, Any] = (slice(None), list(self.experts)), (list(self.rows),)

        def note(*_: Any) -> None:
            for layer in layers():
                tensors = layer.srde_experts[adapter].values, layer.srde_router[adapter].weight
                for tensor, where in zip(tensors, places, strict=True):
                    kept.append((tensor, where, tensor.data[where].clone()))

        def restore(*_: Any) -> None:
            for tensor, where, data in kept:
                tensor.data[where] = data
            kept.clear()

        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper has no hooks
        optimizer.register_step_pre_hook(note)
        optimizer.register_step_post_hook(restore)
