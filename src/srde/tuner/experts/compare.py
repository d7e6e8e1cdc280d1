"""Two adapters side by side, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from srde.tuner.config import LOSS_COEFS
from srde.tuner.experts.folder import Adapter, LayerTensors

_NOT_COMPARED = (
    "base_model_name_or_path", "peft_version", "inference_mode", "init_weights", "revision", "auto_mapping", "initial_sparsity",
    "target_sparsity", "mask_init", "mask_seed", *LOSS_COEFS,
)  # fmt: skip
"""Settings that say nothing about what the adapter does."""


@dataclass(frozen=True)
class Difference:
    """How two adapters differ.

    Attributes:
        experts: For each expert that either has: `number` (None for shared ones), `name`, `identical`, and where it is not:
            `only_in` (the adapter's folder), or `masks` (share of the first's places that the second has not), `values` (how many
            numbers differ), `values_change` (norm of the difference over the first's norm) and `router` (the same of the rows).
            The last two are None where the first is all zero; and where masks differ, values at other places are other values:
            then `values` and `values_change` are None.
        tensors: Names of other tensors that differ: the null slot's rows, `modules_to_save`, layers that only one has.
        settings: Name -> both values.
    """

    experts: list[dict[str, Any]]
    tensors: list[str]
    settings: dict[str, tuple[Any, Any]]

    @property
    def identical(self) -> bool:
        """Whether nothing differs, not even a bit."""
        return not self.tensors and not self.settings and all(one["identical"] for one in self.experts)


def compare_adapters(one: Adapter, two: Adapter) -> Difference:
    """Compares expert by expert, by number; shared experts among themselves."""
    settings = {}
    for field in fields(one.config):
        values = getattr(one.config, field.name), getattr(two.config, field.name)
        if values[0] != values[1] and field.name not in _NOT_COMPARED:
            settings[field.name] = values
    layers = [name for name in one.layers if name in two.layers]
    tensors = sorted(one.layers.keys() ^ two.layers.keys())
    for name in layers:
        nulls = [side.layers[name].weight[side.config.num_experts :] for side in (one, two)]
        tensors += [] if same_bits(*nulls) else [f"{name}: the null slot's row"]
    for name in sorted(one.others.keys() | two.others.keys()):
        if (
            name not in one.others
            or name not in two.others
            or not same_bits(one.others[name], two.others[name])
        ):
            tensors.append(name)
    experts = []
    for shared in (False, True):
        counts = [
            side.config.num_shared_experts if shared else side.config.num_experts for side in (one, two)
        ]
        starts = [side.config.num_experts if shared else 0 for side in (one, two)]
        for e in range(max(counts)):
            side = one if e < counts[0] else two
            name = f"shared {e}" if shared else side.config.name_of(e)
            about: dict[str, Any] = {"number": None if shared else e, "name": name}
            if e >= min(counts):
                experts.append({**about, "identical": False, "only_in": str(side.folder)})
                continue
            pairs = [(one.layers[n], two.layers[n]) for n in layers]
            experts.append({**about, **_expert(pairs, starts[0] + e, starts[1] + e, routed=not shared)})
    return Difference(experts, tensors, settings)


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have one shape, one type and the same bits: -0 is not 0, and one NaN can be another."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(
        one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8)
    )


def _expert(
    pairs: list[tuple[LayerTensors, LayerTensors]], a: int, b: int, *, routed: bool
) -> dict[str, Any]:
    """What differs between expert `a` of the first adapter and `b` of the second, over their layers."""
    masks = [(x.index_by_expert[a], y.index_by_expert[b]) for x, y in pairs]
    values = [(x.values[:, a], y.values[:, b]) for x, y in pairs]
    rows = [(x.weight[a], y.weight[b]) for x, y in pairs] if routed else []
    if all(same_bits(*pair) for pair in (*masks, *values, *rows)):
        return {"identical": True}
    alike = all(torch.equal(x, y) for x, y in masks)
    lost = [1 - float(torch.isin(x, y).double().mean()) for x, y in _by_matrix(masks)]
    return {
        "identical": False,
        "values": sum(int((x != y).sum()) for x, y in values) if alike else None,
        "values_change": _relative(values) if alike else None,
        "masks": sum(lost) / len(lost),
        "router": _relative(rows) if routed else None,
    }


def _by_matrix(masks: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(one, two) for x, y in masks for one, two in zip(x, y, strict=True)]


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """Norm of the difference over the norm of the first; None where the first is zero and the second is not."""
    apart = sum(float((x.double() - y.double()).square().sum()) for x, y in pairs) ** 0.5
    size = sum(float(x.double().square().sum()) for x, _ in pairs) ** 0.5
    if size:
        return apart / size
    return None if apart else 0.0
