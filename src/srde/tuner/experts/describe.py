"""What the experts of an adapter are, in numbers that need no model.

Letters: L layers, E experts (routed, then shared).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srde.tuner.experts.folder import Adapter, LayerTensors


def describe_experts(adapter: Adapter) -> list[dict[str, Any]]:
    """All experts, routed ones first.

    Returns:
        For each: `number` (None for shared ones), `name`, `state` (words), `share` of the MLPs' weights that it changes, `norm`
        of its change over all layers, `overlap`: the share of its places that another expert rewrites too, a mean over layers.
    """
    config = adapter.config
    layers = list(adapter.layers.values())
    overlap_E = torch.stack([_overlaps(layer)[1] for layer in layers]).mean(0)
    norm_LE, changed_LE = _norms(layers), torch.stack([_changed(layer) for layer in layers])
    experts = []
    for e in range(config.experts_in_all):
        routed = e < config.num_experts
        changed = float(changed_LE[:, e].mean())
        state = ["trained" if changed else "zero"]
        state += ["frozen"] if e in (config.frozen_experts or ()) else []
        state += ["disabled"] if e in (config.disabled_experts or ()) else []
        experts.append(
            {
                "number": e if routed else None,
                "name": _name(adapter, e),
                "state": state if routed else [*state, "shared"],
                "share": changed * config.current_sparsity,
                "norm": float(norm_LE[:, e].square().sum().sqrt()),
                "overlap": float(overlap_E[e]),
            }
        )
    return experts


def describe_expert(adapter: Adapter, expert: int) -> list[dict[str, Any]]:
    """One routed expert, layer by layer.

    Returns:
        For each layer: `layer`, `rewritten` and `changed` (neurons, or entries in all matrices), `norm` of the change,
        `router_norm` of its row, and `overlaps`: who rewrites most of the same places, as pairs of name and share of its places.
    """
    rows = []
    for name, layer in adapter.layers.items():
        shared_E = _overlaps(layer)[0][expert]
        most = [
            other
            for other in shared_E.argsort(descending=True, stable=True).tolist()
            if other != expert and shared_E[other]
        ]
        count = layer.index_by_expert[expert].numel()
        rows.append(
            {
                "layer": name.removeprefix("base_model.model."),
                "rewritten": count,
                "changed": round(float(_changed(layer)[expert]) * count),
                "norm": float(_norms([layer])[0, expert]),
                "router_norm": float(layer.weight[expert].double().norm()),
                "overlaps": [(_name(adapter, other), float(shared_E[other])) for other in most[:3]],
            }
        )
    return rows


def _name(adapter: Adapter, expert: int) -> str:
    config = adapter.config
    return config.name_of(expert) if expert < config.num_experts else f"shared {expert - config.num_experts}"


def _norms(layers: list[LayerTensors]) -> Tensor:
    """Size of each expert's change in each layer, [L, E]."""
    return torch.stack(
        [one.values.double().square().transpose(0, 1).flatten(1).sum(1).sqrt() for one in layers]
    )


def _changed(layer: LayerTensors) -> Tensor:
    """The share of its places that each expert changes, [E]."""
    values = layer.values
    moved = (values != 0).any(-1).any(0) if layer.by_neuron else (values != 0).transpose(0, 1).flatten(1)
    return moved.double().mean(1)


def _overlaps(layer: LayerTensors) -> tuple[Tensor, Tensor]:
    """The share of each expert's places that each other has too, [E, E], and that any other has, [E]."""
    index_EMN = layer.index_by_expert.long()
    offset = torch.arange(index_EMN.shape[1]).view(1, -1, 1) * (int(index_EMN.max()) + 1)
    places = (index_EMN + offset).flatten(1)
    _, number, users = places.unique(return_inverse=True, return_counts=True)
    anyone_E = (users[number] > 1).double().mean(1)
    pairs_EE = torch.stack(
        [torch.stack([torch.isin(one, two).double().mean() for two in places]) for one in places]
    )
    return pairs_EE, anyone_E
