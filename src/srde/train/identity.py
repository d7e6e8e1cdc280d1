"""What a run is made with: all that its numbers depend on. A checkpoint keeps it, and a run that goes on is compared with it."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from srde.data.tokenizers import tokenizer_fingerprints
from srde.train.arguments import EXPERT_FIELDS, DataArguments, ModelArguments, RunArguments
from srde.train.data import TrainingData
from srde.train.phases import Phases
from srde.train.start import adapter_digest


def identity(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RunArguments,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    phases: Phases,
) -> dict[str, Any]:
    """Everything that the trained numbers depend on, by the name of the flag that sets it."""
    config = model.peft_config["default"]
    prints = tokenizer_fingerprints(tokenizer)  # rows that are tokenised here also depend on the template
    experts = {name: getattr(config, name) for name in EXPERT_FIELDS}
    settings = {
        name: getattr(args, name) for name in (
            "seed", "data_seed", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
            "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon",
            "bf16", "use_muon", "supervised_experts", "domain_experts", "warm_start", "progressive_unlock",
            "unlock_steps", "router_temperature_start", "prune_by", "torch_compile", "label_smoothing_factor",
            "lr_scheduler_kwargs", "optim_args", "full_determinism",
        )
    }  # fmt: skip
    named = {"lr_scheduler_type": str(args.lr_scheduler_type), "optim": str(args.optim)}
    lengths = {
        "phase_warmup_steps": "warm_up", "mask_learning_steps": "mask_learning", "delta_training_steps": "delta_training",
        "expert_pretrain_steps": "expert_pretraining",
    }  # fmt: skip
    counts = {flag: phases.steps(name) for flag, name in lengths.items()}  # type: ignore[arg-type]
    # None where it is not asked for, which is also what a checkpoint of an earlier srde has
    start = {
        "init_adapter": adapter_digest(args.init_adapter) if args.init_adapter else None,
        "train_experts": sorted({e for name in args.train_experts or () for e in config.experts_named(name)})
        or None,
        "train_router_only": args.train_router_only or None,
    }
    return {
        "model_name_or_path": model.peft_config["default"].base_fingerprint,
        "tokenizer": prints if data_args.train_file else prints["vocabulary"],
        "train_file": data.fingerprint if data_args.train_file else None,
        "pretokenized_dir": data.fingerprint if data_args.pretokenized_dir else None,
        "eval_file": data.held_out_fingerprint,
        "max_length": data_args.max_length,
        "packing": data.facts["packed"],
        "data_order": data_args.data_order,
        "dtype": str(model.dtype),
        "quantization": model_args.quantization,
        **experts, **settings, **named, **counts, **start,
    }  # fmt: skip
