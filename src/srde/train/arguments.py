"""The settings of `srde train`: one dataclass per component, all of them flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from srde.errors import ConfigError, refuse_unknown
from srde.tuner import SrdeConfig


@dataclass
class ModelArguments:
    """The frozen base model."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a causal language model."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the base's weights: auto (the checkpoint's), float32, bfloat16, float16."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention backend of Transformers, e.g. sdpa."}
    )


@dataclass
class DataArguments:
    """The rows to train on."""

    train_file: str | None = field(
        default=None, metadata={"help": "JSONL with rows of messages, prompt and response, or text."}
    )
    pretokenized_dir: str | None = field(
        default=None, metadata={"help": "Packed set of `srde data build`, instead of --train_file."}
    )
    data_order: Literal["shuffled", "balanced", "curriculum"] = field(
        default="shuffled",
        metadata={
            "help": "Order of a packed set: shuffled; balanced by the domains' trained tokens; from short to long responses."
        },
    )
    eval_file: str | None = field(
        default=None,
        metadata={
            "help": "JSONL whose loss is measured at --eval_strategy; a packed set's held-out rows, if not given."
        },
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "Ends the run at a row of --train_file that breaks a rule, or leaves it out and counts it."
        },
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens per packed row; longer rows are left out, and their number is said."},
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Packs several rows into one, isolated from each other. Models that cannot isolate get padding."
        },
    )

    def __post_init__(self) -> None:
        if (self.train_file is None) == (self.pretokenized_dir is None):
            raise ConfigError.of(
                "train_file",
                self.train_file,
                rule="a run has either rows to tokenise or a packed set",
                fix="pass one of --train_file and --pretokenized_dir",
            )
        if self.train_file is not None and self.data_order != "shuffled":
            raise ConfigError.of(
                "data_order",
                self.data_order,
                rule="only packed sets have an order of their own",
                fix="build one with `srde data build` and pass --pretokenized_dir",
            )
        if self.max_length < 2:
            raise ConfigError.of(
                "max_length",
                self.max_length,
                rule="a row needs at least 2 tokens to have one to predict",
                fix="use 1024",
            )


@dataclass
class RunArguments(TrainingArguments):
    """Transformers' `TrainingArguments` with defaults that suit experts on a frozen base."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the adapter and the run."})
    learning_rate: float = field(
        default=3e-3, metadata={"help": "Peak learning rate of the experts and routers."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps, or below 1 the share of steps, of warm-up."}
    )
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "(Packed) rows per step and device."}
    )
    per_device_eval_batch_size: int = field(
        default=1,
        metadata={"help": "(Packed) rows per evaluation step and device; packed ones are laid end to end."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    supervised_experts: bool = field(
        default=False,
        metadata={
            "help": "Pre-trains all experts side by side first, every token forced to the expert of its domain."
        },
    )
    expert_pretrain_steps: int = field(
        default=500, metadata={"help": "Steps that --supervised_experts lasts."}
    )
    save_strategy: str = field(
        default="no", metadata={"help": "When to write checkpoints beside the final adapter."}
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ConfigError.of(
                "output_dir", self.output_dir, rule="a run needs a folder to save to", fix="pass --output_dir"
            )
        if self.expert_pretrain_steps < 0:
            raise ConfigError.of(
                "expert_pretrain_steps",
                self.expert_pretrain_steps,
                rule="it must be at least 0",
                fix="leave --supervised_experts out for none",
            )
        super().__post_init__()


_BY_HAND = (
    "num_experts", "top_k", "initial_sparsity", "target_sparsity", "granularity", "mask_init", "mask_seed", "null_expert",
    "num_shared_experts", "router_aux_loss_coef", "router_z_loss_coef", "orthogonality_loss_coef", "sparsity_loss_coef",
    "layers_to_transform", "target_modules",
)  # fmt: skip
_AS_FLAG = {"layers_to_transform": list[int] | None, "target_modules": list[str] | None}

ExpertArguments = make_dataclass(
    "ExpertArguments",
    [
        (
            f.name,
            _AS_FLAG.get(f.name) or get_type_hints(SrdeConfig)[f.name],
            field(default=f.default, metadata=f.metadata),
        )
        for f in fields(SrdeConfig)
        if f.name in _BY_HAND
    ],
)
"""The experts: the fields of `SrdeConfig` that are set by hand, with its defaults and help."""


def starting_config(experts: Any) -> SrdeConfig:
    """The configuration at the start of training, from `ExpertArguments`: at the initial sparsity."""
    return SrdeConfig(task_type="CAUSAL_LM", sparsity=experts.initial_sparsity, **asdict(experts))


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, Any, RunArguments]:
    """Reads the flags of `srde train`.

    Raises:
        ConfigError: A flag is unknown (the message suggests the nearest), or a value breaks its rule.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ExpertArguments, RunArguments), prog="srde train", allow_abbrev=False
    )
    model, data, experts, run, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True
    )
    flags = [option for action in parser._actions for option in action.option_strings]
    refuse_unknown("train", unknown, flags)
    return model, data, experts, run
