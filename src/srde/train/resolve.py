"""What `srde train` would run with: its flags and files, checked and settled without loading data or a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from typing import Any

import yaml

from srde.errors import ConfigError, SrdeError
from srde.train.arguments import (
    DataArguments,
    ModelArguments,
    RunArguments,
    parse,
    parser,
)
from srde.train.config_file import files_of, settings
from srde.train.phases import Phases, plan_phases
from srde.train.schedules import unlock_span
from srde.train.start import start_of
from srde.tuner import SrdeConfig

SECRET = ("webhook_url", "hub_token")
MASK = "***"
_UNSAID = (
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "do_train", "do_eval", "do_predict", "local_rank"
)  # fmt: skip
"""Transformers' former names, which it keeps equal to the new ones and warns of, and what it has no use for here."""
_PLACEHOLDER = "-"


@dataclass(frozen=True)
class Resolved:
    """The settings of a run.

    Attributes:
        model: The base.
        data: The rows.
        experts: An `ExpertArguments`.
        run: All else.
        phases: When is what trained; None where `--num_train_epochs` leaves the number of steps to the data.
    """

    model: ModelArguments
    data: DataArguments
    experts: Any
    run: RunArguments
    phases: Phases | None


def resolve(argv: Sequence[str]) -> Resolved:
    """Reads flags and files as `srde train` does, and checks what can be checked without data and model.

    Raises:
        SrdeError: A setting breaks its rule; the message names its file, if it is from one.
    """
    found, _ = settings(argv, parser())
    try:
        model, data, experts, run = parse(argv)
        config = start_of(experts, run).config
        _require_pairs(run.domain_experts)
        phases = phases_of(run, config) if run.max_steps > 0 else None
    except SrdeError as error:
        file = files_of(found, str(error))
        if file is None and isinstance(
            error.__cause__, ValueError
        ):  # Transformers' words, which may not name the setting
            file = ", ".join(dict.fromkeys(one.file for one in found.values()))
        if not file:
            raise
        raise type(error)(f"{file}: {error}") from error
    return Resolved(model, data, experts, run, phases)


def phases_of(run: RunArguments, config: SrdeConfig) -> Phases:
    """The phases of a run whose number of steps is known.

    Raises:
        ConfigError: They do not fit into the steps, or something is asked of a phase that the run does not have.
    """
    continued = run.init_adapter is not None
    learn_masks = config.mask_init == "learned" and not continued
    if run.prune_by == "importance" and not learn_masks:
        raise ConfigError.of(
            "prune_by", "importance", rule="importance is what mask learning finds, and this run learns no masks",
            fix="pass --mask_init learned, or --prune_by magnitude",
        )  # fmt: skip
    if continued and run.mask_learning_steps:
        raise ConfigError.of(
            "mask_learning_steps",
            run.mask_learning_steps,
            rule="the masks are those of --init_adapter",
            fix="leave it out",
        )
    if run.train_router_only and run.delta_training_steps:
        raise ConfigError.of(
            "delta_training_steps", run.delta_training_steps, rule="they train the experts, and --train_router_only leaves them",
            fix="leave it out",
        )  # fmt: skip
    forces = run.supervised_experts or bool(run.train_experts)
    by_domain = forces or run.warm_start != "none"
    for name, given, needs, there in (
        ("expert_pretrain_steps", run.expert_pretrain_steps, "--supervised_experts", forces),
        ("unlock_steps", run.unlock_steps, "--progressive_unlock", run.progressive_unlock != "none"),
        ("domain_experts", run.domain_experts, "--supervised_experts or --warm_start", by_domain),
    ):  # fmt: skip
        if given and not there:
            raise ConfigError.of(
                name, given, rule=f"it does nothing without {needs}", fix=f"pass {needs}, or leave it out"
            )
    phases = plan_phases(
        run.max_steps,
        warm_up=run.phase_warmup_steps,
        mask_learning=run.mask_learning_steps,
        delta_training=run.delta_training_steps,
        pretraining=run.expert_pretrain_steps if forces else 0,
        learn_masks=learn_masks,
        routers_are_new=not continued,
    )
    start, end = unlock_span(phases, run.unlock_steps)
    if run.progressive_unlock != "none" and end > run.max_steps:
        raise ConfigError.of(
            "unlock_steps", run.unlock_steps,
            rule=f"unlocking begins at step {start}, and would end after max_steps={run.max_steps}",
            fix=f"use {max(run.max_steps - start, 1)} or less, or raise --max_steps",
        )  # fmt: skip
    return phases


def _require_pairs(entries: Sequence[str] | None) -> None:
    """YAML takes a comma in [..] for the end of an entry; which domains there are is known to the data only."""
    for entry in entries or ():
        if "=" not in entry:
            raise ConfigError.of(
                "domain_experts", entry, rule="an entry is a domain, '=' and experts",
                fix="write 'math=0,6', in a file in quotes"
            )  # fmt: skip


def changed(resolved: Resolved) -> dict[str, Any]:
    """The settings that differ from their defaults, as plain values, in the order of the help; secrets are masked."""
    return {name: value for name, (value, default) in _all(resolved).items() if value != default}


def unchanged(resolved: Resolved) -> dict[str, Any]:
    """The other settings."""
    return {name: value for name, (value, default) in _all(resolved).items() if value == default}


def as_yaml(values: dict[str, Any]) -> str:
    """Settings as a file that `--config` reads."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6) if values else ""


def _all(resolved: Resolved) -> dict[str, tuple[Any, Any]]:
    """Name -> (value, default) of every flag; both as they are when everything that follows from other settings is settled."""
    plain = RunArguments(output_dir=_PLACEHOLDER, use_cpu=resolved.run.use_cpu)
    result = {}
    for part, default in (
        (resolved.model, None), (resolved.data, None), (resolved.experts, None), (resolved.run, plain)
    ):  # fmt: skip
        for field in fields(part):
            if not field.init or field.name in _UNSAID:
                continue
            known = field.default if default is None else getattr(default, field.name)
            value = _plain(_as_given(part, field.name))
            known = None if known is MISSING else _plain(known)
            if field.name in ("output_dir", "use_cpu"):
                known = _plain(field.default)
            if default is not None and field.name == "eval_strategy":
                known = "auto"
            result[field.name] = (MASK if value and field.name in SECRET else value, known)
    run = resolved.run
    value, _ = result["eval_steps"]
    result["eval_steps"] = value, run.save_steps  # which it follows
    return result


def _as_given(part: Any, name: str) -> Any:
    """A value as a flag would say it, where settling has changed it."""
    if name == "eval_strategy" and part.evaluates_if_it_can:
        return "auto"
    if name == "train_file" and part.jsonl_data is not None and part.pretokenized_dir is None:
        return None  # `jsonl_data` says it
    return getattr(part, name)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value] or None  # an empty list is what no flag says
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return _plain(asdict(value))
    return value
