"""What optimizers and engines cannot do, refused before it would go wrong in silence or late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srde.errors import ConfigError
from srde.train.arguments import RunArguments
from srde.train.phases import Phases
from srde.tuner import SrdeConfig

_PRUNABLE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers whose state is of the parameters' own shape."""


def require_prunable(config: SrdeConfig, args: RunArguments) -> None:
    """Refuses an optimizer whose state cannot shrink with the parameters, where they will.

    Raises:
        ConfigError: Sparsity is to fall under such an optimizer.
    """
    name = getattr(args.optim, "value", str(args.optim))
    if config.initial_sparsity != config.target_sparsity and not args.use_muon and name not in _PRUNABLE:
        raise ConfigError.of(
            "optim", name, rule="its state cannot be pruned, and sparsity falls during the run",
            fix=f"use one of {', '.join(_PRUNABLE)} or --use_muon, or set --initial_sparsity to --target_sparsity",
        )  # fmt: skip


def require_same_course(saved: Mapping[str, Any], phases: Phases, step: int) -> None:
    """Refuses to go on with other phases than the run began with, where that would repeat or leave out what is done once:
    warm start and mask learning.

    Args:
        saved: The identity of the checkpoint's run.
        phases: The phases now.
        step: The checkpoint's step.

    Raises:
        ConfigError: The first steps that train nothing are not over in both.
    """
    flags = {"phase_warmup_steps": "warm_up", "mask_learning_steps": "mask_learning"}
    before = [int(saved.get(flag) or 0) for flag in flags]
    now = [phases.steps(name) for name in flags.values()]  # type: ignore[arg-type]
    if before != now and (step < sum(before) or step < phases.first_trained):
        raise ConfigError.of(
            "phases", now, rule=f"the run is at step {step} and began with {before} steps of warm-up and masks, done once",
            fix=f"pass --phase_warmup_steps {before[0]} and --mask_learning_steps {before[1]}",
        )  # fmt: skip


def require_whole(config: SrdeConfig, args: RunArguments) -> None:
    """Refuses what needs whole parameters, under engines that hold them in parts.

    Raises:
        ConfigError: Sparsity is to fall, experts are to be held, or Muon is to be used.
    """
    rule = "FSDP and DeepSpeed hold parameters in parts"
    if config.initial_sparsity != config.target_sparsity:
        raise ConfigError.of(
            "initial_sparsity", config.initial_sparsity, rule=f"{rule}, which cannot be pruned",
            fix=f"pass --initial_sparsity {config.target_sparsity:g} too, or train with DDP",
        )  # fmt: skip
    if args.progressive_unlock != "none":
        raise ConfigError.of(
            "progressive_unlock", args.progressive_unlock, rule=f"{rule}, of which experts cannot be held back",
            fix="leave it out, or train with DDP",
        )  # fmt: skip
    if args.train_experts or config.frozen_experts or config.disabled_experts:
        raise ConfigError.of(
            "init_adapter", args.init_adapter, rule=f"{rule}, of which frozen and disabled experts cannot be held",
            fix="train with DDP",
        )  # fmt: skip
    if args.use_muon:
        raise ConfigError.of(
            "use_muon", True, rule=f"{rule}, and Muon needs whole matrices", fix="train with DDP"
        )


def require_plain(config: SrdeConfig, args: RunArguments, phases: Phases) -> None:
    """Refuses what needs a place between the gradients and the optimizer's step: DeepSpeed has none.

    Raises:
        ConfigError: Masks are to be learned, routers or experts to be set or held, or steps to be skipped.
    """
    rule = "DeepSpeed steps as soon as it has the gradients"
    if config.mask_init == "learned":
        raise ConfigError.of(
            "mask_init",
            "learned",
            rule=f"{rule}, and mask learning is no such step",
            fix="pass --mask_init gradient",
        )
    if args.warm_start != "none":
        raise ConfigError.of(
            "warm_start", args.warm_start, rule="DeepSpeed has copied the routers' weights before the run begins",
            fix="leave it out",
        )  # fmt: skip
    if args.train_router_only:
        raise ConfigError.of(
            "train_router_only",
            True,
            rule=f"{rule}, so that experts cannot be held meanwhile",
            fix="train with DDP",
        )
    if phases.named("delta_training") is not None:
        raise ConfigError.of(
            "delta_training_steps", args.delta_training_steps, rule=f"{rule}, so that routers cannot be held meanwhile",
            fix="pass --delta_training_steps 0, or the number of --expert_pretrain_steps",
        )  # fmt: skip
    if args.nan_policy == "skip":
        raise ConfigError.of(
            "nan_policy", "skip", rule=f"{rule}, and none can be skipped", fix="leave it out"
        )
