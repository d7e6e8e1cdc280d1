"""What a new expert rewrites: places that the others leave alone, as far as there are any.

Letters: S places of one MLP (neurons, or entries of one matrix), E experts, N places that one expert rewrites.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from srde.core import magnitude_scores
from srde.core.layout import MlpLayout
from srde.data.tokenizers import explained
from srde.errors import ArtifactError
from srde.tuner.auto import auto_class
from srde.tuner.experts.folder import Adapter
from srde.tuner.fingerprint import check_base
from srde.tuner.loading import load_base
from srde.tuner.sites import find_sites
from srde.tuner.weights import dense_weights

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""


def choose_masks(
    adapter: Adapter, how: Literal["magnitude", "random"], *, base: str | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Masks of one more expert in each layer: [R] neurons, or [M, N] entries.

    Args:
        adapter: The adapter.
        how: "magnitude" takes the places whose base weights are largest, and loads the base for it; "random" takes any, and reads
            the base's configuration only.
        base: Where the base is; the place that the adapter names, if left out.
        seed: Of "random".

    Raises:
        ConfigError: The base cannot be read.
        ArtifactError: It is not the adapter's.
    """
    name = base or adapter.config.base_model_name_or_path
    if not name:
        raise ArtifactError.of(
            "adapter", str(adapter.folder), rule="its adapter_config.json names no base model", fix="pass --model_name_or_path"
        )  # fmt: skip
    model = load_base(name) if how == "magnitude" else _shapes_of(name)
    check_base(adapter.config.base_fingerprint, model, adapter.config.base_model_name_or_path)
    sites = {PREFIX + _module_of(site, layout): (site, layout) for site, layout in find_sites(model).items()}
    masks = {}
    for number, (layer, tensors) in enumerate(adapter.layers.items()):
        site, layout = sites.get(layer, (None, None))
        if site is None or layout is None:
            raise ArtifactError.of(
                "base model", name, rule=f"it has no MLP {layer.removeprefix(PREFIX)}, of which the adapter has experts",
                fix="name the base that the adapter was trained on",
            )  # fmt: skip
        matrices = 1 if tensors.by_neuron else tensors.values.shape[0]
        if how == "random":
            generator = torch.Generator().manual_seed(seed + 1_000_003 * number)
            places = layout.intermediate_size * (1 if tensors.by_neuron else layout.hidden_size)
            scores = [torch.rand(places, generator=generator) for _ in range(matrices)]
        else:
            scores = _magnitudes(model.get_submodule(site), layout, tensors.by_neuron)
        used_EMN = tensors.index_by_expert
        chosen = [free_first(score, used_EMN[:, m], used_EMN.shape[2]) for m, score in enumerate(scores)]
        masks[layer] = (chosen[0] if tensors.by_neuron else torch.stack(chosen)).to(tensors.index.dtype)
    return masks


def free_first(score_S: Tensor, used_EN: Tensor, count: int) -> Tensor:
    """The best places that fewest experts rewrite already: the free ones first. Ascending."""
    users_S = torch.bincount(used_EN.flatten().long(), minlength=len(score_S))
    order_S = score_S.argsort(descending=True, stable=True)
    order_S = order_S[users_S[order_S].argsort(stable=True)]
    return order_S[:count].sort().values


def _magnitudes(block: nn.Module, layout: MlpLayout, by_neuron: bool) -> list[Tensor]:
    scores = magnitude_scores(dense_weights(block, layout))
    if by_neuron:
        return [torch.stack([*(s.sum(dim=1) for s in scores[:-1]), scores[-1].sum(dim=0)]).sum(dim=0)]
    return [score.flatten() for score in scores]


def _shapes_of(name: str) -> nn.Module:
    """The base without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with explained("model_name_or_path", name):
        config = AutoConfig.from_pretrained(name)
        auto = auto_class(config) or AutoModelForCausalLM
        with torch.device("meta"):
            model: nn.Module = auto.from_config(config)
    return model


def _module_of(site: str, layout: MlpLayout) -> str:
    """Where a site's tensors are: an MLP without a module of its own has them at its first matrix."""
    return f"{site}.{layout.ups[0]}" if layout.loose else site
