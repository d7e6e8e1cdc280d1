"""Applies what changes over a run: phases, masks, warm start, temperature, locks, sparsity. One callback, one place.

Everything here is a function of the step, of the run's data and of a state that checkpoints keep (`tensors`); so a run that
goes on from a checkpoint does the same things at the same steps. What happens once, at the border of two phases, happens at the
*beginning* of the later phase's first step: a checkpoint written between the two has not seen it, and the resumed run does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from srde.train.held import Held
from srde.train.masks import MaskLearner
from srde.train.phases import Phase, Phases
from srde.train.schedules import LinearSchedule, SparsitySchedule, UnlockSchedule
from srde.train.warm_start import WarmStart, warm_start
from srde.tuner.calibrate import calibrate_masks
from srde.tuner.layer import SrdeLayer
from srde.tuner.prune import prune_adapter

PruneBy = Literal["magnitude", "taylor", "importance"]
_EMA = 0.9


@dataclass(frozen=True)
class Settings:
    """What a run changes over time.

    Attributes:
        phases: When is what trained.
        sparsity: How much an expert rewrites.
        temperature: The routers' temperature.
        unlock: How many experts are open.
        prune_by: What makes a neuron (or entry) worth keeping: the size of its change; that times the gradient (a running
            mean); or that times the sigmoid of the importance that mask learning found.
        warm_start: How the routers begin.
        mask_init: As in `SrdeConfig`.
        seed: Of masks and warm start.
        only: The routed experts that alone are trained, and their rows of the routers; None for all that are not frozen or
            disabled.
        routers_only: Trains no values at all.
    """

    phases: Phases
    sparsity: SparsitySchedule
    temperature: LinearSchedule
    unlock: UnlockSchedule
    prune_by: PruneBy = "taylor"
    warm_start: WarmStart = "none"
    mask_init: str = "magnitude"
    seed: int = 0
    only: tuple[int, ...] | None = None
    routers_only: bool = False


class Controller(TrainerCallback):
    """Applies the settings to one adapter.

    Args:
        model: The `PeftModel`.
        settings: What changes when.
        batches: Makes the same few batches of the run's data in every process, for warm start and gradient masks.
        expert_of: Maps `domain_ids` to experts, as `Supervision.experts` does, where domains are known; for warm start.
        say: Called with an event's name, the step and a sentence.
        adapter: The adapter's name.

    Attributes:
        phase: The phase of the step under way.
        learner: The mask learner, while masks are learned.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        *,
        batches: Callable[[], list[dict[str, Any]]],
        expert_of: Callable[..., Tensor] | None = None,
        say: Callable[[str, int, str], None] = lambda *_: None,
        adapter: str = "default",
    ) -> None:
        self.model, self.settings, self.adapter = model, settings, adapter
        self.batches, self.expert_of, self.say = batches, expert_of, say
        self.phase: Phase = settings.phases.at(0)
        self.learner: MaskLearner | None = None
        self.importance: dict[str, Tensor] = {}
        self.after_prune: Callable[[], None] = lambda: None
        self._said: str | None = None
        self._open: int | None = None
        config = model.peft_config[adapter]
        self.held = Held.of(config, settings.only)
        self._disabled = set(config.disabled_experts or ())
        self._frozen = {e for e in self.held.experts if e < config.num_experts} - self._disabled
        mask_phase = settings.phases.named("mask_learning")
        if mask_phase is not None and settings.mask_init == "learned":
            self.learner = MaskLearner(
                model, start=mask_phase.start, end=mask_phase.end, seed=settings.seed, adapter=adapter
            )

    # ---- what the trainer asks ------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[SrdeLayer]:
        """The layers that carry the adapter."""
        return [layer for layer in self.model.srde.layers.values() if self.adapter in layer.srde_experts]

    @property
    def sparsity(self) -> float:
        """The share of the MLPs' weights that an expert rewrites now."""
        return float(self.model.peft_config[self.adapter].current_sparsity)

    @property
    def open_experts(self) -> int:
        """How many experts are open for training."""
        return self.settings.unlock.num_experts if self._open is None else self._open

    @property
    def router_temperature(self) -> float:
        """The routers' temperature now."""
        return float(self.layers[0].srde_router[self.adapter].temperature)

    def drop_inactive_gradients(self) -> None:
        """Takes the gradients away from what this phase does not train, so that no optimizer moves it and no norm counts it."""
        trains_values = self.phase.values and not self.settings.routers_only
        own = set()
        for layer in self.layers:
            router, values = layer.srde_router[self.adapter], layer.srde_experts[self.adapter].values
            own |= {id(router.weight), id(values)}
            if not self.phase.routers:
                router.weight.grad = None
            if not trains_values:
                values.grad = None
            self.held.drop_gradients(layer, self.adapter)
            held = [*router.locked, *router.frozen]
            if held and values.grad is not None:
                values.grad[:, held] = 0
            if held and router.weight.grad is not None:
                router.weight.grad[held] = 0
        if not trains_values or self.held.others:
            for parameter in self.model.parameters():  # `modules_to_save` go with the values
                if not self.phase.values or id(parameter) not in own:
                    parameter.grad = None

    # ---- the trainer's events -------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Locked, frozen and disabled experts stay as they are, whatever momentum the optimizer has."""
        self.held.hold(kwargs["optimizer"], lambda: self.layers, self.adapter)
        if self.settings.unlock.kind != "none":
            self.model.srde.hold_locked(kwargs["optimizer"])
        self.phase = self.settings.phases.at(state.global_step)
        self._said = self.phase.name if state.global_step > self.phase.start else None
        self._apply(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enters the phase of the step about to begin."""
        step, settings = state.global_step, self.settings
        self.phase = settings.phases.at(step)
        warm_up = settings.phases.named("warm_up")
        if step == (warm_up.end if warm_up else 0):
            self._begin(step)
        mask_phase = settings.phases.named("mask_learning")
        if self.learner is not None and mask_phase is not None and step >= mask_phase.end:
            self.learner.finish()
            self.importance = self.learner.importance() if settings.prune_by == "importance" else {}
            self.learner = None
        self._apply(step)
        if self._said != self.phase.name:
            self._said = self.phase.name
            self.say("phase", step, f"{self.phase.name}, steps {self.phase.start} to {self.phase.end}")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follows magnitude x gradient while something is still to be pruned."""
        if self.settings.prune_by != "taylor" or self.sparsity <= self.settings.sparsity.target:
            return
        for layer in self.layers:
            delta = layer.srde_experts[self.adapter]
            if delta.values.grad is None:
                continue
            product = delta.values.detach() * delta.values.grad
            score = (product.sum((0, 3)) if product.ndim == 4 else product).abs()
            old = self.importance.get(layer.name)
            if old is not None:  # an expert without a gradient keeps its scores, or they would fade to ties
                score = torch.where((score != 0).any(-1, keepdim=True), _EMA * old + (1 - _EMA) * score, old)
            self.importance[layer.name] = score

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the mask learner, and prunes as the schedule says."""
        step = state.global_step
        if self.phase.name == "mask_learning" and self.learner is not None:
            self.learner.update(step - 1)
        wanted = self.settings.sparsity.at(step, self.settings.phases.max_steps)
        if wanted < self.sparsity and self.phase.values:
            self._prune(wanted, step, kwargs.get("optimizer"))

    # ---- what checkpoints keep --------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The state, beside the adapter itself."""
        learned = {} if self.learner is None else self.learner.state_dict()
        return {f"mask.{name}": value for name, value in learned.items()} | {
            f"importance.{name}": value for name, value in self.importance.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from a state."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}

        learned = under("mask.")
        if learned and self.learner is not None:
            self.learner.load_state_dict(learned)
        elif not learned:
            self.learner = None  # the masks have been given to the adapter already
        device = self.layers[0].srde_experts[self.adapter].index.device
        self.importance = {name: value.to(device) for name, value in under("importance.").items()}

    # ---- the changes themselves -------------------------------------------------------------------------------------

    def _begin(self, step: int) -> None:
        settings = self.settings
        if settings.warm_start == "none" and settings.mask_init != "gradient":
            return
        batches = self.batches()
        if settings.warm_start != "none":
            warm_start(
                self.model,
                batches,
                settings.warm_start,
                expert_of=self.expert_of,
                seed=settings.seed,
                adapter=self.adapter,
                keep=self.held.rows,
            )
            self.say("warm_start", step, f"the routers start from {settings.warm_start}")
        if settings.mask_init == "gradient":
            keys = ("input_ids", "labels", "attention_mask", "position_ids", "use_cache")
            device = next(self.model.parameters()).device
            kept = [{k: v for k, v in batch.items() if k in keys} for batch in batches]
            kept = [
                {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in kept
            ]
            calibrate_masks(self.model, kept, self.adapter)

    def _apply(self, step: int) -> None:
        settings = self.settings
        temperature = settings.temperature.at(step)
        pretrained = settings.phases.named("expert_pretraining")
        opened = settings.unlock.at(step) if self.phase.values else settings.unlock.num_experts
        if self.phase.name == "expert_pretraining":
            opened = settings.unlock.num_experts
        rest = tuple(range(opened, settings.unlock.num_experts))
        for layer in self.layers:
            router = layer.srde_router[self.adapter]
            router.temperature = temperature
            locked, frozen = ((), rest) if pretrained else (rest, ())
            router.locked = tuple(sorted({*locked, *self._disabled}))
            router.frozen = tuple(sorted({*frozen, *self._frozen} - set(router.locked)))
        if self._open is not None and opened != self._open:
            self.say("unlock", step, f"{opened} of {settings.unlock.num_experts} experts are open")
        self._open = opened

    def _prune(self, wanted: float, step: int, optimizer: Any) -> None:
        before, scores = self.sparsity, None
        if self.importance:
            scores = {layer.name: self._score(layer) for layer in self.layers}
        kept = prune_adapter(self.model, wanted, self.adapter, optimizer, scores)
        for name, score in self.importance.items():
            self.importance[name] = score.gather(-1, kept[name])
        self.after_prune()
        self.say("prune", step, f"sparsity {before:.3%} -> {wanted:.3%}")

    def _score(self, layer: SrdeLayer) -> Tensor:
        importance = self.importance.get(layer.name)
        if importance is None:  # it has had no gradient yet
            return layer.srde_experts[self.adapter].size()
        if self.settings.prune_by == "taylor":
            return importance
        return layer.srde_experts[self.adapter].size() * importance.sigmoid()
