"""The checkpoints of a running trainer: written whole, by all processes together, and loaded at the sparsity they had."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from srde.artifacts import atomic_folder
from srde.train import checkpoint
from srde.train.steps import StepTrainer

if TYPE_CHECKING:
    from srde.train.state import RunState


class SavingTrainer(StepTrainer):
    """`StepTrainer` that saves.

    Attributes:
        identity: What the run is made with.
        last_checkpoint: The one written last by this process.
    """

    identity: dict[str, Any]
    last_checkpoint: Path | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
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
        tensors = self.whole_tensors()
        if self.args.should_save:
            about = {"kind": "adapter", "step": self.state.global_step, "eval_loss": loss}
            with atomic_folder(Path(self.args.output_dir or "") / checkpoint.BEST, about) as folder:
                self._save(str(folder), tensors)
        self.record.event("best", self.state.global_step, f"held-out loss {loss:.4f}, the lowest so far")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter and the tokenizer; under FSDP and ZeRO-3 all processes put their parts together first."""
        self._save(output_dir, self.whole_tensors())

    def whole_tensors(self) -> dict[str, Tensor] | None:
        """The adapter's tensors where processes hold parts of them, put together; None where each holds them whole."""
        if self.is_fsdp_enabled:
            from torch.distributed.tensor import DTensor

            own = {n: t for n, t in self.model.state_dict().items() if ".srde_" in n}
            return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in own.items()}
        if self.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param

            model = self.accelerator.unwrap_model(self.model)
            own = {n: b for n, b in model.named_buffers() if ".srde_" in n}
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            return own | {n: safe_get_full_fp32_param(p) for n, p in trained.items()}
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads their state, but not their settings: those are the run's, which may be allowed to differ."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        groups = self.optimizer.param_groups
        names = ("initial_lr", "weight_decay", "momentum", "betas", "eps")
        present = [{name: group[name] for name in names if name in group} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, settings in zip(self.optimizer.param_groups, present, strict=True):
            group.update(settings)
        scheduler = self.lr_scheduler
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def restore(self, folder: Path, state: dict[str, Any], run: RunState) -> None:
        """Takes over what a checkpoint remembers beside weights and optimizer."""
        _, tensors = checkpoint.read_state(folder)
        self.run = run
        self.means.load(state["means"])
        self.controller.load_tensors(tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.load_into(self.model, Path(resume_from_checkpoint))
