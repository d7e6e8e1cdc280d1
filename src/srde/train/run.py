"""One training run, from flags to a saved adapter."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from srde.data.pack import packing_is_exact
from srde.data.tokenizers import load_tokenizer
from srde.errors import ConfigError
from srde.train.arguments import DataArguments, ModelArguments, RunArguments, starting_config
from srde.train.data import open_data
from srde.train.losses import Supervision
from srde.train.schedule import PruneCallback, SparsitySchedule
from srde.train.trainer import SrdeTrainer
from srde.tuner.calibrate import calibrate_masks
from srde.tuner.loading import load_base
from srde.tuner.store import save_adapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Outcome:
    """What a run produced.

    Attributes:
        model: The trained model, still in memory.
        tokenizer: Its tokenizer.
        metrics: Loss, runtime and counts, as written to `train_results.json`.
        output_dir: Where the adapter lies.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, Any]
    output_dir: Path


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    experts: Any,
    args: RunArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Trains experts on a frozen model and saves the adapter.

    Args:
        model_args: The base.
        data_args: The rows.
        experts: An `ExpertArguments`.
        args: Everything that Transformers' trainer takes.
        callbacks: Further callbacks of that trainer; they show the progress then, and no log lines are printed.

    Raises:
        SrdeError: A setting, a row or the model breaks a rule; nothing has been written then.
    """
    set_seed(args.seed)
    config = starting_config(experts)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    given = open_data(
        data_args,
        tokenizer,
        need_domains=args.supervised_experts,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    kwargs = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    base = load_base(model_args.model_name_or_path, model_args.dtype, **kwargs)
    data = given.prepare(tokenizer, data_args.packing and packing_is_exact(base))
    if args.eval_strategy != "no" and data.evaluation is None:
        raise ConfigError.of(
            "eval_strategy", args.eval_strategy, rule="measuring needs held-out rows", fix="pass --eval_file"
        )

    model = get_peft_model(base, config)
    args.remove_unused_columns = False
    args.dataloader_pin_memory &= torch.cuda.is_available()
    schedule = SparsitySchedule(config.initial_sparsity, config.target_sparsity)
    trainer = SrdeTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collate,
        processing_class=tokenizer,
        callbacks=[PruneCallback(schedule), *callbacks],
    )
    if callbacks:
        trainer.remove_callback(PrinterCallback)
    if args.supervised_experts:
        trainer.supervision = Supervision(args.expert_pretrain_steps, config.num_experts)
    if config.mask_init == "gradient":
        _calibrate(trainer)
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = {**data.facts, **result.metrics, "seconds": time.perf_counter() - start}
    output_dir = Path(args.output_dir or "")
    tokenizer.save_pretrained(str(output_dir))
    (output_dir / "train_results.json").write_text(
        json.dumps(metrics | {"log": trainer.state.log_history}, indent=2)
    )
    save_adapter(model, output_dir)
    return Outcome(model, tokenizer, metrics, output_dir)


def _calibrate(trainer: SrdeTrainer) -> None:
    """Chooses the masks on the first few batches of the run's own data."""
    batches = trainer.get_train_dataloader()
    chosen = [batch for batch, _ in zip(batches, range(CALIBRATION_BATCHES), strict=False)]
    for batch in chosen:
        batch.pop("domain_ids")
    calibrate_masks(trainer.model, chosen)


def trained_parameters(model: PreTrainedModel) -> int:
    """How many numbers the experts and routers hold."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
