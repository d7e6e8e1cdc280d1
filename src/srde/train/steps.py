"""One optimizer step of `srde train`: by phase, in parts where memory is short, never with numbers that are not finite."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from srde.data.tokenize import IGNORE
from srde.errors import TrainingError
from srde.train.memory import means_out_of_memory, out_of_memory, parts
from srde.train.trainer import SrdeTrainer

if TYPE_CHECKING:
    from srde.train.control import Controller
    from srde.train.means import Means
    from srde.train.record import Record
    from srde.train.state import RunState

BAD_BATCHES_FILE = "bad_batches.jsonl"
MOST_HALVINGS = 10


class StepTrainer(SrdeTrainer):
    """`SrdeTrainer` whose steps follow the phases.

    Attributes:
        controller: Applies phases and schedules.
        record: Writes down what happens.
        run: What the run remembers.
        nan_policy: What to do about numbers that are not finite: "stop", or "skip" the step.
        max_skipped_steps: How many steps may be skipped.
        micro_batches: Those of the step under way.
    """

    controller: Controller
    record: Record
    run: RunState
    nan_policy: Literal["stop", "skip"] = "stop"
    max_skipped_steps: int = 10
    micro_batches: list[dict[str, Any]]
    _rows: list[list[int]]
    _place: int
    _step_loss: Tensor | None
    _means_before: Means
    _load: Any

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step; remembers them, and which rows they are of."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._rows = [batch.pop("row_ids").tolist() if "row_ids" in batch else [] for batch in batches]
        self.micro_batches, self._place = list(batches), 0
        self._means_before, self._step_loss = self.means.copy(), None
        self._load = None
        return batches, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch, as the phase has it: only forward, for the masks, or for the experts."""
        place = self._place
        self._place += 1
        try:
            return self._micro_batch(model, inputs, num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if not means_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # the frames of the failed step hold its activations
        return self._in_smaller_parts(model, place, num_items_in_batch, failure)

    def _micro_batch(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> Tensor:
        name = self.controller.phase.name
        total = torch.zeros((), device=self.args.device)
        trained = _trained(inputs)
        for part in parts(inputs, self.run.halvings):
            self.share = _trained(part) / max(trained, 1)
            if name == "warm_up":
                with torch.no_grad(), self.without_experts():
                    self.compute_loss(self.model, self._prepare_inputs(dict(part)), num_items_in_batch=items)
            elif name == "mask_learning" and self.controller.learner is not None:
                with self._forcing(part), self.controller.learner.listening():
                    super().training_step(self.model, dict(part), items)
            else:
                super().training_step(model, dict(part), items)
            # without a count of items each micro-batch has a mean of its own
            scale = 1 / self.current_gradient_accumulation_steps if items is None else 1.0
            total = total + self.language_loss * scale
        self.share = 1.0
        self._step_loss = total if self._step_loss is None else self._step_loss + total
        return total

    def _forcing(self, batch: dict[str, Any]) -> Any:
        """Experts by domain while masks are learned, if domains and their experts are known."""
        if self.supervision is None or "domain_ids" not in batch:
            return nullcontext()
        forced = self.supervision.experts(
            batch["domain_ids"], batch.get("position_ids"), self.state.global_step
        )
        return self.model.srde.force_experts(forced)

    def without_experts(self) -> Any:
        """The model as its base."""
        return self.model.disable_adapter()

    def _in_smaller_parts(self, model: nn.Module, place: int, items: Any, error: BaseException) -> Tensor:
        """Does the step again from its first micro-batch, in halves, then quarters, until it fits."""
        batch = self.micro_batches[place]
        if self.args.world_size > 1:
            raise out_of_memory(batch, error) from error
        while True:
            fitting = parts(batch, self.run.halvings + 1)
            if len(fitting) == len(parts(batch, self.run.halvings)) or self.run.halvings >= MOST_HALVINGS:
                raise out_of_memory(fitting[0], error) from error
            self.run.halvings += 1
            self.record.event(
                "out_of_memory", self.state.global_step,
                f"micro-batches are run in {2**self.run.halvings} parts from now on; the effective batch is the same",
            )  # fmt: skip
            model.zero_grad(set_to_none=True)
            if self.controller.learner is not None:
                self.controller.learner.gains.clear()
            self.means, self._step_loss, self._load = self._means_before.copy(), None, None
            torch.cuda.empty_cache()
            try:
                for earlier in self.micro_batches[: place + 1]:
                    loss = self._micro_batch(model, earlier, items)
                return loss
            except (RuntimeError, MemoryError) as again:
                if not means_out_of_memory(again):
                    raise
                error = again.with_traceback(None)

    # ---- before and after the optimizer -----------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.controller.drop_inactive_gradients()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        norm = self._total_norm()
        if norm.isfinite():  # otherwise clipping would spread what is not finite over all gradients
            parameters = [p for p in model.parameters() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _total_norm(self) -> Tensor:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.controller.drop_inactive_gradients()
        if grad_norm is None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            grad_norm = self._total_norm()
        norm = super()._get_grad_norm(model, grad_norm)
        loss = self._step_loss
        assert loss is not None
        finite = torch.isfinite(torch.as_tensor(norm)).all() & torch.isfinite(loss).cpu()
        learner = self.controller.learner
        heard = learner is None or all(bool(gain.isfinite().all()) for gain in learner.gains.values())
        if self.anywhere(not (bool(finite) and heard)):
            self._refuse(model, norm)
            return norm
        self.means.add("loss", loss)
        if self.controller.phase.values:
            self.run.loss_sum += float(self.mean_over_processes(loss.double()))
            self.run.loss_steps += 1
        return norm

    def anywhere(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        if self.args.world_size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.args.device)
        return bool(self.accelerator.reduce(value, reduction="sum") > 0)

    def _refuse(self, model: nn.Module, norm: Any) -> None:
        """A loss or a gradient is not finite: this step changes nothing; the run stops or goes on, as its policy says."""
        loss = float("nan") if self._step_loss is None else float(self._step_loss)
        where = [
            n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        model.zero_grad(set_to_none=True)
        if self.controller.learner is not None:
            self.controller.learner.gains.clear()
        self.means = self._means_before
        self.run.skipped += 1
        step, rows = self.state.global_step, [row for own in self._rows for row in own]
        names = [getattr(self.train_dataset, "name", str)(row) for row in rows]
        self.record.bad_batch(
            BAD_BATCHES_FILE, {"step": step, "loss": loss, "gradients": where[:8], "rows": names}
        )
        if not math.isfinite(loss):
            what = "the loss"
        else:  # a norm may overflow where no gradient does; and another process' loss counts too
            what = (
                f"the gradient of {where[0]}" if where else "the gradients' norm, or another process' loss,"
            )
        if self.nan_policy == "stop" or self.run.skipped > self.max_skipped_steps:
            fix = "look at these rows, lower --learning_rate, or pass --nan_policy skip"
            if self.nan_policy == "skip":
                fix = "look at these rows, or lower --learning_rate"
            raise TrainingError.of(
                "step", step, rule=f"{what} is not finite, and nothing was updated; the batch is {names[:4]} (all its "
                f"rows: {BAD_BATCHES_FILE}), and {self.run.skipped - 1} steps were skipped before", fix=fix,
            )  # fmt: skip
        self.record.event("skipped_step", step, f"{what} is not finite; rows {names[:4]}")

    def after_prune(self) -> None:
        """Values have new shapes: the part of DDP that averages gradients is built anew."""
        ddp = self.model_wrapped
        if isinstance(ddp, DistributedDataParallel):
            state = ddp.__getstate__()
            del ddp.reducer, ddp.logger
            ddp.__setstate__(state)


def _trained(batch: dict[str, Any]) -> int:
    return int((batch["labels"][..., 1:] != IGNORE).sum())
