"""The phases of a run: what is trained when.

    warm_up              nothing; the baseline is measured
    mask_learning        which neurons each expert may rewrite
    expert_pretraining   the experts' values, every token forced to an expert of its domain; the routers by the same labels
    delta_training       the experts' values, tokens routed; the routers stay as they are
    joint                values and routers together

The lengths are those of the project's founding notes for runs of 5,000 steps and more (100, 500, 1,000); shorter runs have
them in proportion. Expert pre-training, where asked for, is the first part of delta training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from srde.errors import ConfigError

Name = Literal["warm_up", "mask_learning", "expert_pretraining", "delta_training", "joint"]
NAMES: tuple[Name, ...] = get_args(Name)

WARM_UP, MASK_LEARNING, DELTA_TRAINING, PRETRAINING = 100, 500, 1000, 500
FULL_LENGTH = 5000
"""Steps from which on the phases have their full lengths."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run.

    Attributes:
        name: What it is.
        start: Its first step.
        end: The step after its last.
    """

    name: Name
    start: int
    end: int

    @property
    def values(self) -> bool:
        """Whether the experts' values are trained."""
        return self.name in ("expert_pretraining", "delta_training", "joint")

    @property
    def routers(self) -> bool:
        """Whether the routers are trained."""
        return self.name in ("expert_pretraining", "joint")


@dataclass(frozen=True)
class Phases:
    """All phases of a run in order; those of no length are left out.

    Attributes:
        all: The phases.
        max_steps: Steps of the run.
    """

    all: tuple[Phase, ...]
    max_steps: int

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.all)

    def at(self, step: int) -> Phase:
        """The phase that step number `step`, counted from 0, belongs to; past the end, the last."""
        return next((phase for phase in self.all if step < phase.end), self.all[-1])

    def named(self, name: Name) -> Phase | None:
        """The phase of a name, if the run has it."""
        return next((phase for phase in self.all if phase.name == name), None)

    def steps(self, name: Name) -> int:
        """How many steps a phase has; 0 if the run does not have it."""
        phase = self.named(name)
        return phase.end - phase.start if phase else 0

    @property
    def first_trained(self) -> int:
        """The first step that trains values."""
        return next(phase.start for phase in self.all if phase.values)


def plan_phases(
    max_steps: int,
    *,
    warm_up: int | None = None,
    mask_learning: int | None = None,
    delta_training: int | None = None,
    pretraining: int | None = 0,
    learn_masks: bool = True,
    routers_are_new: bool = True,
) -> Phases:
    """The phases of a run.

    Args:
        max_steps: Steps in all.
        warm_up: Steps of the warm-up; None for the share of a full run.
        mask_learning: Steps of mask learning; likewise.
        delta_training: Steps of delta training, pre-training included; likewise.
        pretraining: Steps of expert pre-training; 0 for none; None for the share of a full run.
        learn_masks: Whether masks are learned at all; otherwise that phase has no steps unless some are given.
        routers_are_new: Whether delta training, where its steps are not given, has more than pre-training: routers that are
            trained already need not wait for the experts.

    Raises:
        ConfigError: A length is negative, pre-training is longer than a delta training that was given, masks are to be
            learned in no steps or not to be learned in some, or nothing is left to train in.
    """
    given = {
        "phase_warmup_steps": warm_up,
        "mask_learning_steps": mask_learning,
        "delta_training_steps": delta_training,
        "expert_pretrain_steps": pretraining,
    }
    for name, value in given.items():
        if value is not None and value < 0:
            raise ConfigError.of(
                name, value, rule="a phase has at least 0 steps", fix="use 0 to leave it out"
            )
    if mask_learning and not learn_masks:
        raise ConfigError.of(
            "mask_learning_steps", mask_learning, rule="masks are learned only with mask_init='learned'",
            fix="pass --mask_init learned, or leave the phase out",
        )  # fmt: skip
    if learn_masks and mask_learning == 0:
        raise ConfigError.of(
            "mask_learning_steps", 0, rule="mask_init='learned' needs steps to learn them in",
            fix="pass --mask_init magnitude, gradient or random, or leave --mask_learning_steps out",
        )  # fmt: skip
    share = min(max_steps / FULL_LENGTH, 1.0)
    first = _scaled(WARM_UP, share) if warm_up is None else warm_up
    second = mask_learning
    if second is None:
        second = max(1, _scaled(MASK_LEARNING, share)) if learn_masks else 0
    forced = max(1, _scaled(PRETRAINING, share)) if pretraining is None else pretraining
    if pretraining is None and delta_training is not None:
        forced = min(forced, delta_training)
    third = delta_training
    if third is None:
        third = max(_scaled(DELTA_TRAINING, share), forced) if routers_are_new else forced
    if forced > third:
        raise ConfigError.of(
            "expert_pretrain_steps", forced, rule=f"it is a part of delta training, which has {third} steps",
            fix="raise --delta_training_steps, or leave it out",
        )  # fmt: skip
    if first + second >= max_steps:
        raise ConfigError.of(
            "max_steps", max_steps, rule=f"the first {first + second} steps train nothing (warm-up and mask learning)",
            fix="raise --max_steps, or shorten --phase_warmup_steps and --mask_learning_steps",
        )  # fmt: skip
    given_too_long = (pretraining or 0) if delta_training is None else delta_training
    if first + second + given_too_long > max_steps:
        flag = "expert_pretrain_steps" if delta_training is None else "delta_training_steps"
        raise ConfigError.of(
            flag, given_too_long, rule=f"max_steps={max_steps} leaves {max_steps - first - second} steps for it",
            fix="raise --max_steps, or lower it",
        )  # fmt: skip
    lengths = (first, second, forced, third - forced, max_steps)
    phases, start = [], 0
    for name, length in zip(NAMES, lengths, strict=True):
        end = min(start + length, max_steps)
        if end > start:
            phases.append(Phase(name, start, end))
        start = end
    return Phases(tuple(phases), max_steps)


def _scaled(steps: int, share: float) -> int:
    return round(steps * share)
