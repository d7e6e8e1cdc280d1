"""Really built models, and what they really take: the other side of every comparison with a plan."""

from __future__ import annotations

import inspect

import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from srde import SrdeConfig
from srde.plan.adapters import attach_lora, mlp_projections, srde_layers
from srde.plan.measure import FORMULAS

BATCH, LENGTH = 2, 64
SETTINGS = {"num_experts": 8, "top_k": 2, "initial_sparsity": 0.2, "target_sparsity": 0.05}

KINDS = {
    "llama": {
        "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320,
    },
    "gpt2": {"n_embd": 64, "n_inner": 512, "n_layer": 2, "n_head": 4, "vocab_size": 320, "attn_pdrop": 0.0},
    "opt": {
        "hidden_size": 64, "ffn_dim": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320,
        "word_embed_proj_dim": 64,
    },
}  # fmt: skip


def config_of(kind):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(kind, **KINDS[kind], **tokens)


def base_of(kind, dtype):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(kind), dtype=dtype)


def with_adapter(kind, dtype, adapter, **settings):
    """The real model that one column of a plan is about."""
    base = base_of(kind, dtype)
    if adapter.kind == "srde":
        model = get_peft_model(base, SrdeConfig(**SETTINGS | settings, sparsity=adapter.sparsity))
        model.srde.path = adapter.runs[0].path
        return model
    layers = srde_layers(get_peft_model(base_of(kind, dtype), SrdeConfig(**SETTINGS | settings)))
    return attach_lora(base, adapter.rank, mlp_projections(base, layers))


def last_only(model):
    """What asks for the logits of the last position only, where a model knows that."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}


def batch():
    return torch.randint(0, 64, (BATCH, LENGTH))


def training_batch(model, packing=True):
    """The rows of a step: packed, end to end, with positions that start again in the middle; or one below the other."""
    if not packing:
        ids = batch()
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    ids = batch().view(1, -1)
    positions = torch.arange(ids.numel()).remainder(LENGTH // 2).view(1, -1)
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}


def flops_of(model, **inputs):
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        out = model(**inputs)
    return counter.get_total_flops(), out


def saved_bytes(model, packing=True):
    """What a forward saves for its backward: unique storages, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    inputs = training_batch(model, packing)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    size = sum(storage.nbytes() for storage in saved.values())
    del loss
    return size


def allocated_peak(run):
    """The most bytes that PyTorch's CPU allocator had given out at once during a run, by the profiler's records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    records = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        now += record.nbytes()
        peak = max(peak, now)
    return peak
