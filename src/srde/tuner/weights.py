"""The base's weight matrices as plain tensors, whatever holds them: to score them, and to fold a delta in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from srde.core import MlpLayout
from srde.errors import UsageError


def dense_weights(block: nn.Module, layout: MlpLayout) -> list[Tensor]:
    """The MLP's M weights as `nn.Linear` holds them: [F, D] gate first, then up; [D, F] down."""
    ups = [_weight(getattr(block, name)) for name in layout.ups]
    if layout.fused:
        first, second = ups[0].chunk(2)
        ups = [first, second] if layout.gate_first else [second, first]
    return [*ups, _weight(getattr(block, layout.down))]


def fold(block: nn.Module, layout: MlpLayout, name: str, change: Sequence[Tensor], check_only: bool) -> None:
    """Adds dense changes, oriented and ordered as `dense_weights` gives them, to the MLP's weights.

    Args:
        block: The module whose children the layout names.
        layout: How the MLP computes.
        name: The MLP's name, for messages.
        change: M matrices.
        check_only: Writes nothing, and raises if a result would not be finite.

    Raises:
        UsageError: The base is quantised (rounding would eat the change), or a result is not finite.
    """
    ups = list(change[:-1])
    if layout.fused:
        ups = [torch.cat(ups if layout.gate_first else ups[::-1])]
    for child, delta in zip((*layout.ups, layout.down), (*ups, change[-1]), strict=True):
        module = getattr(block, child)
        weight = module.weight
        if is_quantized(module):
            raise UsageError.of(
                f"base weight of {name}.{child}", f"{type(module).__name__} {weight.dtype}",
                rule="folding an expert into quantised weights would round most of it away",
                fix="load the base in bf16 or fp32, load the adapter on it, and merge there",
            )  # fmt: skip
        if _is_transposed(module):
            delta = delta.t()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        merged = (weight.data.to(dtype) + delta.to(weight.device, dtype)).to(weight.dtype)
        if check_only and not torch.isfinite(merged).all():
            raise UsageError.of(
                f"merged weight of {name}.{child}", "not finite",
                rule="safe_merge=True folds only finite numbers",
                fix="find out where training diverged, and use an earlier checkpoint",
            )  # fmt: skip
        if not check_only:
            weight.data = merged


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer holds its weight in anything but plain floating-point numbers."""
    weight = module.weight
    return not weight.is_floating_point() or type(weight.data) is not Tensor or hasattr(weight, "quant_state")


def _weight(module: nn.Module) -> Tensor:
    weight = dequantize_module_weight(module).detach()
    return weight.t() if _is_transposed(module) else weight


def _is_transposed(module: nn.Module) -> bool:
    return hasattr(module, "nf")  # GPT-2's Conv1D
