"""The settings of `srde plan`: one dataclass per component, all of them flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

import torch
from transformers import HfArgumentParser

from srde.errors import refuse_unknown
from srde.plan.plan import SETTINGS, Request
from srde.tuner import SrdeConfig


@dataclass
class PlanArguments:
    """The base model, and the runs to plan for."""

    model_name_or_path: str = field(metadata={"help": "Hub id, folder or config.json of a model."})
    batch_size: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "Sequences at once: served, or per device in training."},
    )
    max_length: list[int] = field(
        default_factory=lambda: [1024],
        metadata={"help": "Tokens per sequence: the context, or the row trained on."},
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Type of activations, and of weights that are not quantised."}
    )
    optimizer: Literal["adamw", "adafactor"] = field(
        default="adamw", metadata={"help": "Optimizer of the adapter."}
    )
    packing: bool = field(
        default=True, metadata={"help": "Training rows hold several sequences each, as in srde train."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Shows the totals of training with it."}
    )
    bnb_4bit_use_double_quant: bool = field(default=False, metadata={"help": "Quantises NF4's scales too."})
    json: str | None = field(default=None, metadata={"help": "File for all figures, in bytes and FLOPs."})


ExpertArguments = make_dataclass(
    "ExpertArguments",
    [
        (
            f.name,
            list[int] | None if f.name == "layers_to_transform" else get_type_hints(SrdeConfig)[f.name],
            field(default=f.default, metadata=f.metadata),
        )
        for f in fields(SrdeConfig)
        if f.name in SETTINGS
    ],
)
"""The experts: the fields of `SrdeConfig` that a plan depends on, with its defaults and help."""


def parse(argv: Sequence[str]) -> tuple[PlanArguments, Request]:
    """Reads the flags of `srde plan`.

    Raises:
        ConfigError: A flag is unknown (the message names the nearest), or a value breaks its rule.
    """
    parser = HfArgumentParser((PlanArguments, ExpertArguments), prog="srde plan", allow_abbrev=False)
    arguments, experts, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True
    )
    refuse_unknown("plan", unknown, [flag for action in parser._actions for flag in action.option_strings])
    return arguments, as_request(arguments, experts)


def as_request(arguments: PlanArguments, experts: Any) -> Request:
    """The flags as `make_plan` takes them."""
    return Request(
        arguments.model_name_or_path,
        SrdeConfig(**asdict(experts)),
        dtype=getattr(torch, arguments.dtype),
        batch_sizes=tuple(arguments.batch_size),
        lengths=tuple(arguments.max_length),
        optimizer=arguments.optimizer,
        double_quant=arguments.bnb_4bit_use_double_quant,
        packing=arguments.packing,
    )
