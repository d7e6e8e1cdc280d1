"""Prunes an adapter: fewer neurons (or entries) per expert, the least important ones gone for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from srde.core import Delta
from srde.errors import ConfigError
from srde.tuner.control import no_adapter


def prune_adapter(
    model: nn.Module,
    sparsity: float,
    adapter: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Keeps, in every expert, what is worth most; parameters, masks and optimizer state shrink together.

    The pruned model equals the unpruned one with the dropped values at zero.

    Args:
        model: A `PeftModel` with an srde adapter.
        sparsity: The share of the MLP's weights that an expert rewrites afterwards, at most the present one.
        adapter: The adapter's name.
        optimizer: Its state of the pruned parameters (momenta, of the parameters' shape) is pruned alike.
        scores: The worth of each rewritten thing by the layer's name, shaped like its `index`; the size of its change, if
            left out.

    Returns:
        What survived in each layer, as positions into the last axis of `index` as it was before.

    Raises:
        ConfigError: The sparsity is not above 0, or above the present one; or the optimizer's state cannot be pruned. Nothing
            has changed then.
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
    if optimizer is not None:
        _require_prunable([layer.srde_experts[adapter] for layer in layers], optimizer)
    survivors = {}
    for layer in layers:
        delta = layer.srde_experts[adapter]
        kept = survivors[layer.name] = delta.prune(sparsity, None if scores is None else scores[layer.name])
        if optimizer is not None:
            state = optimizer.state.get(delta.values, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == delta.values.shape:
                    state[name] = delta.take(kept, value)
        delta.shrink(kept)
        if optimizer is not None:
            _renew(delta, optimizer)
    config.sparsity = sparsity
    return survivors


def _require_prunable(deltas: Sequence[Delta], optimizer: torch.optim.Optimizer) -> None:
    for delta in deltas:
        for name, value in optimizer.state.get(delta.values, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != delta.values.shape:
                raise ConfigError.of(
                    "optimizer", type(optimizer).__name__,
                    rule=f"its state {name} has not the parameters' shape and cannot be pruned",
                    fix="use AdamW, SGD or Muon, or train at one sparsity",
                )  # fmt: skip


def _renew(delta: Delta, optimizer: torch.optim.Optimizer) -> None:
    """Puts a new parameter with the same numbers in the place of the shrunk one, in the optimizer too: whoever kept a graph of
    the old one (compiled code does) also kept its shape."""
    old, new = delta.values, nn.Parameter(delta.values.data)
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)
    delta.values = new
