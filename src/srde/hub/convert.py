"""Makes a SaRDinE model of an adapter on its base."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from srde.errors import UsageError
from srde.hub.reading import ADAPTER
from srde.hub.sardine import SaRDinEConfig, SaRDinEForCausalLM
from srde.tuner import SrdeConfig, SrdeModel
from srde.tuner.control import no_adapter

if TYPE_CHECKING:
    from peft import PeftModel

_LEFT_OUT = ("_name_or_path", "transformers_version")
"""Of the base's configuration: where it lies on this machine, and what the whole says for itself."""


def from_adapter(
    model: PeftModel, adapter: str = "default", *, base_inside: bool = True, base_name: str | None = None
) -> SaRDinEForCausalLM:
    """Turns a model with an srde adapter into a SaRDinE model. The given model is used up: its base is the new one's.

    Args:
        model: The model with the adapter.
        adapter: The adapter's name.
        base_inside: Whether the base's weights are saved with it.
        base_name: The name of the base to write down, if it is not the adapter's.

    Returns:
        The model, in evaluation mode; its logits are those of the given one. Experts that were locked for the moment
        (`model.srde.lock`) are open again; those that the configuration disables stay so.

    Raises:
        UsageError: There is no such srde adapter, or it brings whole modules (`modules_to_save`).
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, SrdeModel):
        raise UsageError.of(
            "model",
            type(model).__name__,
            rule="it has no srde adapter",
            fix="load one with PeftModel.from_pretrained",
        )
    layers = {name: layer for name, layer in tuner.model.srde.layers.items() if adapter in layer.srde_experts}
    if not layers:
        raise no_adapter(tuner.model.srde.layers.values(), adapter)
    config: SrdeConfig = model.peft_config[adapter]
    if config.modules_to_save:
        raise UsageError.of(
            "modules_to_save", config.modules_to_save, rule="a SaRDinE model holds experts beside the base's own modules",
            fix="keep it as an adapter, or merge an expert with `srde export --format merged`",
        )  # fmt: skip
    layouts: list[dict[str, object]] = []
    mlps: dict[str, int] = {}
    for name, layer in layers.items():
        layer.try_layout()
        layout = asdict(layer.layout)
        if layout not in layouts:
            layouts.append(layout)
        mlps[name] = layouts.index(layout)
    parts = {
        name: (layer.srde_experts[adapter], layer.srde_router[adapter]) for name, layer in layers.items()
    }
    base = tuner.unload()
    made = SaRDinEForCausalLM(
        SaRDinEConfig(
            base_config={k: v for k, v in base.config.to_dict().items() if k not in _LEFT_OUT},
            base_model_name_or_path=base_name or config.base_model_name_or_path,
            base_inside=base_inside,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            sparsity=config.current_sparsity,
            granularity=config.granularity,
            null_expert=config.null_expert,
            num_shared_experts=config.num_shared_experts,
            router_temperature=parts[next(iter(parts))][1].temperature,
            expert_names=config.expert_names,
            disabled_experts=config.disabled_experts,
            frozen_experts=config.frozen_experts,
            layouts=layouts,
            mlps=mlps,
            base_fingerprint=config.base_fingerprint,
            dtype=base.dtype,
        ),
        base=base,
    )
    for name, (delta, router) in parts.items():
        layer = made.srde.layers[name]
        layer.srde_experts[ADAPTER].load_state_dict(delta.state_dict())
        layer.srde_router[ADAPTER].load_state_dict(router.state_dict())
    made.config.architectures = [type(made).__name__]
    made.generation_config = base.generation_config
    made._finish()
    return made.eval()
