"""The settings of `srde train`: one dataclass per component, all of them flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from srde.errors import ConfigError, DataError, SrdeError, refuse_unknown
from srde.train.config_file import expand_config
from srde.train.start import ContinueArguments, given_flags
from srde.tuner import SrdeConfig


@dataclass
class ModelArguments:
    """The frozen base model."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or folder of a causal language model.", "aliases": ["--model_name"]}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the base's weights: auto (the checkpoint's), float32, bfloat16, float16."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention backend of Transformers: sdpa, flash_attention_2, eager, ...; its own choice, if not given."
        },
    )
    quantization: Literal["none", "nf4", "int8"] = field(
        default="none",
        metadata={"help": "Loads the base quantised: nf4 (bitsandbytes), int8 (torchao)."},
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
    jsonl_data: str | None = field(
        default=None,
        metadata={
            "help": "The same as --train_file; beside --pretokenized_dir, the rows that the set was made from: they must be "
            "there, and are not read again, since the set has their tokens and domains."
        },
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
        if self.jsonl_data is not None:
            if not Path(self.jsonl_data).is_file():
                raise DataError.at(self.jsonl_data, None, "file", "does not exist")
            if self.train_file not in (None, self.jsonl_data):
                raise ConfigError.of(
                    "jsonl_data", self.jsonl_data, rule="it is another name of --train_file, which is given too",
                    fix="pass one of them",
                )  # fmt: skip
            if self.pretokenized_dir is None:
                self.train_file = self.jsonl_data
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


_NOT_HERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "push_to_hub": ((False,), "the adapter in --output_dir can be uploaded as it is"),
    "load_best_model_at_end": ((False,), "the best adapter is in checkpoint-best"),
    "metric_for_best_model": ((None, "loss", "eval_loss"), "the best is the lowest held-out loss"),
    "greater_is_better": ((None, False), "the best is the lowest held-out loss"),
    "save_only_model": ((False,), "a checkpoint has all that a run needs to go on"),
    "train_sampling_strategy": (("random",), "packed sets have --data_order"),
}
"""Flags of Transformers that would have no effect: the values that there can be, and what there is instead of others."""
_BESIDE_MUON = ("adamw_torch", "adamw_torch_fused")


@dataclass
class RunArguments(ContinueArguments, TrainingArguments):
    """Transformers' `TrainingArguments` with defaults that suit experts on a frozen base, and what srde adds."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the adapter and the run."})
    max_steps: int = field(
        default=-1,
        metadata={
            "help": "Optimizer steps; the phases' lengths follow from it. 5,000, without --num_train_epochs too."
        },
    )
    num_train_epochs: float = field(
        default=-1, metadata={"help": "Passes over the data, where --max_steps is not given."}
    )
    learning_rate: float = field(
        default=3e-3, metadata={"help": "Peak learning rate of the experts and routers."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.05,
        metadata={"help": "Steps, or below 1 the share of steps, over which the learning rate rises."},
    )
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "(Packed) rows per step and device."}
    )
    per_device_eval_batch_size: int = field(
        default=1,
        metadata={"help": "(Packed) rows per evaluation step and device; packed ones are laid end to end."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hides numbers that are not finite from the log; --nan_policy is for them."},
    )
    save_steps: float = field(default=500, metadata={"help": "Steps between two checkpoints."})
    eval_strategy: str = field(
        default="auto",
        metadata={
            "help": "When to measure held-out rows: no, steps, epoch; auto is steps with --eval_file, else no."
        },
    )
    eval_steps: float | None = field(
        default=None, metadata={"help": "Steps between two evaluations; those of --save_steps, if not given."}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers: none, tensorboard, wandb, trackio, ..."},
    )
    resume_from_checkpoint: str | None = field(
        default="auto",
        metadata={
            "help": "auto goes on from the newest checkpoint that verifies; none begins anew; or a checkpoint's folder."
        },
    )
    allow_changed: list[str] | None = field(
        default=None,
        metadata={"help": "Settings that may differ from those of the checkpoint that the run goes on from."},
    )
    phase_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps that train nothing and measure the base; 100 in 5,000 and more, fewer in proportion."
        },
    )
    mask_learning_steps: int | None = field(
        default=None,
        metadata={"help": "Steps that learn which neurons each expert rewrites; 500 in proportion."},
    )
    delta_training_steps: int | None = field(
        default=None,
        metadata={"help": "Steps that train the experts and leave the routers; 1,000 in proportion."},
    )
    supervised_experts: bool = field(
        default=False,
        metadata={
            "help": "Pre-trains all experts side by side first, every token forced to an expert of its domain."
        },
    )
    expert_pretrain_steps: int | None = field(
        default=None, metadata={"help": "Steps that --supervised_experts lasts; 500 in proportion."}
    )
    domain_experts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Experts of a domain, as in math=0,6 code=2; domain d has expert d, where none is given."
        },
    )
    warm_start: Literal["none", "kmeans", "domains"] = field(
        default="none",
        metadata={
            "help": "How the routers begin: at random; from clusters of hidden states (--warm_start alone); from domains."
        },
    )
    progressive_unlock: Literal["none", "linear", "warmup"] = field(
        default="none",
        metadata={
            "help": "Opens the experts one after the other (linear), or one first and then all (warmup)."
        },
    )
    unlock_steps: int | None = field(
        default=None,
        metadata={"help": "Steps over which experts are opened; a third of those that route, if not given."},
    )
    router_temperature_start: float | None = field(
        default=None,
        metadata={
            "help": "Router temperature at first; falls to --router_temperature by the middle of the run."
        },
    )
    prune_by: Literal["magnitude", "taylor", "importance"] = field(
        default="taylor",
        metadata={
            "help": "What is kept when sparsity falls: the largest changes; changes times gradients; changes times the "
            "sigmoid of learned importance."
        },
    )
    torch_compile: bool = field(
        default=False, metadata={"help": "Compiles the model (torch.compile).", "aliases": ["--compile"]}
    )
    use_muon: bool = field(
        default=False, metadata={"help": "Muon for neuron deltas and routers, AdamW for the rest."}
    )
    nan_policy: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "At a loss or gradient that is not finite: stop, or skip the step."}
    )
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps that --nan_policy skip may skip."})
    heartbeat_steps: int = field(default=50, metadata={"help": "Steps between two signs of life."})
    webhook_url: str | None = field(
        default=None,
        metadata={"help": "Discord, Slack or other address for notifications; $WEBHOOK_URL, if not given."},
    )
    webhook_allow_private: bool = field(
        default=False, metadata={"help": "Also notifies addresses of this machine and of private networks."}
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ConfigError.of(
                "output_dir", self.output_dir, rule="a run needs a folder to save to", fix="pass --output_dir"
            )
        for name, least in (
            ("expert_pretrain_steps", 0), ("unlock_steps", 1), ("max_skipped_steps", 0), ("heartbeat_steps", 1)
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError.of(
                    name, value, rule=f"it must be at least {least}", fix=f"use {least} or more"
                )
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError.of("max_steps", self.max_steps, rule="it must be at least 1", fix="use 5000")
        if self.num_train_epochs <= 0 and self.max_steps == -1:
            self.max_steps = 5000
        if self.router_temperature_start is not None and self.router_temperature_start <= 0:
            raise ConfigError.of(
                "router_temperature_start",
                self.router_temperature_start,
                rule="it must be above 0",
                fix="use 2",
            )
        for name, (values, instead) in _NOT_HERE.items():
            if getattr(self, name) not in values:
                raise ConfigError.of(
                    name,
                    getattr(self, name),
                    rule="srde train does not do this",
                    fix=f"leave it out; {instead}",
                )
        if self.use_muon and str(getattr(self.optim, "value", self.optim)) not in _BESIDE_MUON:
            raise ConfigError.of(
                "optim", str(self.optim), rule="--use_muon chooses the optimizer", fix="pass one of them"
            )
        if self.fp16:
            raise ConfigError.of(
                "fp16", True, rule="float16 is not wide enough for the gradients of a frozen model's experts",
                fix="use --bf16, or --dtype float16 for the base alone",
            )  # fmt: skip
        if self.eval_strategy == "auto":  # settled by the run, which knows whether there are rows to measure
            self.eval_strategy = "no"
            self.evaluates_if_it_can = True
        else:
            self.evaluates_if_it_can = False
        self.eval_steps = self.save_steps if self.eval_steps is None else self.eval_steps
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As Transformers', for trackers: the webhook's address is a secret, like the tokens that it hides itself."""
        found: dict[str, Any] = super().to_dict()
        return found | ({"webhook_url": "<WEBHOOK_URL>"} if found.get("webhook_url") else {})

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"

    __repr__ = __str__


EXPERT_FIELDS = (
    "num_experts", "top_k", "initial_sparsity", "target_sparsity", "granularity", "mask_init", "mask_seed",
    "null_expert", "num_shared_experts", "router_temperature", "router_aux_loss_coef", "router_z_loss_coef",
    "orthogonality_loss_coef", "sparsity_loss_coef", "layers_to_transform", "target_modules",
)  # fmt: skip
_DEFAULTS = {"mask_init": "learned"}
_AS_FLAG = {"layers_to_transform": list[int] | None, "target_modules": list[str] | None}

ExpertArguments = make_dataclass(
    "ExpertArguments",
    [
        (
            f.name,
            _AS_FLAG.get(f.name) or get_type_hints(SrdeConfig)[f.name],
            field(default=_DEFAULTS.get(f.name, f.default), metadata=f.metadata),
        )
        for f in fields(SrdeConfig)
        if f.name in EXPERT_FIELDS
    ],
)
"""The experts: the fields of `SrdeConfig` that are set by hand, with its help; masks are learned, if nothing else is said."""


class _Flags(HfArgumentParser):
    """Says what is wrong in one line, and not all flags that there are."""

    def error(self, message: str) -> NoReturn:
        """Ends the process as argparse does."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> HfArgumentParser:
    """The flags of `srde train`."""
    return _Flags(
        (ModelArguments, DataArguments, ExpertArguments, RunArguments), prog="srde train", allow_abbrev=False
    )


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, Any, RunArguments]:
    """Reads the flags of `srde train`, and the file of `--config`, whose settings they override.

    Raises:
        ConfigError: A flag or a key of the file is unknown (the message suggests the nearest), or a value breaks its rule.
    """
    flags = parser()
    try:
        words = expand_config(list(argv), flags)
        model, data, experts, run, unknown = flags.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        experts.given = given_flags(words, flags)
    except SrdeError:
        raise
    except ValueError as error:  # what Transformers says about its own settings
        names = " ".join(
            word.partition("=")[0] for word in argv if word.startswith("--")
        )  # values may be secrets
        raise ConfigError.of(
            "settings",
            names,
            rule=f"Transformers refuses them: {str(error).rstrip('.')}",
            fix="correct them; settings for a machine with other devices are checked with --use_cpu",
        ) from error
    refuse_unknown(
        "train", unknown, [option for action in flags._actions for option in action.option_strings]
    )
    return model, data, experts, run
