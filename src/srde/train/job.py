"""The parts of a training run, made in order: data, base, adapter, trainer, what is saved at the end."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    enable_full_determinism,
    set_seed,
)
from transformers.trainer_callback import TrainerState

from srde.data.pack import packing_is_exact
from srde.data.tokenizers import load_tokenizer
from srde.errors import ConfigError
from srde.monitor.log import RUN_FILE, read_json, replace_json
from srde.monitor.notify import Notifier
from srde.train import checkpoint
from srde.train.arguments import DataArguments, ModelArguments, RunArguments
from srde.train.control import Controller
from srde.train.course import course_of, names_of
from srde.train.data import TrainingData, open_data
from srde.train.identity import identity
from srde.train.phases import Phases
from srde.train.record import Record
from srde.train.requirements import require_plain, require_prunable, require_same_course, require_whole
from srde.train.resolve import phases_of
from srde.train.runner import RunTrainer
from srde.train.start import Start
from srde.train.state import RunState
from srde.train.stop import StopSignal, stopped
from srde.train.trackers import guard, not_installed, require_known
from srde.tuner.loading import load_base
from srde.tuner.store import save_adapter

if TYPE_CHECKING:
    from peft import PeftModel

BOUNDARY_TOKENS = 8192
"""Tokens that warm start and gradient masks look at."""
RESULTS_FILE = "train_results.json"
ATTEMPT = "SRDE_ATTEMPT"
"""Environment variable in which a script that starts a run again and again says which attempt this is."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run produced.

    Attributes:
        model: The trained model, still in memory.
        tokenizer: Its tokenizer.
        metrics: Loss, runtime and counts, as written to `train_results.json`.
        output_dir: Where the adapter lies.
        is_main: Whether this process is the one that writes and speaks.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, Any]
    output_dir: Path
    is_main: bool = True


class Job:
    """One run.

    Args:
        model_args: The base.
        data_args: The rows.
        start: The adapter, as it starts.
        args: The trainer's settings.
        callbacks: Further callbacks of the trainer.
        folder: The run's folder, locked.
        record: Writes down what happens.
        stop: What has been asked for from outside.
        notifier: Tells others.
    """

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: DataArguments,
        start: Start,
        args: RunArguments,
        callbacks: Sequence[TrainerCallback],
        folder: Path,
        record: Record,
        stop: StopSignal,
        notifier: Notifier,
    ) -> None:
        self.model_args, self.data_args, self.args = model_args, data_args, args
        self.start, self.config = start, start.config
        self.callbacks, self.folder, self.record = callbacks, folder, record
        self.stop, self.notifier = stop, notifier

    def go(self) -> Outcome:
        """Loads, trains, saves."""
        args = self.args
        if args.max_steps > 0:  # what can be refused before anything is loaded
            phases_of(args, self.config)
        require_known(args.report_to)
        require_prunable(self.config, args)
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        found = checkpoint.choose_checkpoint(self.folder, args.resume_from_checkpoint, tell=self._tell)
        tokenizer = load_tokenizer(self.model_args.model_name_or_path)
        given = open_data(
            self.data_args,
            tokenizer,
            need_domains=args.supervised_experts,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        base = self._load_base()
        data = given.prepare(tokenizer, self.data_args.packing and packing_is_exact(base))
        self._settle_arguments(data)
        phases = phases_of(args, self.config)
        self.config.expert_names = names_of(args, self.data_args, self.start, data)
        model = get_peft_model(base, self.config)
        self.start.put_into(model)
        about = identity(self.model_args, self.data_args, args, model, tokenizer, data, phases)
        state: dict[str, Any] = {}
        if found is not None:
            state, _ = checkpoint.read_state(found)
            checkpoint.compare(state["identity"], about, args.allow_changed or (), found)
            require_same_course(state["identity"], phases, _step_of(found))
        elif (self.folder / RUN_FILE).is_file() and (self.folder / "adapter_model.safetensors").is_file():
            # a finished run without checkpoints
            saved = read_json(self.folder / RUN_FILE).get("identity", {})
            checkpoint.compare(saved, about, args.allow_changed or (), self.folder)
        if self.args.process_index == 0:
            checkpoint.set_aside(self.folder, _step_of(found), tell=self._tell)
        trainer = self._trainer(model, tokenizer, data, phases, about)
        self._describe(model, data, phases, about)
        metrics = self._train(trainer, data, found, state)
        tensors = trainer.whole_tensors()
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(str(self.folder))
            replace_json(self.folder / RESULTS_FILE, metrics | {"log": trainer.state.log_history})
            save_adapter(model, self.folder, tensors=tensors)
            self._plots()
        trainer.accelerator.wait_for_everyone()
        self.record.beat("completed", trainer.state.global_step)
        self.record.event(
            "completed", trainer.state.global_step, f"{trainer.state.global_step} steps are done"
        )
        self.notifier.send(
            "completed", f"{trainer.state.global_step} steps are done", loss=metrics["train_loss"],
            eval_loss=metrics.get("eval_loss"), steps=trainer.state.global_step,
        )  # fmt: skip
        return Outcome(model, tokenizer, metrics, self.folder, trainer.is_world_process_zero())

    # ---- making the parts -------------------------------------------------------------------------------------------

    def _load_base(self) -> PreTrainedModel:
        given = self.model_args
        kwargs = {"attn_implementation": given.attn_implementation} if given.attn_implementation else {}
        dtype = "bfloat16" if given.dtype == "auto" and self.args.bf16 else given.dtype
        with _unpartitioned(self.args):
            return load_base(given.model_name_or_path, dtype, quantization=given.quantization, **kwargs)

    def _settle_arguments(self, data: TrainingData) -> None:
        """What depends on the data: evaluation, the number of steps."""
        args = self.args
        if args.evaluates_if_it_can and self.data_args.eval_file:
            from transformers.trainer_utils import IntervalStrategy

            args.eval_strategy = IntervalStrategy.STEPS
        if args.eval_strategy != "no" and data.evaluation is None:
            raise ConfigError.of(
                "eval_strategy", args.eval_strategy, rule="measuring needs held-out rows", fix="pass --eval_file"
            )  # fmt: skip
        if args.max_steps < 1:
            rows = args.per_device_train_batch_size * args.world_size
            per_epoch = max(math.ceil(len(data.train) / rows / args.gradient_accumulation_steps), 1)
            args.max_steps = math.ceil(per_epoch * args.num_train_epochs)
            self.record.max_steps = args.max_steps
        args.remove_unused_columns = False
        args.dataloader_pin_memory &= torch.cuda.is_available()
        if args.activation_checkpointing and not args.activation_checkpointing_kwargs:
            args.activation_checkpointing_kwargs = {"use_reentrant": False}

    def _trainer(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        data: TrainingData,
        phases: Phases,
        about: dict[str, Any],
    ) -> RunTrainer:
        args, config = self.args, self.config
        course = course_of(args, self.data_args, self.start, data, phases)
        controller = Controller(
            model,
            course.settings,
            batches=lambda: data.first_batches(args.per_device_train_batch_size, BOUNDARY_TOKENS),
            expert_of=course.expert_of,
            say=self.record.event,
        )
        make = partial(
            RunTrainer,
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            data_collator=data.collate,
            processing_class=tokenizer,
            callbacks=list(self.callbacks),
            controller=controller,
            record=self.record,
            stop=self.stop,
            identity=about,
            domain_names=data.domains,
            nan_policy=args.nan_policy,
            max_skipped_steps=args.max_skipped_steps,
        )
        try:
            trainer = make()
        except (RuntimeError, ImportError) as error:
            if args.report_to and "install" in str(error):
                raise not_installed(args.report_to, error) from error
            raise
        guard(trainer)
        trainer.supervision = course.supervision
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            require_whole(config, args)
        if trainer.is_deepspeed_enabled:
            require_plain(config, args, phases)
        if self.callbacks:
            trainer.remove_callback(PrinterCallback)
        return trainer

    # ---- training ---------------------------------------------------------------------------------------------------

    def _train(
        self, trainer: RunTrainer, data: TrainingData, found: Path | None, state: dict[str, Any]
    ) -> dict[str, Any]:
        args, record = self.args, self.record
        step = _step_of(found)
        pending = bool(state.get("run", {}).get("pending"))
        record.resume(-1 if found is None else step, again=pending)
        attempt = os.environ.get(ATTEMPT)
        facts = {"step": step, "max_steps": args.max_steps} | ({"attempt": attempt} if attempt else {})
        if found is None:
            record.event("started", 0, f"{args.max_steps} steps on {data.facts['rows']} rows")
            self.notifier.send("started", f"{args.max_steps} steps on {data.facts['rows']} rows", **facts)
            for note in self.start.notes:
                record.event("start", 0, note)
        else:
            record.event("resumed", step, f"goes on from {found.name}")
            self.notifier.send("resumed", f"goes on from {found.name}", **facts)
        args.eval_on_start = args.eval_strategy != "no" and (found is None or pending)
        start = time.perf_counter()
        if found is not None:
            trainer.restore(found, state, RunState(**state["run"]))
            if trainer.identity["eval_file"] != state["identity"].get("eval_file"):
                trainer.begin_measuring_anew()
        if found is not None and step >= args.max_steps:
            self.stop.gently()
            self._restore_finished(trainer, found)
            if pending:
                trainer._evaluate(None, None)
        else:
            trainer.train(resume_from_checkpoint=str(found) if found else None)
        if trainer.was_stopped:
            kept = trainer.last_checkpoint
            raise stopped(self.stop.asked or "stop", str(kept) if kept else None)
        loss = trainer.run.loss_sum / max(trainer.run.loss_steps, 1)
        metrics = {**data.facts, "train_loss": loss, "steps": trainer.state.global_step}
        metrics |= {"tokens_seen": trainer.run.tokens, "skipped_steps": trainer.run.skipped}
        if args.eval_strategy != "no":
            if trainer.last_measurement is None:
                trainer.measure_held_out()
            metrics |= self._held_out(trainer)
        return metrics | {"seconds": time.perf_counter() - start}

    def _restore_finished(self, trainer: RunTrainer, found: Path) -> None:
        """All steps were done already; only what follows them may be missing."""
        trainer._load_from_checkpoint(str(found))
        trainer.state = TrainerState.load_from_json(str(found / "trainer_state.json"))
        trainer.callback_handler.state = trainer.state

    def _held_out(self, trainer: RunTrainer) -> dict[str, Any]:
        """Held-out loss by domain against the base, and how far the experts differ by domain."""
        last = trainer.last_measurement
        assert last is not None
        found = trainer.specialisation()
        return {
            "eval_loss": last.loss, "base_eval_loss": trainer.run.base.get("loss"), "domains": trainer.by_domain(last),
            "specialisation": None if found is None else asdict(found),
        }  # fmt: skip

    # ---- what the run says about itself -----------------------------------------------------------------------------

    def _describe(self, model: PeftModel, data: TrainingData, phases: Phases, about: dict[str, Any]) -> None:
        args, config = self.args, self.config
        self.record.describe(
            {
                "max_steps": args.max_steps,
                "phases": [asdict(phase) for phase in phases],
                "num_experts": config.num_experts,
                "num_shared_experts": config.num_shared_experts,
                "layers": list(model.srde.layers),
                "domains": data.domains,
                "heartbeat_steps": args.heartbeat_steps,
                "logging_steps": _count(args.logging_steps, args.max_steps),
                "model": self.model_args.model_name_or_path,
                "trained_parameters": trained_parameters(model),
                "identity": about,
            }
        )

    def _tell(self, text: str) -> None:
        logger.warning(text)
        self.record.event("checkpoint", self.record.step, text)

    def _plots(self) -> None:
        """Draws the run; a full disk here costs the plots and not the run."""
        from srde.monitor.plots import save_plots
        from srde.monitor.run import read_run

        try:
            save_plots(read_run(self.folder, verify_seconds=0), self.folder / "plots")
        except OSError as error:
            logger.warning("the plots could not be written: %s", error)


@contextmanager
def _unpartitioned(args: RunArguments) -> Iterator[None]:
    """Keeps Transformers from partitioning the base while it loads (ZeRO-3): masks and layouts are read off whole weights.
    DeepSpeed partitions it when the engine is made."""
    if (settings := getattr(args, "hf_deepspeed_config", None)) is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(settings)


def _count(steps: float, max_steps: int) -> int:
    """A number of steps, or below 1 a share of all."""
    return math.ceil(steps * max_steps) if steps < 1 else int(steps)


def _step_of(found: Path | None) -> int:
    return 0 if found is None else int(read_json(found / "trainer_state.json")["global_step"])


def trained_parameters(model: PreTrainedModel) -> int:
    """How many numbers the experts and routers hold."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
