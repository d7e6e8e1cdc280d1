"""SaRDinE: a base model with routed sparse experts, as a model of Transformers."""

from __future__ import annotations

import copy
import inspect
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

from srde.core.delta import Delta
from srde.core.layout import MlpLayout
from srde.core.masks import random_scores
from srde.core.router import Router
from srde.errors import ArtifactError, UsageError
from srde.hub.code import code_files
from srde.hub.configuration_sardine import SaRDinEConfig
from srde.hub.reading import ADAPTER, is_expert, read_tensors, require_complete, require_fitting, weight_files
from srde.tuner.auto import auto_class, keep_weights_unpacked
from srde.tuner.control import Routing
from srde.tuner.fingerprint import check_base
from srde.tuner.routed_layer import RoutedDown, RoutedLayer, RoutedUp
from srde.tuner.sites import find_sites

SHARD_SIZE = "5GB"
NOT_SETTINGS = {"dtype", "quantization_config"}
"""Fields of configurations that `from_pretrained` takes for other purposes."""
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class _NoTunerLayer:
    """PEFT takes every module with a `base_layer` for one of its own, and would merge or unload it."""

    def unload_and_optionally_merge_module(self, **_: Any) -> Any:
        return self


class SaRDinELayer(_NoTunerLayer, RoutedLayer):
    """An MLP block with the model's experts."""

    active_adapters = (ADAPTER,)


class SaRDinEUp(RoutedUp, SaRDinELayer):
    """The D -> F matrix of an MLP that has no module of its own."""


class SaRDinEDown(_NoTunerLayer, RoutedDown):
    """The F -> D matrix that belongs to it."""


class SaRDinEForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose MLPs have experts.

    It generates with the base's cache, takes `dtype`, `device_map`, `quantization_config` and `attn_implementation` for the base,
    and is saved and pushed like any model of Transformers. With `dtype`, the experts' values and the routers stay float32.

    Attributes:
        base: The base model; frozen.
        srde: What one can ask of, and tell, the routers: `record`, `force_experts`, `restrict_experts`, `force_mixture`.

    Args:
        config: What to build.
        base: The base, if it is there already; it is changed in place. Otherwise it is made anew.
    """

    config_class = SaRDinEConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # patterns of names; not the whole of `srde_experts`, or the positions would become numbers with a point
    _keep_in_fp32_modules_strict = (r"srde_experts\.[^.]+\.values", r"srde_router\.[^.]+\.weight")

    def __init__(self, config: SaRDinEConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self._base_is_given = base is not None
        self.base = auto_class(config.base_config).from_config(config.base_config) if base is None else base
        self.base.requires_grad_(False)
        self._vocabulary = self.base.get_input_embeddings().weight.shape[0]
        sites = _layouts(config) or find_sites(self.base)
        self.srde = Routing(sites)
        for name, layout in sites.items():
            self._require_mlp(name, layout)
        for number, (name, layout) in enumerate(sites.items()):
            self._put_layer(name, layout, number)
        self.srde.watch(self.base)
        self._accepted = set(inspect.signature(self.base.forward).parameters)
        for name in ("_is_stateful", "_can_compile_fullgraph"):
            setattr(self, name, getattr(self.base, name, False))
        self.post_init()
        if base is not None:
            for name in (
                "hf_quantizer",
                "is_quantized",
                "quantization_method",
                "is_loaded_in_4bit",
                "is_loaded_in_8bit",
            ):
                if hasattr(base, name):
                    setattr(self, name, getattr(base, name))
            if (places := getattr(base, "hf_device_map", None)) is not None:
                self.hf_device_map = {f"base.{n}" if n else "": place for n, place in places.items()}

    def _require_mlp(self, name: str, layout: MlpLayout) -> None:
        modules = dict(self.base.named_modules())
        if any(f"{name}.{child}" not in modules for child in (*layout.ups, layout.down)):
            raise ArtifactError.of(
                "mlps", name, rule=f"the base has no such module with {', '.join((*layout.ups, layout.down))}",
                fix="export the model again, or download it again",
            )  # fmt: skip

    def _put_layer(self, name: str, layout: MlpLayout, number: int) -> None:
        if layout.loose:
            holder, own = self.base.get_submodule(name), layout.ups[0]
            down = getattr(holder, layout.down)
            layer: RoutedLayer = SaRDinEUp(getattr(holder, own), name, layout, self.srde, down)
            setattr(holder, layout.down, SaRDinEDown(down, layer))
        else:
            path, _, own = name.rpartition(".")
            holder = self.base.get_submodule(path)
            layer = SaRDinELayer(getattr(holder, own), name, layout, self.srde)
        setattr(holder, own, layer)
        config = self.config
        delta = layer.put_experts(
            ADAPTER,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            sparsity=config.sparsity,
            granularity=config.granularity,
            null_expert=config.null_expert,
            num_shared=config.num_shared_experts,
            temperature=config.router_temperature,
            disabled=config.disabled_experts,
            frozen=config.frozen_experts,
        )
        self.srde.layers[name] = layer
        if not delta.index.is_meta:  # what is not loaded from a file is dealt out at random
            up, last = (
                (layout.intermediate_size, layout.hidden_size),
                (layout.hidden_size, layout.intermediate_size),
            )
            like = [torch.empty(s, device="meta") for s in (*[up] * (layout.num_matrices - 1), last)]
            delta.set_masks(random_scores(like, torch.Generator().manual_seed(number)))

    # ---- what Transformers asks -----------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Zero deltas and random routers; the base's weights, if it was given, stay as they are."""
        if not self._base_is_given:
            super().init_weights()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=Router.INIT_STD)
        elif isinstance(module, Delta):
            nn.init.zeros_(module.values)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def prepare_inputs_for_generation(
        self, input_ids: Any = None, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        return self.base.prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the base's forward, with the experts.

        Args:
            input_ids: Token ids [B, S].
            attention_mask: 1 for tokens, 0 for padding [B, S].
            position_ids: Positions [B, S].
            past_key_values: The cache.
            inputs_embeds: Embeddings [B, S, D] instead of ids.
            labels: Targets [B, S]; -100 is left out of the loss.
            use_cache: Whether to return a cache.
            logits_to_keep: Only the last so many positions get logits; 0 for all.
            kwargs: Whatever else the base's forward takes.

        Returns:
            The base's output, with logits [B, S, V] and, with labels, the loss.
        """
        given = {
            "attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds, "labels": labels, "use_cache": use_cache,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None} | kwargs
        if "logits_to_keep" in self._accepted:
            given["logits_to_keep"] = logits_to_keep
        return self.base(input_ids=input_ids, **given)

    # ---- experts --------------------------------------------------------------------------------------------------

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Gives the base while the context is open."""
        layers = list(self.srde.layers.values())
        before = [layer._disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, value in zip(layers, before, strict=True):
                layer._disable_adapters = value

    def expert_tensors(self) -> dict[str, Tensor]:
        """The experts' and routers' tensors, by their names in the model."""
        return {name: tensor for name, tensor in self.state_dict().items() if is_expert(name)}

    # ---- saving and loading ---------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves configuration, tensors and the model's code; without the base's weights where `config.base_inside` is False.

        Args:
            save_directory: The folder.
            args: As in Transformers.
            kwargs: As in Transformers; `max_shard_size` is 5 GB unless given.

        Raises:
            UsageError: The base is to stay out, and is not any more what lies elsewhere.
        """
        kwargs.setdefault("max_shard_size", SHARD_SIZE)
        if not self.config.base_inside:
            trained = [name for name, p in self.named_parameters() if p.requires_grad and not is_expert(name)]
            if trained or self.get_input_embeddings().weight.shape[0] != self._vocabulary:
                raise UsageError.of(
                    "base_inside", False,
                    rule=f"the base has changed ({', '.join(trained[:2]) or 'its vocabulary'}), and would not be saved",
                    fix="set model.config.base_inside = True",
                )  # fmt: skip
            kwargs |= {"state_dict": self.expert_tensors(), "save_original_format": False}
        middle = f".{kwargs['variant']}" if kwargs.get("variant") else ""
        if kwargs.get(
            "is_main_process", True
        ):  # an older save in other shards would be read instead of this one, or beside it
            for stale in (f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"):
                (pathlib.Path(save_directory) / stale).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)
        for name, text in code_files().items():
            (pathlib.Path(save_directory) / name).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Loads a folder or a hub repository; the base from within it, or from where its configuration says.

        Args:
            pretrained_model_name_or_path: The folder, or the hub id.
            model_args: As in Transformers.
            kwargs: As in Transformers: `dtype`, `device_map`, `quantization_config`, `attn_implementation`, ... They hold for the
                base. `base_model_name_or_path` names another place to load the same base from.

        Raises:
            ArtifactError: Tensors are missing, unknown or of other shapes, or the base is another one.
        """
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            config = SaRDinEConfig.from_pretrained(config or pretrained_model_name_or_path, **hub)
        config = copy.deepcopy(config)  # the caller's own stays as it is
        base_name = kwargs.pop("base_model_name_or_path", None)
        given = {}  # settings of the model, given as for any other
        for part in (config, config.base_config, config.get_text_config()):
            for key in ({one.name for one in fields(part)} - NOT_SETTINGS) & kwargs.keys():
                given[key] = kwargs[key]
                setattr(part, key, kwargs[key])
        kwargs = {key: value for key, value in kwargs.items() if key not in given}
        kwargs["config"] = config
        if not config.base_inside:
            return cls._on_a_base(pretrained_model_name_or_path, config, base_name, hub, kwargs)
        weight_files(
            pretrained_model_name_or_path, kwargs.get("variant"), hub
        )  # refuses what leads elsewhere
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        require_complete(sorted(filter(is_expert, info["missing_keys"])), sorted(info["unexpected_keys"]))
        model._finish()
        return (model, info) if wants_info else model

    @classmethod
    def _on_a_base(
        cls,
        name: Any,
        config: SaRDinEConfig,
        base_name: str | None,
        hub: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:
        left_out = (
            "config", "revision", "subfolder", "state_dict", "output_loading_info", "force_download", "adapter_kwargs", "variant",
        )  # fmt: skip
        tensors = read_tensors(name, weight_files(name, kwargs.get("variant"), hub), hub)
        base_name = base_name or config.base_model_name_or_path
        if not base_name:
            raise ArtifactError.of(
                "base model", None, rule="the folder holds experts alone, and does not say of which base",
                fix="pass base_model_name_or_path=...",
            )  # fmt: skip
        base = auto_class(config.base_config).from_pretrained(
            base_name,
            config=copy.deepcopy(config.base_config),
            **{key: value for key, value in kwargs.items() if key not in left_out},
        )
        check_base(config.base_fingerprint, base, base_name)
        require_fitting(config, _layouts(config) or find_sites(base), tensors)  # before room is made for them
        model = cls(config, base=base)
        for own_name, tensor in model.expert_tensors().items():
            tensor.copy_(tensors[own_name])
        try:
            model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        except OSError:  # there is none: the base's own
            model.generation_config = base.generation_config
        model._finish()
        info: dict[str, Any] = {
            "missing_keys": set(),
            "unexpected_keys": set(),
            "mismatched_keys": set(),
            "error_msgs": [],
        }
        return (model.eval(), info) if kwargs.get("output_loading_info") else model.eval()

    def _finish(self) -> None:
        for name, layer in self.srde.layers.items():
            delta, router = layer.srde_experts[ADAPTER], layer.srde_router[ADAPTER]
            if (
                delta.values.is_meta or router.weight.is_meta
            ):  # offloaded: looked at by nobody before it is used
                continue
            inside = ((delta.index >= 0) & (delta.index < delta.positions)).all()
            if (
                not inside
                or not torch.isfinite(delta.values).all()
                or not torch.isfinite(router.weight).all()
            ):
                raise ArtifactError.of(
                    f"experts of {name}", "damaged", rule="values must be finite, and places lie within the MLP",
                    fix="export the model again, or download it again",
                )  # fmt: skip
        keep_weights_unpacked(self)
        self.requires_grad_(False)


def _layouts(config: SaRDinEConfig) -> dict[str, MlpLayout]:
    known = {one.name for one in fields(MlpLayout)}
    made = [
        MlpLayout(**{k: tuple(v) if k == "ups" else v for k, v in layout.items() if k in known})
        for layout in config.layouts or ()
    ]
    return {name: made[number] for name, number in (config.mlps or {}).items()}
