"""The trainer of `srde train`: phases, measurements, checkpoints that verify, and what happens when something goes wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from srde.data.tokenize import IGNORE
from srde.errors import StoppedError
from srde.train.control import Controller
from srde.train.measure import Measurement, Specialisation, measure, specialisation
from srde.train.record import Record, memory_mb
from srde.train.saving import SavingTrainer
from srde.train.state import RunState
from srde.train.stop import StopSignal, stopped
from srde.tuner import RoutedCall

ANY = "(no domain)"


class RunTrainer(SavingTrainer):
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
        self.last_measurement: Measurement | None = None
        self.micro_batches = []
        self._rows = []
        self._place = 0
        self._step_loss = None
        self._since = (time.monotonic(), 0, 0)
        self._load: tuple[Tensor, int] | None = None
        self._forgets_best = False
        controller.after_prune = self.after_prune

    # ---- logging and measuring --------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Transformers' log, with the auxiliary losses and the phase; and a line of `metrics.jsonl`."""
        training = "loss" in logs and "train_loss" not in logs
        super().log(logs, *args, **kwargs)
        if not training:
            return
        controller, step = self.controller, self.state.global_step
        load, self._load = None if self._load is None else self._load[0] / max(self._load[1], 1), None
        load = None if load is None else self.mean_over_processes(load)
        now, tokens = time.monotonic(), self.run.tokens
        seconds, steps = max(now - self._since[0], 1e-9), max(step - self._since[1], 1)
        clock = {
            "tokens_per_second": (tokens - self._since[2]) / seconds, "step_seconds": seconds / steps, "memory_mb": memory_mb()
        }  # fmt: skip
        self._since = (now, step, tokens)
        facts = {
            "phase": controller.phase.name, **logs, "sparsity": controller.sparsity, "tokens": tokens,
            "router_temperature": controller.router_temperature, "open_experts": controller.open_experts,
            "expert_load": None if load is None else [[round(share, 5) for share in row] for row in load.tolist()],
        }  # fmt: skip
        self.record.line("train", step, facts, clock)

    def observe(self, call: RoutedCall) -> None:
        """Adds up the experts' load in a step that will be logged."""
        every = (self.state.logging_steps or 1) if self.args.logging_strategy == "steps" else 1
        if (self.state.global_step + 1) % every == 0 and self.controller.phase.values:
            mask = None if call.mask_T is None else call.mask_T.bool()
            gates = [route.gate_TE.detach() for route in call.routes.values()]
            load = torch.stack([(gate if mask is None else gate[mask]).double().sum(0) for gate in gates])
            tokens = len(gates[0]) if mask is None else int(mask.sum())
            before, counted = self._load or (torch.zeros_like(load), 0)
            self._load = before + load, counted + tokens

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
            self.run.base = _as_base(found)
        metrics = {f"{metric_key_prefix}_loss": found.loss}
        domains = self.by_domain(found)
        metrics |= {
            f"{metric_key_prefix}_{name}_loss": one["loss"] for name, one in domains.items() if name != ANY
        }
        differ = self.specialisation()
        facts = {
            "loss": found.loss, "base_loss": self.run.base.get("loss"), "domains": domains,
            "specialisation": None if differ is None else asdict(differ),
        }  # fmt: skip
        self.record.line("eval", step, facts, {"seconds": time.monotonic() - start})
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.record.beat("training", step)
        return metrics

    def begin_measuring_anew(self) -> None:
        """Other held-out rows than before: the base is measured on them, and the best so far is forgotten."""
        self._forgets_best = True
        self.run.base = {}
        if self.eval_dataset is not None:
            with self.without_experts():
                found = self.measure_held_out()
            self.run.base = _as_base(found)
            self.last_measurement = None

    def measure_held_out(self, dataset: Dataset[Any] | None = None) -> Measurement:
        """Runs the held-out rows, and writes nothing; before anything is trained, through the base."""
        untrained = self.state.global_step <= self.first_trained
        model = self.model.eval()
        with self.without_experts() if untrained else nullcontext():
            found = measure(model, self._held_out(dataset), gather=self._gather, check=self._check_stop)
        model.train()
        self.last_measurement = found
        return found

    def by_domain(self, found: Measurement) -> dict[str, dict[str, Any]]:
        """A measurement by the domains' names: loss, the base's loss, trained tokens."""
        names, base = self.domain_names, self.run.base.get("domains", {})
        return {
            names[number] if 0 <= number < len(names) else ANY: {
                "loss": loss, "base_loss": base.get(str(number)), "tokens": tokens
            }
            for number, (loss, tokens) in found.domains.items()
        }  # fmt: skip

    def specialisation(self) -> Specialisation | None:
        """How far the experts differ by domain, on the rows measured last; None before there are any, or any domains."""
        last, config = self.last_measurement, self.model.peft_config["default"]
        if last is None or last.gate_NLE is None:
            return None
        return specialisation(last.gate_NLE[:, :, : config.num_experts], last.domain_N)

    def _held_out(self, dataset: Dataset[Any] | None) -> Any:
        """Batches of this process: every n-th; where they do not divide evenly, some of no weight, so that all are as many."""
        dataset = self.eval_dataset if dataset is None else dataset
        count, size = len(dataset), self.args.per_device_eval_batch_size  # type: ignore[arg-type]
        groups = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
        world, rank = self.args.world_size, self.args.process_index
        weightless = -len(groups) % world
        loader = DataLoader(
            dataset, batch_sampler=groups[rank::world] + ([groups[0]] if rank >= world - weightless else []),  # type: ignore[arg-type]
            collate_fn=self.data_collator, generator=torch.Generator(),  # an evaluation takes nothing from torch's own
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
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not self.run.pending)
        except StoppedError:
            self.model.train()
            if self.state.global_step == 0 or skip_scheduler:  # nothing is new since the last checkpoint
                raise
            self.run.pending = self.was_stopped = True
            self.control.should_evaluate = False
            self.control.should_training_stop = self.control.should_save = True
            return {}
        self.run.pending = False
        best, loss = self.state.best_metric, metrics["eval_loss"]
        if self.state.global_step > self.first_trained and (best is None or loss < best):
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
            self._save_best(loss)
        return metrics

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # a resumed run logs and saves as it is told now
        if self._forgets_best:
            self.state.best_metric = self.state.best_global_step = None
        return found

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Decided with the evaluation itself."""
        return bool(metrics) and self.state.best_global_step == self.state.global_step


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

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A new phase is a sign of life of its own."""
        phase = self.trainer.controller.phase.name
        if phase != self.trainer.record.phase:
            self.trainer.record.beat("training", state.global_step, phase)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Counts tokens; after the last step, evaluates; stops."""
        trainer = self.trainer
        seen = sum(_seen(batch) for batch in trainer.micro_batches)
        if args.world_size > 1:
            counted = torch.tensor(float(seen), device=args.device)
            seen = int(trainer.accelerator.reduce(counted, reduction="sum"))
        trainer.run.tokens += seen
        trainer.record.step_done(state.global_step, trainer.controller.phase.name)
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
        if trainer.anywhere(trainer.stop.asked is not None) and state.global_step < state.max_steps:
            trainer.run.pending = trainer.run.pending or control.should_evaluate
            trainer.was_stopped = True
            control.should_evaluate = False
            control.should_training_stop = control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leaving an epoch in the middle is not its end."""
        if self.trainer.was_stopped and state.epoch is not None and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False


def _as_base(found: Measurement) -> dict[str, Any]:
    return {"loss": found.loss, "domains": {str(domain): loss for domain, (loss, _) in found.domains.items()}}


def _seen(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) else batch["input_ids"].numel()
