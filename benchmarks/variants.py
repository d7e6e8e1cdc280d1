"""What is compared: the frozen base, srde on its two paths, and a LoRA of srde's size on the same projections."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from srde import SrdeConfig
from srde.core import Path
from srde.plan.adapters import mlp_projections, nearest_rank, srde_layers

NUM_EXPERTS, TOP_K = 8, 2
DELTA_STD = 1e-3  # zero deltas would be the same work, but a trained adapter has none
PATHS: dict[str, Path | None] = {"masked": "masked", "grouped": "grouped", "auto": None}


@dataclass(frozen=True)
class Variant:
    """A model to be measured.

    Attributes:
        name: As in the tables.
        kind: "base", "srde" or "lora".
        sparsity: srde's, or that of the srde adapter whose size the LoRA has; None for the base.
        model: The model; the paths of one sparsity share one.
        path: srde's compute path; None lets it choose.
        trainable: Trainable parameters.
    """

    name: str
    kind: str
    sparsity: float | None
    model: nn.Module
    path: Path | None = None
    trainable: int = 0

    def select(self) -> nn.Module:
        """The model, set to this variant's path."""
        if self.kind == "srde":
            self.model.srde.path = self.path
        return self.model


def percent(sparsity: float) -> str:
    """A sparsity as the names have it."""
    return f"{100 * sparsity:.3g}%"


def lora_name(sparsity: float) -> str:
    """The LoRA of the size of srde at this sparsity."""
    return f"LoRA {percent(sparsity)}"


def srde_names(sparsity: float) -> list[str]:
    """srde at this sparsity, on each path."""
    return [f"srde {path} {percent(sparsity)}" for path in PATHS]


def variant_names(sparsities: list[float]) -> list[str]:
    """The names of all variants, in the order in which a round runs them."""
    return ["base", *(name for s in sparsities for name in (*srde_names(s), lora_name(s)))]


def build_variants(base: PreTrainedModel, sparsities: list[float], only: str | None = None) -> list[Variant]:
    """Builds the variants on one copy of the base's weights.

    Args:
        base: The frozen model.
        sparsities: Shares of the MLP's weights per srde expert.
        only: Builds this one alone.
    """
    variants = [Variant("base", "base", None, base)] if only in (None, "base") else []
    for sparsity in sparsities:
        names, lora = srde_names(sparsity), lora_name(sparsity)
        if only not in (None, *names, lora):
            continue
        model = _with_srde(base, sparsity)
        trainable = _trainable(model)
        for name, path in zip(names, PATHS.values(), strict=True):
            if only in (None, name):
                variants.append(Variant(name, "srde", sparsity, model, path, trainable))
        if only in (None, lora):
            twin = _with_lora(base, trainable, model)
            variants.append(Variant(lora, "lora", sparsity, twin, trainable=_trainable(twin)))
    return variants


def _with_srde(base: PreTrainedModel, sparsity: float) -> nn.Module:
    config = SrdeConfig(
        num_experts=NUM_EXPERTS, top_k=TOP_K, initial_sparsity=sparsity, target_sparsity=sparsity
    )
    model = get_peft_model(_twin(base), config)
    torch.manual_seed(0)
    for layer in srde_layers(model):
        nn.init.normal_(layer.srde_experts["default"].values, std=DELTA_STD)
    return model


def _with_lora(base: PreTrainedModel, trainable: int, srde: nn.Module) -> nn.Module:
    twin = _twin(base)
    projections = mlp_projections(twin, srde_layers(srde))
    rank = nearest_rank(trainable, projections)
    transposed = any(hasattr(module, "nf") for module in projections.values())
    model = get_peft_model(
        twin, LoraConfig(r=rank, target_modules=list(projections), fan_in_fan_out=transposed)
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=DELTA_STD)
    return model


def _twin(base: PreTrainedModel) -> PreTrainedModel:
    """Another model on the very same weights, frozen. The base itself stays as it was loaded: PyTorch multiplies by a
    frozen LM head in another way (see `srde.tuner.model`), and its users do not freeze it."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
    return copy.deepcopy(base, shared | {id(b): b for b in base.buffers()})


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
