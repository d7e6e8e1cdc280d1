"""The configuration of a SaRDinE model: a base model and its routed sparse experts."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from srde.tuner.names import NamedExperts

AUTO_MAP = {
    "AutoConfig": "configuration_sardine.SaRDinEConfig",
    "AutoModelForCausalLM": "modeling_sardine.SaRDinEForCausalLM",
}


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
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

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

    @property
    def max_position_embeddings(self) -> int | None:
        """The base's."""
        return getattr(self.get_text_config(), "max_position_embeddings", None)
