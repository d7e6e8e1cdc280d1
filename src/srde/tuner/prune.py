"""Prunes an adapter: fewer neurons (or entries) per expert, the least important ones gone for good."""

from __future__ import annotations

import torch
from torch import nn

from srde.errors import ConfigError
from srde.tuner.control import no_adapter


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

    Raises:
        ConfigError: The sparsity is not above 0, or above the present one.
        UsageError: The model has no such adapter.
    """
    layers = [layer for layer in model.srde.layers.values() if adapter in layer.srde_experts]
    if not layers:
        raise no_adapter(model.srde.layers.values(), adapter)
    config = model.peft_config[adapter]
    if not 0 < sparsity <= config.current_sparsity:
        raise ConfigError.of(
            "sparsity",
            sparsity,
            rule=f"pruning leads to less than the present {config.current_sparsity:g}, and above 0",
            fix="name a smaller share",
        )
    for layer in layers:
        delta = layer.srde_experts[adapter]
        kept = delta.prune(sparsity)
        if optimizer is not None:
            state = optimizer.state.get(delta.values, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == delta.values.shape:
                    state[name] = delta.take(kept, value)
        delta.shrink(kept)
    config.sparsity = sparsity
