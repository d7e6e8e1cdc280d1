"""The configuration of an srde adapter, as PEFT knows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from peft import PeftConfig

from srde.errors import ConfigError
from srde.tuner.names import NamedExperts

Granularity = Literal["neuron", "element"]
MaskInit = Literal["random", "magnitude", "gradient", "learned"]

LOSS_COEFS = (
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "orthogonality_loss_coef",
    "sparsity_loss_coef",
)


@dataclass
class SrdeConfig(NamedExperts, PeftConfig):
    """Settings of Sparse Routed Delta Experts; pass it to `get_peft_model` or as `peft_config` to a TRL trainer.

    Raises:
        ConfigError: A field, or a pair of fields, breaks its rule. The message names field, value, rule and fix.
    """

    num_experts: int = field(default=8, metadata={"help": "Routed experts per MLP."})
    top_k: int = field(default=2, metadata={"help": "Experts that a token uses, 1 to num_experts."})
    initial_sparsity: float = field(
        default=0.05,
        metadata={"help": "Share of the MLP's weights that an expert rewrites when srde's trainer starts."},
    )
    target_sparsity: float = field(
        default=0.01,
        metadata={"help": "The share it prunes down to. Adapters made without srde's trainer start at it."},
    )
    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "The share at present; None means target_sparsity. srde's trainer keeps it up to date."
        },
    )
    granularity: Granularity = field(
        default="neuron",
        metadata={"help": "What an expert rewrites: whole hidden neurons, or single weight entries."},
    )
    mask_init: MaskInit = field(
        default="magnitude",
        metadata={
            "help": "How the rewritten neurons or entries are chosen. 'gradient' needs a calibration batch: "
            "call srde.calibrate_masks(model, batches) before the first forward. 'learned' is for srde's trainer, whose "
            "mask-learning phase chooses; until then, and elsewhere, it is 'magnitude'."
        },
    )
    mask_seed: int = field(default=0, metadata={"help": "Seed of mask_init='random'."})
    null_expert: bool = field(
        default=False,
        metadata={"help": "Adds a slot without a delta: a token may choose to leave the base untouched."},
    )
    num_shared_experts: int = field(
        default=0, metadata={"help": "Experts beside the routed ones that every token uses, with gate 1."}
    )
    router_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divides the router logits; above 1 a token's shares of its experts are more even."
        },
    )
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balancing loss."})
    router_z_loss_coef: float = field(default=0.001, metadata={"help": "Weight of the router z-loss."})
    orthogonality_loss_coef: float = field(
        default=0.001, metadata={"help": "Weight of the overlap of masks between experts."}
    )
    sparsity_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the mean delta magnitude."})
    expert_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the routed experts, in order: domains, as a rule; several experts may share one. srde's trainer "
            "fills them in."
        },
    )
    frozen_experts: list[int] | None = field(
        default=None, metadata={"help": "Routed experts that are used and never trained."}
    )
    disabled_experts: list[int] | None = field(
        default=None, metadata={"help": "Routed experts that are never chosen and never trained."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only the MLPs of these decoder layers; None means all."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Only these MLP modules (names, name endings, or one regular expression). None means every MLP "
            "of the (text) decoder, found by structure."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules beside the experts to train and save whole, as in LoraConfig."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "False in saved adapters: masks and values come from the file, and nothing runs before they have."
        },
    )
    base_fingerprint: list[float] | None = field(
        default=None,
        metadata={
            "help": "A few of the base model's numbers, filled in when the adapter is built; checked when it is loaded."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        from srde.tuner.register import register_srde

        self.peft_type = register_srde()
        self._check_numbers()
        self._check_choices()

    @property
    def current_sparsity(self) -> float:
        """The share of the MLP's weights that an expert rewrites now."""
        return self.target_sparsity if self.sparsity is None else self.sparsity

    @property
    def experts_in_all(self) -> int:
        """Routed and shared experts."""
        return self.num_experts + self.num_shared_experts

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and last the manifest of the adapter's files beside it.

        PEFT writes the tensors first and this last, and says so by passing `auto_mapping_dict`. Transformers writes the
        tensors later: then a manifest could only list those of an earlier save, so there is none.

        Raises:
            UsageError: The tensors were written as a pickle.
        """
        from srde.tuner.store import seal_adapter, unseal_adapter

        complete = "auto_mapping_dict" in kwargs
        if not complete:
            unseal_adapter(save_directory)
        PeftConfig.save_pretrained(replace(self, init_weights=False), save_directory, **kwargs)
        if complete:
            seal_adapter(save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SrdeConfig:
        """Reads the configuration; a local adapter folder is first checked against its manifest.

        Raises:
            ArtifactError: A file of the adapter is missing, truncated or altered.
        """
        from srde.tuner.store import check_adapter

        check_adapter(pretrained_model_name_or_path, subfolder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        assert isinstance(config, SrdeConfig)
        return config

    def _check_numbers(self) -> None:
        _whole(self, "num_experts", 1)
        _whole(self, "top_k", 1)
        _whole(self, "num_shared_experts", 0)
        _whole(self, "mask_seed", 0)
        if self.top_k > self.num_experts:
            raise ConfigError.of(
                "top_k", self.top_k,
                rule=f"a token can use at most num_experts={self.num_experts} experts",
                fix=f"set top_k to {self.num_experts} or fewer, or raise num_experts",
            )  # fmt: skip
        for name in ("initial_sparsity", "target_sparsity", "sparsity"):
            value = getattr(self, name)
            if value is None and name == "sparsity":
                continue
            if not _is_number(value) or not 0 < value <= 1:
                raise ConfigError.of(
                    name, value,
                    rule="a sparsity is the share of weights an expert rewrites, above 0 and at most 1",
                    fix="use 0.01 for 1 %",
                )  # fmt: skip
        if self.target_sparsity > self.initial_sparsity:
            raise ConfigError.of(
                "target_sparsity", self.target_sparsity,
                rule=f"training prunes, so the target cannot lie above initial_sparsity={self.initial_sparsity!r}",
                fix="raise initial_sparsity to at least the target, or lower the target",
            )  # fmt: skip
        for name in LOSS_COEFS:
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ConfigError.of(
                    name,
                    value,
                    rule="a loss weight is a finite number of at least 0",
                    fix="use 0 to switch it off",
                )

        if not _is_number(self.router_temperature) or self.router_temperature <= 0:
            raise ConfigError.of(
                "router_temperature",
                self.router_temperature,
                rule="it must be above 0",
                fix="use 1 for plain logits",
            )

    def _check_choices(self) -> None:
        for name, choices in (("granularity", get_args(Granularity)), ("mask_init", get_args(MaskInit))):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError.of(
                    name, value, rule=f"it must be one of {', '.join(choices)}", fix="pick one of them"
                )
        if self.mask_init == "learned" and self.granularity != "neuron":
            raise ConfigError.of(
                "mask_init", self.mask_init, rule="masks are learned over neurons, not over single entries",
                fix="use granularity='neuron', or mask_init='gradient'",
            )  # fmt: skip
        self._check_experts()
        layers = self.layers_to_transform
        layers = [layers] if isinstance(layers, int) else layers
        if layers is not None and (
            not layers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in layers)
        ):
            raise ConfigError.of(
                "layers_to_transform", self.layers_to_transform,
                rule="it must be a layer number or a list of them, counted from 0",
                fix="leave it out for all layers",
            )  # fmt: skip

    def _check_experts(self) -> None:
        names = self.expert_names
        if names is not None and (
            len(names) != self.num_experts
            or not all(
                isinstance(n, str) and n.strip() and not n.isdecimal() and not {*"=,"} & {*n} for n in names
            )
        ):
            raise ConfigError.of(
                "expert_names", names,
                rule=f"each of the {self.num_experts} routed experts has a name; none is empty or a number, or holds '=' or ','",
                fix="give as many names as experts, or leave them out",
            )  # fmt: skip
        for name in ("frozen_experts", "disabled_experts"):
            experts = getattr(self, name)
            known = range(self.num_experts)
            if experts is not None and not all(type(e) is int and e in known for e in experts):
                raise ConfigError.of(
                    name, experts, rule=f"routed experts are numbered 0 to {self.num_experts - 1}",
                    fix="name experts that exist",
                )  # fmt: skip
        if len(set(self.disabled_experts or ())) == self.num_experts and not self.null_expert:
            raise ConfigError.of(
                "disabled_experts", self.disabled_experts, rule="at least one expert must stay for the routers to choose",
                fix="leave one enabled; to switch all off, use model.disable_adapter()",
            )  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(config: SrdeConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError.of(
            name, value, rule=f"it must be a whole number of at least {least}", fix=f"use {least} or more"
        )


def config_fields() -> dict[str, str]:
    """Field names of `SrdeConfig` that are its own, with their help; the command line is made from it."""
    inherited = {f.name for f in fields(PeftConfig)}
    return {f.name: f.metadata["help"] for f in fields(SrdeConfig) if f.name not in inherited}
