"""What the frozen base's weights take in each format they can be loaded in."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from srde.core import linear_shape
from srde.plan.base import tensor_bytes

NF4_BLOCK = 64  # weights that share one absmax
ABSMAX_BLOCK = 256  # absmax values that share one, with double quantisation
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Weights:
    """Bytes of the base's weights.

    Attributes:
        plain: In the dtype that the plan is made for.
        int8: Linear layers but the head in int8, with one float32 scale per output row; the rest as in `plain`.
        nf4: Linear layers but the head in 4 bits, with one absmax per 64 weights; the rest as in `plain`.
        unpacked: The largest quantised layer in `plain`'s dtype: prefill and backward unpack one layer at a time.
    """

    plain: int
    int8: int
    nf4: int
    unpacked: int


def weigh(model: PreTrainedModel, dtype: torch.dtype, double_quant: bool) -> Weights:
    """Counts what bitsandbytes keeps for the layers that Transformers gives it; the formats are those of the QLoRA paper
    (Dettmers et al., 2023, section 3) and of LLM.int8() (Dettmers et al., 2022).

    Args:
        model: The bare base.
        dtype: Of what is not quantised.
        double_quant: NF4's absmax in 8 bits with a scale of its own per 256, as `bnb_4bit_use_double_quant` does.
    """
    skipped = get_keys_to_not_convert(model)
    linears = [
        module
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, skipped)
    ]
    sizes = [linear_shape(module) or (0, 0) for module in linears]
    plain = tensor_bytes(model)
    rest = plain - sum(module.weight.nbytes for module in linears)
    return Weights(
        plain=plain,
        int8=rest + sum(inputs * outputs + FLOAT * outputs for inputs, outputs in sizes),
        nf4=rest + sum(nf4_bytes(inputs * outputs, double_quant) for inputs, outputs in sizes),
        unpacked=max((inputs * outputs for inputs, outputs in sizes), default=0) * dtype.itemsize,
    )


def nf4_bytes(numel: int, double_quant: bool) -> int:
    """Bytes of one matrix in NF4 with its quantisation state: half a byte per weight, one absmax per block, the table of
    16 levels; with double quantisation the absmax in one byte each, a float32 scale per 256 of them, one offset and a
    table of 256 levels."""
    blocks = ceil(numel / NF4_BLOCK)
    table = 16 * FLOAT
    if not double_quant:
        return ceil(numel / 2) + table + FLOAT * blocks
    return ceil(numel / 2) + table + blocks + FLOAT * (ceil(blocks / ABSMAX_BLOCK) + 1 + 256)
