"""The PEFT tuner: finds the MLPs of a model, puts `SrdeLayer`s in their place, and takes them away again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import match_target_against_key
from torch import Tensor, nn

from srde.core import MlpLayout
from srde.errors import ConfigError, UsageError
from srde.tuner.auto import keep_weights_unpacked
from srde.tuner.config import SrdeConfig
from srde.tuner.control import Routing, no_adapter
from srde.tuner.fingerprint import check_base, fingerprint
from srde.tuner.layer import MERGE_REFUSED, SrdeLayer, SrdeLooseDown, SrdeLooseUp
from srde.tuner.sites import find_sites
from srde.tuner.store import check_tensors


class SrdeModel(BaseTuner):
    """Sparse Routed Delta Experts on a frozen model; made by `get_peft_model(model, SrdeConfig(...))`.

    The model gains one attribute: `srde`, a `srde.tuner.control.Routing`.
    """

    prefix = "srde_"
    tuner_layer_cls = SrdeLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # ---- putting the layers in ------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: SrdeConfig, model: nn.Module) -> None:
        if peft_config.init_weights:  # even if there is one: a configuration may be used for a second base
            peft_config.base_fingerprint = fingerprint(model)
        else:
            check_base(peft_config.base_fingerprint, model, peft_config.base_model_name_or_path)
        routing = getattr(model, "srde", None)
        if not isinstance(routing, Routing):
            keep_weights_unpacked(model)
            routing = Routing(find_sites(model))
            routing.watch(model)
            model.srde = routing
        wanted = choose_sites(routing.sites, peft_config)
        self._wanted = {_target_key(name, routing.sites[name]): name for name in wanted}

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._wanted

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SrdeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, SrdeLayer):
            routing, name = self.model.srde, self._wanted[current_key]
            layout = routing.sites[name]
            if layout.loose:
                down = getattr(parent, layout.down)
                layer: SrdeLayer = SrdeLooseUp(target, name, layout, routing, down)
                setattr(parent, layout.down, SrdeLooseDown(down, layer))
            else:
                layer = SrdeLayer(target, name, layout, routing)
            layer.training = target.training
            routing.layers[name] = layer
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.add_adapter(adapter_name, peft_config)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)

    # ---- loading --------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        marks = tuple(f".{part}.{adapter_name}." for part in SrdeLayer.adapter_layer_names)
        expected = {k: v for k, v in model.state_dict().items() if any(mark in k for mark in marks)}
        found = {k: v for k, v in remapped.items() if ".srde_" in k}
        check_tensors(expected, found)
        return remapped

    # ---- taking the layers out --------------------------------------------------------------------------------------

    def merge_and_unload(  # type: ignore[override]
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        expert: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> nn.Module:
        """Folds one expert, or a fixed mixture, into the base and returns the plain model. Shared experts are folded too.

        Args:
            progressbar: Shows progress while unloading.
            safe_merge: Refuses to fold numbers that are not finite.
            adapter_names: The adapters to fold; the active ones if left out.
            expert: The routed expert, gate 1.
            weights: One gate per routed expert instead.

        Raises:
            UsageError: Neither or both of `expert` and `weights` are given (routing cannot be merged), or the base is
                quantised.
            ConfigError: The expert does not exist, or the weights do not fit.
        """
        if expert is None and weights is None:
            raise UsageError(MERGE_REFUSED)
        if expert is not None and weights is not None:
            raise UsageError.of(
                "expert and weights",
                (expert, weights),
                rule="they exclude each other",
                fix="give one of them",
            )
        names = adapter_names or self.active_adapters
        if unknown := [name for name in names if name not in self.peft_config]:
            raise no_adapter(self.model.srde.layers.values(), unknown[0])
        gates = {name: merge_gates(self.peft_config[name], expert, weights) for name in names}
        layers = list(self.model.srde.layers.values())
        folds = [(layer, name) for layer in layers for name in names if name in layer.srde_experts]
        if safe_merge:  # all of them before the first is written
            for layer, name in folds:
                layer.fold(name, gates[name], check_only=True)
        for layer, name in folds:
            layer.fold(name, gates[name])
        return self._take_out(progressbar)

    def unload(self) -> nn.Module:
        """Returns the base model as it was."""
        return self._take_out(False)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        raise UsageError(MERGE_REFUSED)

    def _take_out(self, progressbar: bool) -> nn.Module:
        model = self._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        for hook in model.srde.hooks:
            hook.remove()
        del model.srde
        return model


def choose_sites(sites: dict[str, MlpLayout], config: SrdeConfig) -> list[str]:
    """The MLPs that an adapter wants, by `target_modules` and `layers_to_transform`.

    Raises:
        ConfigError: A layer does not exist, or nothing matches.
    """
    chosen = list(sites)
    if (wanted := config.target_modules) is not None:
        if isinstance(wanted, str):
            chosen = [name for name in chosen if match_target_against_key(wanted, name)]
        else:
            chosen = [name for name in chosen if any(name == w or name.endswith(f".{w}") for w in wanted)]
        if not chosen:
            raise ConfigError.of(
                "target_modules", wanted, rule=f"no MLP matches; the model has {_shorten(list(sites))}",
                fix="use names, name endings or a regular expression of these, or leave it out for all",
            )  # fmt: skip
    if (layers := config.layers_to_transform) is not None:
        asked = [layers] if isinstance(layers, int) else layers
        by_layer = {name: _layer_number(name) for name in chosen}
        if missing := sorted(set(asked) - set(by_layer.values())):
            raise ConfigError.of(
                "layers_to_transform", layers,
                rule=f"layer {missing[0]} has no MLP; the model has them in layers {_ranges(list(by_layer.values()))}",
                fix="name layers that exist, or leave it out for all",
            )  # fmt: skip
        chosen = [name for name in chosen if by_layer[name] in asked]
    return chosen


def merge_gates(config: SrdeConfig, expert: int | None, weights: Sequence[float] | None) -> Tensor:
    """Gates of all experts, shared ones at 1, for folding one expert or a mixture."""
    if expert is not None:
        if not isinstance(expert, int) or not 0 <= expert < config.num_experts:
            raise ConfigError.of(
                "expert", expert, rule=f"routed experts are numbered 0 to {config.num_experts - 1}",
                fix="name an expert that the adapter has",
            )  # fmt: skip
        routed = torch.zeros(config.num_experts)
        routed[expert] = 1
    else:
        routed = torch.as_tensor(weights, dtype=torch.float32)
        if routed.shape != (config.num_experts,) or not torch.isfinite(routed).all():
            raise ConfigError.of(
                "weights", weights, rule=f"a mixture has one finite gate for each of the {config.num_experts} routed experts",
                fix="use 0 for experts to leave out",
            )  # fmt: skip
    return torch.cat([routed, torch.ones(config.num_shared_experts)])


def _target_key(name: str, layout: MlpLayout) -> str:
    return f"{name}.{layout.ups[0]}" if layout.loose else name


def _layer_number(name: str) -> int:
    match = re.search(r"\.(\d+)(?:\.|$)", f".{name}")
    return int(match[1]) if match else -1


def _ranges(numbers: list[int]) -> str:
    numbers = sorted(set(numbers))
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(map(str, numbers))


def _shorten(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"


__all__ = ["SrdeModel", "choose_sites"]
