"""The configuration of a SaRDinE model: a base model and its routed sparse experts."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from srde.errors import ConfigError
from srde.tuner.names import NamedExperts

AUTO_MAP = {
    "AutoConfig": "configuration_sardine.SaRDinEConfig",
    "AutoModelForCausalLM": "modeling_sardine.SaRDinEForCausalLM",
}

LAYOUT_NEEDS = {"ups", "down", "hidden_size", "intermediate_size"}


def _of_the_base(name: str, default: Any = None) -> property:
    """A setting that is the base's: read there, and set there."""

    def get(config: Any) -> Any:
        return getattr(config.get_text_config(), name, default)

    def put(config: Any, value: Any) -> None:
        setattr(config.get_text_config(), name, value)

    return property(get, put, doc=f"The base's `{name}`.")


class SaRDinEConfig(NamedExperts, PreTrainedConfig):
    """A base model's configuration, and what its experts are.

    Attributes:
        base_config: The base's own configuration.
        base_model_name_or_path: The base: a hub id or a folder.
        base_inside: Whether the base's weights are in the same folder; if not, they are loaded from where they are.
        num_experts: Routed experts per MLP.
        num_experts_per_tok: Experts that a token uses (`top_k` of `SrdeConfig`, a word that Transformers has for sampling).
        sparsity: Share of the MLP's weights that an expert rewrites.
        granularity: What an expert rewrites: "neuron" or "element".
        null_expert: Whether a token may choose no expert.
        num_shared_experts: Experts that every token uses.
        router_temperature: Divides the router logits.
        expert_names: Names of the routed experts.
        disabled_experts: Routed experts that are never chosen.
        frozen_experts: Routed experts that are never trained.
        layouts: How the MLPs compute, as fields of `MlpLayout`; the different ones.
        mlps: MLP in the base -> number of its layout. None: every MLP, found by structure when the model is built.
        base_fingerprint: A few of the base's numbers, to know it by.
    """

    model_type = "sardine"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    base_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_inside: bool = True
    num_experts: int = 8
    num_experts_per_tok: int = 2
    sparsity: float = 0.01
    granularity: str = "neuron"
    null_expert: bool = False
    num_shared_experts: int = 0
    router_temperature: float = 1.0
    expert_names: list[str] | None = None
    disabled_experts: list[int] | None = None
    frozen_experts: list[int] | None = None
    layouts: list[dict] | None = None
    mlps: dict[str, int] | None = None
    base_fingerprint: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.base_config is None and (self.layouts or self.mlps):
            raise ConfigError.of(
                "base_config",
                None,
                rule="experts are on a base, and this is its configuration",
                fix="export the model again",
            )
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self._check()

    def _check(self) -> None:
        """Refuses what no model can be built from.

        Raises:
            ConfigError: A field breaks its rule.
        """

        def require(name: str, holds: bool, rule: str) -> None:
            if not holds:
                raise ConfigError.of(
                    name, getattr(self, name), rule=rule, fix="export the model again, or download it again"
                )

        def whole(name: str, least: int) -> bool:
            return type(getattr(self, name)) is int and getattr(self, name) >= least

        def share(name: str, most: float) -> bool:
            value = getattr(self, name)
            return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most

        require("num_experts", whole("num_experts", 1), "it must be a whole number of at least 1")
        experts = range(self.num_experts)
        fits = whole("num_experts_per_tok", 1) and self.num_experts_per_tok <= self.num_experts
        require(
            "num_experts_per_tok", fits, f"it must be a whole number from 1 to num_experts={self.num_experts}"
        )
        require(
            "num_shared_experts", whole("num_shared_experts", 0), "it must be a whole number of at least 0"
        )
        require("sparsity", share("sparsity", 1), "it must be above 0 and at most 1")
        require("router_temperature", share("router_temperature", math.inf), "it must be above 0")
        require("granularity", self.granularity in ("neuron", "element"), "it must be neuron or element")
        names = self.expert_names
        named = names is None or (
            len(names) == self.num_experts and all(isinstance(name, str) for name in names)
        )
        require("expert_names", named, "there must be one for each routed expert")
        for name in ("disabled_experts", "frozen_experts"):
            known = all(type(e) is int and e in experts for e in getattr(self, name) or ())
            require(name, known, f"routed experts are numbered 0 to {self.num_experts - 1}")
        closed = len(set(self.disabled_experts or ())) == self.num_experts and not self.null_expert
        require("disabled_experts", not closed, "at least one expert must stay for the routers to choose")
        whole_layouts = isinstance(self.layouts or [], list) and all(
            isinstance(layout, dict) and not LAYOUT_NEEDS - layout.keys() for layout in self.layouts or ()
        )
        require("layouts", whole_layouts, f"each has at least {', '.join(sorted(LAYOUT_NEEDS))}")
        count = len(self.layouts or ())
        known = all(type(n) is int and 0 <= n < count for n in (self.mlps or {}).values())
        require("mlps", known, f"each names one of the {count} layouts by its number")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base's, whose cache and vocabulary are the model's."""
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def vocab_size(self) -> int:
        """The base's."""
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        """The base's."""
        return self.get_text_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """The base's."""
        return self.get_text_config().num_hidden_layers

    use_cache = _of_the_base("use_cache", True)
    tie_word_embeddings = _of_the_base("tie_word_embeddings", False)
    pad_token_id = _of_the_base("pad_token_id")
    bos_token_id = _of_the_base("bos_token_id")
    eos_token_id = _of_the_base("eos_token_id")

    @property
    def max_position_embeddings(self) -> int | None:
        """The base's."""
        return getattr(self.get_text_config(), "max_position_embeddings", None)
