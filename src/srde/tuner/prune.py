"""Prunes an adapter: fewer neurons (or entries) per expert, the least important ones gone for good."""

from __future__ import annotations

import torch
from torch import nn


def prune_adapter(
    model: nn.Module,
    sparsity: float,
    adapter: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Keeps, in every expert, the values of largest size; parameters, masks and optimizer state shrink together.

    The pruned model equals the unpruned one with the dropped values at zero.

    Args:
        model: A `PeftModel` with an srde adapter.
        sparsity: The share of the MLP's weights that an expert rewrites afterwards, at most the present one.
        adapter: The adapter's name.
        optimizer: Its state of the pruned parameters (momenta, of the parameters' shape) is pruned alike.
    """
    config = model.peft_config[adapter]
    for layer in model.srde.layers.values():
        if adapter not in layer.srde_experts:
            continue
        delta = layer.srde_experts[adapter]
        kept = delta.prune(sparsity)
        if optimizer is not None:
            state = optimizer.state.get(delta.values, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == delta.values.shape:
                    state[name] = delta.take(kept, value)
        delta.shrink(kept)
    config.sparsity = sparsity
