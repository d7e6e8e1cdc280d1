"""The trainer of `srde train`: phases, measurements, checkpoints that verify, and what happens when something goes wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from srde.artifacts import atomic_folder
from srde.data.tokenize import IGNORE
from srde.errors import TrainingError
from srde.train import checkpoint
from srde.train.control import Controller
from srde.train.measure import Measurement, measure
from srde.train.memory import means_out_of_memory, out_of_memory, parts
from srde.train.record import Record, memory_mb
from srde.train.stop import StopSignal, stopped
from srde.train.trainer import SrdeTrainer
from srde.tuner import RoutedCall

BAD_BATCHES_FILE = "bad_batches.jsonl"
MOST_HALVINGS = 10


@dataclass
class RunState:
    """What a run has to remember from one process to the next, beside weights, optimizer and the trainer's own state.

    Attributes:
        tokens: Tokens seen, over all processes.
        skipped: Steps left out because a number was not finite.
        halvings: How many times micro-batches are halved for want of memory.
        pending: An evaluation was due when the run was stopped.
        base: The base's held-out loss: overall, and by domain number.
        loss_sum: Sum of the steps' losses in phases that train.
        loss_steps: How many steps these were.
    """

    tokens: int = 0
    skipped: int = 0
    halvings: int = 0
    pending: bool = False
    base: dict[str, Any] = field(default_factory=dict)
    loss_sum: float = 0.0
    loss_steps: int = 0


class RunTrainer(SrdeTrainer):
    """`SrdeTrainer` for one run into one folder.

    Args:
        controller: Applies phases and schedules.
        record: Writes down what happens.
        stop: What has been asked for from outside.
        identity: What the run is made with, for checkpoints.
        domain_names: The domains by their numbers.
        nan_policy: What to do about numbers that are not finite: "stop", or "skip" the step.
        max_skipped_steps: How many steps may be skipped.
    """

    def __init__(
        self,
        *args: Any,
        controller: Controller,
        record: Record,
        stop: StopSignal,
        identity: dict[str, Any],
        domain_names: Sequence[str] = (),
        nan_policy: Literal["stop", "skip"] = "stop",
        max_skipped_steps: int = 10,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, callbacks=[controller, *callbacks, _Watch(self)], **kwargs)
        self.controller, self.record, self.stop = controller, record, stop
        self.identity, self.domain_names = identity, list(domain_names)
        self.nan_policy, self.max_skipped_steps = nan_policy, max_skipped_steps
        self.run = RunState()
        self.first_trained = controller.settings.phases.first_trained
        self.was_stopped = False
        self.last_checkpoint: Path | None = None
        self.last_measurement: Measurement | None = None
        self._batches: list[dict[str, Any]] = []
        self._rows: list[list[int]] = []
        self._place = 0
        self._step_loss: Tensor | None = None
        self._since = (time.monotonic(), 0, 0)
        self._load: Tensor | None = None
        controller.after_prune = self._after_prune

    # ---- one step ---------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step; remembers them, and which rows they are of."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._rows = [batch.pop("row_ids").tolist() if "row_ids" in batch else [] for batch in batches]
        self._batches, self._place = list(batches), 0
        self._means_before, self._step_loss = self.means.copy(), None
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
                with torch.no_grad(), self._base():
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

    def _base(self) -> Any:
        return self.model.disable_adapter()

    def _in_smaller_parts(self, model: nn.Module, place: int, items: Any, error: BaseException) -> Tensor:
        """Does the step again from its first micro-batch, in halves, then quarters, until it fits."""
        batch = self._batches[place]
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
            self.means, self._step_loss = self._means_before.copy(), None
            torch.cuda.empty_cache()
            try:
                for earlier in self._batches[: place + 1]:
                    loss = self._micro_batch(model, earlier, items)
                return loss
            except (RuntimeError, MemoryError) as again:
                if not means_out_of_memory(again):
                    raise
                error = again.with_traceback(None)

    # ---- before and after the optimizer -----------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.controller.drop_inactive_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.controller.drop_inactive_gradients()
        norm = super()._get_grad_norm(model, grad_norm)
        loss = self._step_loss
        assert loss is not None
        finite = torch.isfinite(torch.as_tensor(norm)).all() & torch.isfinite(loss).cpu()
        if self._anywhere(not bool(finite)):
            self._refuse(model, norm)
            return norm
        self.means.add("loss", loss)
        if self.controller.phase.values:
            self.run.loss_sum += float(self.mean_over_processes(loss.double()))
            self.run.loss_steps += 1
        return norm

    def _anywhere(self, flag: bool) -> bool:
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
        what = "the loss" if not torch.isfinite(torch.tensor(loss)) else f"the gradient of {where[0]}"
        if self.nan_policy == "stop" or self.run.skipped > self.max_skipped_steps:
            fix = "look at these rows, lower --learning_rate, or pass --nan_policy skip"
            if self.nan_policy == "skip":
                fix = "look at these rows, or lower --learning_rate"
            raise TrainingError.of(
                "step", step, rule=f"{what} is not finite ({self.run.skipped} of {self.max_skipped_steps} skipped steps allowed); "
                f"nothing was updated; the batch is rows {names[:4]}, all of them in {BAD_BATCHES_FILE}", fix=fix,
            )  # fmt: skip
        self.record.event("skipped_step", step, f"{what} is not finite; rows {names[:4]}")

    def _after_prune(self) -> None:
        """Values have new shapes; what looks after gradients between processes has to know."""

    # ---- logging and measuring --------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Transformers' log, with the auxiliary losses and the phase; and a line of `metrics.jsonl`."""
        training = "loss" in logs and "train_loss" not in logs
        super().log(logs, *args, **kwargs)
        if not training:
            return
        controller, step = self.controller, self.state.global_step
        load, self._load = self._load, None
        now, tokens = time.monotonic(), self.run.tokens
        seconds, steps = max(now - self._since[0], 1e-9), max(step - self._since[1], 1)
        clock = {
            "tokens_per_second": (tokens - self._since[2]) / seconds, "step_seconds": seconds / steps, "memory_mb": memory_mb()
        }  # fmt: skip
        self._since = (now, step, tokens)
        facts = {
            "phase": controller.phase.name, **logs, "sparsity": controller.sparsity, "tokens": tokens,
            "router_temperature": controller.router_temperature, "open_experts": controller.open_experts, "expert_load": None if load is None else [[round(v, 5) for v in row] for row in load.tolist()],
        }  # fmt: skip
        self.record.line("train", step, facts, clock)

    def observe(self, call: RoutedCall) -> None:
        """The experts' load in a step that will be logged."""
        every = self.state.logging_steps or 1
        if (self.state.global_step + 1) % every == 0 and self.controller.phase.values:
            mask = None if call.mask_T is None else call.mask_T.bool()
            gates = [route.gate_TE.detach() for route in call.routes.values()]
            means = [(gate if mask is None else gate[mask]).float().mean(0) for gate in gates]
            self._load = torch.stack(means)

    def evaluate(
        self,
        eval_dataset: Dataset[Any] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out loss per domain; before anything is trained, that of the base.

        Raises:
            StoppedError: The run was asked to stop meanwhile.
        """
        step = self.state.global_step
        self.record.beat("evaluating", step)
        start = time.monotonic()
        found = self.measure_held_out(eval_dataset)
        if step <= self.first_trained:
            self.run.base = {
                "loss": found.loss,
                "domains": {str(d): v for d, (v, _) in found.domains.items()},
            }
        metrics = {f"{metric_key_prefix}_loss": found.loss}
        domains: dict[str, Any] = {}
        for number, (loss, tokens) in found.domains.items():
            if 0 <= number < len(self.domain_names):
                metrics[f"{metric_key_prefix}_{self.domain_names[number]}_loss"] = loss
                base = self.run.base.get("domains", {}).get(str(number))
                domains[self.domain_names[number]] = {"loss": loss, "base_loss": base, "tokens": tokens}
        facts = {"loss": found.loss, "base_loss": self.run.base.get("loss"), "domains": domains}
        self.record.line("eval", step, facts, {"seconds": time.monotonic() - start})
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.record.beat("training", step)
        return metrics

    def measure_held_out(self, dataset: Dataset[Any] | None = None) -> Measurement:
        """Runs the held-out rows, and writes nothing; before anything is trained, through the base."""
        untrained = self.state.global_step <= self.first_trained
        model = self.model.eval()
        with self._base() if untrained else nullcontext():
            found = measure(model, self._held_out(dataset), gather=self._gather, check=self._check_stop)
        model.train()
        self.last_measurement = found
        return found

    def _held_out(self, dataset: Dataset[Any] | None) -> Any:
        """Batches of this process: every n-th; where they do not divide evenly, some of no weight, so that all are as many."""
        dataset = self.eval_dataset if dataset is None else dataset
        count, size = len(dataset), self.args.per_device_eval_batch_size  # type: ignore[arg-type]
        groups = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
        world, rank = self.args.world_size, self.args.process_index
        weightless = -len(groups) % world
        loader = DataLoader(
            dataset, batch_sampler=groups[rank::world] + ([groups[0]] if rank >= world - weightless else []),  # type: ignore[arg-type]
            collate_fn=self.data_collator,
        )  # fmt: skip
        own = len(groups[rank::world])
        for place, batch in enumerate(loader):
            if place >= own:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE)
                batch["domain_ids"] = torch.full_like(batch["labels"], -1)
            yield self._prepare_inputs(batch)

    def _gather(self, items: list[Any]) -> list[Any]:
        if self.args.world_size == 1:
            return items
        everyone: list[list[Any]] = [[] for _ in range(self.args.world_size)]
        torch.distributed.all_gather_object(everyone, items)
        return [item for own in everyone for item in own]

    def _check_stop(self) -> None:
        if self.stop.asked and self.args.world_size == 1:
            raise stopped(self.stop.asked, None)

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        from srde.errors import StoppedError

        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except StoppedError:
            self.model.train()
            if self.state.global_step == 0 or skip_scheduler:  # nothing is new since the last checkpoint
                raise
            self.run.pending = self.was_stopped = True
            self.control.should_training_stop = self.control.should_save = True
            return {}
        self.run.pending = False
        best, loss = self.state.best_metric, metrics["eval_loss"]
        if self.state.global_step > self.first_trained and (best is None or loss < best):
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
            self._save_best(loss)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Decided with the evaluation itself."""
        return bool(metrics) and self.state.best_global_step == self.state.global_step

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, folder = self.state.global_step, Path(self.args.output_dir or "")
        self.record.beat("saving", step)
        final = folder / f"checkpoint-{step}"
        with ExitStack() as stack:
            name: list[str | None] = [None]
            if self.args.should_save:
                needed = checkpoint.bytes_needed(self.model, self.optimizer)
                about = {"kind": "checkpoint", "step": step}
                name = [str(stack.enter_context(atomic_folder(final, about, expected_bytes=needed)))]
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(name, src=0)
            self._write_checkpoint(Path(str(name[0])))
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()
        self.last_checkpoint = final
        self.record.event("checkpoint", step, f"{final.name} is written")
        if self.args.should_save:
            checkpoint.rotate(folder, self.args.save_total_limit)
        self.record.beat("training", step)

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))
            state = {"identity": self.identity, "run": vars(self.run), "means": self.means.state()}
            checkpoint.write_state(folder, state, self.controller.tensors())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and output_dir:
            (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads

    def _save_best(self, loss: float) -> None:
        if self.args.should_save:
            about = {"kind": "adapter", "step": self.state.global_step, "eval_loss": loss}
            with atomic_folder(Path(self.args.output_dir or "") / checkpoint.BEST, about) as folder:
                self.save_model(str(folder), _internal_call=True)
        self.record.event("best", self.state.global_step, f"held-out loss {loss:.4f}, the lowest so far")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoint.load_into(self.model, Path(resume_from_checkpoint))
        state, tensors = checkpoint.read_state(Path(resume_from_checkpoint))
        self.run = RunState(**state["run"])
        self.means.load(state["means"])
        self.controller.load_tensors(tensors)


class _Watch(TrainerCallback):
    """Signs of life, and the place where a run stops when it was asked to."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """From now on signals wait for the end of the step."""
        trainer = self.trainer
        trainer._since = (time.monotonic(), state.global_step, trainer.run.tokens)
        trainer.record.beat("training", state.global_step, trainer.controller.phase.name)
        trainer.stop.gently()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Counts tokens; after the last step, evaluates; stops."""
        trainer = self.trainer
        seen = sum(_seen(batch) for batch in trainer._batches)
        if args.world_size > 1:
            counted = torch.tensor(float(seen), device=args.device)
            seen = int(trainer.accelerator.reduce(counted, reduction="sum"))
        trainer.run.tokens += seen
        trainer.record.step_done(state.global_step, trainer.controller.phase.name)
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
        if trainer._anywhere(trainer.stop.asked is not None) and state.global_step < state.max_steps:
            trainer.run.pending = trainer.run.pending or control.should_evaluate
            trainer.was_stopped = True
            control.should_evaluate = False
            control.should_training_stop = control.should_save = True


def _trained(batch: dict[str, Any]) -> int:
    return int((batch["labels"][..., 1:] != IGNORE).sum())


def _seen(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) else batch["input_ids"].numel()
