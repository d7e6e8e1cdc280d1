"""The adapters that a plan compares: srde at a sparsity, and the LoRA of nearest size on the same projections."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from srde.core import Path, Router, choose_path, linear_shape
from srde.tuner import SrdeConfig, SrdeLayer

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
}


def attach_srde(base: PreTrainedModel, config: SrdeConfig, sparsity: float) -> PeftModel:
    """Attaches an srde adapter at a sparsity to a base on the meta device."""
    return get_peft_model(base, replace(config, sparsity=sparsity))


def attach_lora(base: PreTrainedModel, rank: int, projections: dict[str, nn.Module]) -> PeftModel:
    """Attaches a LoRA of this rank to these linear layers."""
    transposed = any(hasattr(module, "nf") for module in projections.values())
    return get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(projections), fan_in_fan_out=transposed)
    )


def mlp_projections(base: nn.Module, layers: Iterable[SrdeLayer]) -> dict[str, nn.Module]:
    """The linear layers of the MLPs that carry experts, by their names in the bare base."""
    names = (f"{layer.name}.{child}" for layer in layers for child in (*layer.layout.ups, layer.layout.down))
    return {name: base.get_submodule(name) for name in names}


def nearest_rank(trainable: int, projections: dict[str, nn.Module]) -> int:
    """The LoRA rank whose parameters, rank * (inputs + outputs) per projection, come nearest to `trainable`."""
    per_rank = sum(sum(linear_shape(module) or ()) for module in projections.values())
    return max(1, round(trainable / per_rank))


def srde_layers(model: nn.Module) -> list[SrdeLayer]:
    """The MLPs with experts, in the model's order."""
    return [module for module in model.modules() if isinstance(module, SrdeLayer)]


def own_path(layers: list[SrdeLayer], tokens: int) -> Path:
    """The compute path that the layers choose by themselves for this many tokens; asked of the rule itself."""
    router = layers[0].srde_router["default"]
    twin = Router(
        1, router.num_experts, router.top_k, null_expert=router.null_expert, num_shared=router.num_shared
    )
    with torch.no_grad():
        return choose_path(layers[0].srde_experts["default"], twin(torch.zeros(tokens, 1)))


def file_bytes(model: PeftModel) -> int:
    """Size of the adapter's `adapter_model.safetensors`: 8 bytes, a JSON header padded to 8, the tensors.

    Source: the format's description, https://huggingface.co/docs/safetensors.
    """
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = {"float32": "F32", "int64": "I64", "int32": "I32"}[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


def optimizer_bytes(parameters: list[nn.Parameter], name: str) -> int:
    """Bytes of the optimizer's state, by a real step on parameters of the same shapes on the meta device."""
    twins = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    optimizer = OPTIMIZERS[name](twins)
    optimizer.step()
    return sum(
        t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
    )
