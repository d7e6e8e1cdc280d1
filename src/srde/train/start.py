"""What a run starts from: new experts, or those of an adapter that there is."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, set_peft_model_state_dict

from srde.artifacts import MANIFEST_NAME
from srde.errors import ConfigError
from srde.tuner import SrdeConfig
from srde.tuner.experts import read_adapter
from srde.tuner.store import ADAPTER_FILES

if TYPE_CHECKING:
    import argparse

    from srde.train.arguments import RunArguments

STRUCTURE = (
    "num_experts", "top_k", "granularity", "null_expert", "num_shared_experts", "layers_to_transform", "target_modules"
)  # fmt: skip
"""Settings that an adapter has once and for all."""
MASKS = ("mask_init", "mask_seed")


logger = logging.getLogger(__name__)


@dataclass
class ContinueArguments:
    """What a run does to an adapter that there is."""

    init_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an adapter to start from: its experts, masks, routers and settings, instead of new ones."
        },
    )
    train_experts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Only these experts of --init_adapter, by name or number, are trained; all else stays bit for bit."
        },
    )
    train_router_only: bool = field(
        default=False,
        metadata={
            "help": "Trains the routers of --init_adapter, and leaves the experts bit for bit as they are."
        },
    )


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        config: The adapter's settings at the start.
        folder: The adapter that it starts from; None for new experts.
        only: The routed experts that alone are trained; None for all that are not frozen or switched off.
        notes: Sentences about what it starts from, and about what was asked for and is not done.
    """

    config: SrdeConfig
    folder: Path | None = None
    only: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    def put_into(self, model: PeftModel) -> None:
        """Gives a model made with `config` the numbers of the adapter.

        Raises:
            ArtifactError: They are not as they were saved.
        """
        if self.folder is not None:
            set_peft_model_state_dict(model, read_adapter(self.folder).tensors())


def start_of(experts: Any, args: RunArguments) -> Start:
    """What a run starts from.

    Args:
        experts: An `ExpertArguments`; those that `parse` made know which flags were given.
        args: The run.

    Raises:
        ConfigError: A setting breaks a rule, or contradicts the adapter.
        ArtifactError: The adapter is missing or damaged.
    """
    if args.init_adapter is None:
        for name in ("train_experts", "train_router_only"):
            if getattr(args, name):
                raise ConfigError.of(
                    name, getattr(args, name), rule="new experts are trained all together, with their routers",
                    fix="pass --init_adapter with the adapter whose experts they are",
                )  # fmt: skip
        return Start(starting_config(experts))
    folder = Path(args.init_adapter)
    if args.output_dir and folder.resolve() == Path(args.output_dir).resolve():
        raise ConfigError.of(
            "init_adapter", args.init_adapter, rule="it is --output_dir, and a run that is stopped must find its start again",
            fix="name another --output_dir",
        )  # fmt: skip
    old = read_adapter(folder).config
    given = _given(experts)
    _refuse_contradictions(experts, given, old, folder)
    only = _only(args, old)
    disabled = [e for e in old.disabled_experts or () if e not in (only or ())]
    config = replace(
        old,
        initial_sparsity=old.current_sparsity,
        target_sparsity=experts.target_sparsity if "target_sparsity" in given else old.current_sparsity,
        sparsity=old.current_sparsity,
        disabled_experts=disabled or None,
        inference_mode=False,
        init_weights=False,
        base_model_name_or_path=None,  # it may lie elsewhere now; PEFT fills it in, and warns of a change
        **{
            name: getattr(experts, name)
            for name in given - {*STRUCTURE, *MASKS, "initial_sparsity", "target_sparsity"}
        },
    )
    _refuse_idle(args, config, only)
    what = "all experts that are not frozen or disabled, and the routers"
    if args.train_router_only:
        what = "the routers alone"
    elif only:
        what = f"only expert {', '.join(f'{e} ({old.name_of(e)})' if old.expert_names else str(e) for e in only)}"
    notes = [f"starts from {folder}, and trains {what}"]
    for name in sorted(given & set(MASKS)):
        notes.append(f"--{name} is ignored: the masks are those of {folder}")
        logger.warning(notes[-1])
    return Start(config, folder, only, tuple(notes))


def starting_config(experts: Any) -> SrdeConfig:
    """The configuration at the start of training new experts, from `ExpertArguments`: at the initial sparsity."""
    settings = asdict(experts)
    if settings["granularity"] == "element" and settings["mask_init"] == "learned":
        settings["mask_init"] = "gradient"  # the nearest there is for single entries
    return SrdeConfig(task_type="CAUSAL_LM", sparsity=experts.initial_sparsity, **settings)


def given_flags(words: Sequence[str], flags: argparse.ArgumentParser) -> frozenset[str]:
    """The names of the flags among the words of a command line."""
    said = {word.partition("=")[0] for word in words if word.startswith("--")}
    return frozenset(action.dest for action in flags._actions if said & set(action.option_strings))


def adapter_digest(folder: str | Path) -> str:
    """What tells one saved adapter from another: the hash of its manifest, or of its files, where it has none."""
    folder = Path(folder)
    sealed = (folder / MANIFEST_NAME).is_file()
    names = (MANIFEST_NAME,) if sealed else ADAPTER_FILES
    return hashlib.sha256(
        b"".join(hashlib.sha256((folder / name).read_bytes()).digest() for name in names)
    ).hexdigest()


def _given(experts: Any) -> set[str]:
    """The settings of the experts that were given; those that are not the default, where nobody has counted."""
    names = {one.name for one in fields(experts)}
    counted = getattr(experts, "given", None)
    if counted is not None:
        return names & set(counted)
    return {
        one.name
        for one in fields(experts)
        if getattr(experts, one.name) != (None if one.default is MISSING else one.default)
    }


def _refuse_contradictions(experts: Any, given: set[str], old: SrdeConfig, folder: Path) -> None:
    here = {name: getattr(old, name) for name in STRUCTURE} | {"initial_sparsity": old.current_sparsity}
    if isinstance(here["layers_to_transform"], int):
        here["layers_to_transform"] = [here["layers_to_transform"]]
    for name in sorted(given & here.keys()):
        if getattr(experts, name) != here[name]:
            raise ConfigError.of(
                name, getattr(experts, name), rule=f"{folder} has {here[name]!r}, and is trained as it is",
                fix="leave it out, or train new experts without --init_adapter",
            )  # fmt: skip
    if "target_sparsity" in given and experts.target_sparsity > old.current_sparsity:
        raise ConfigError.of(
            "target_sparsity", experts.target_sparsity, rule=f"{folder} has {old.current_sparsity:g}, and training only prunes",
            fix=f"use {old.current_sparsity:g} or less, or leave it out",
        )  # fmt: skip


def _only(args: RunArguments, old: SrdeConfig) -> tuple[int, ...] | None:
    if not args.train_experts:
        return None
    if args.train_router_only:
        raise ConfigError.of(
            "train_router_only", True, rule="it leaves all experts as they are, and --train_experts trains some",
            fix="pass one of them",
        )  # fmt: skip
    only = tuple(sorted({e for name in args.train_experts for e in old.experts_named(name)}))
    if frozen := [e for e in only if e in (old.frozen_experts or ())]:
        raise ConfigError.of(
            "train_experts", args.train_experts, rule=f"expert {frozen[0]} is frozen in {args.init_adapter}",
            fix=f"run `srde experts freeze {frozen[0]} --undo --adapter {args.init_adapter}` first",
        )  # fmt: skip
    return only


def _refuse_idle(args: RunArguments, config: SrdeConfig, only: Sequence[int] | None) -> None:
    """Refuses what trains nothing, or what it must not."""
    idle = {*(config.frozen_experts or ()), *(config.disabled_experts or ())}
    if len(idle) == config.num_experts:
        raise ConfigError.of(
            "init_adapter", args.init_adapter, rule="all of its experts are frozen or disabled, and nothing is left to train",
            fix="run `srde experts freeze` or `srde experts disable` with --undo first",
        )  # fmt: skip
    if args.progressive_unlock != "none":
        raise ConfigError.of(
            "progressive_unlock", args.progressive_unlock, rule="it opens untrained experts one by one, and those of "
            "--init_adapter are in use", fix="leave it out; --train_experts chooses who is trained",
        )  # fmt: skip
    held = "--train_router_only" if args.train_router_only else "--train_experts" if only else None
    held = "frozen or disabled experts" if held is None and idle else held
    if held and config.target_sparsity != config.initial_sparsity:
        raise ConfigError.of(
            "target_sparsity", config.target_sparsity, rule=f"with {held} some experts must stay as they are, and all experts of "
            f"a layer rewrite as much: {config.initial_sparsity:g}", fix="leave it out",
        )  # fmt: skip
