"""Adapters that change what a tiny model computes, and the ways to bring one back from disk."""

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from srde import SrdeConfig
from tiny import tiny

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]  # of Llama and its kin


def config(**fields):
    return SrdeConfig(**{"num_experts": 4, "target_sparsity": 0.05, "task_type": "CAUSAL_LM"} | fields)


def fill(model, seed=0):
    """Gives every delta and router random numbers, large enough to change what a tiny model says."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".srde_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def adapted(model_type="llama", *, dtype=torch.float32, seed=0, **fields):
    """A tiny model with a filled adapter, in eval mode."""
    return fill(get_peft_model(tiny(model_type).to(dtype), config(**fields)), seed).eval()


def tokens(batch=2, length=7, seed=1):
    return torch.randint(6, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def tensors(model):
    """A copy of all parameters and buffers, to compare with later."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def load_base(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def _peft(base, adapter, name="default", **kwargs):
    return PeftModel.from_pretrained(load_base(base, **kwargs), adapter, adapter_name=name)


def _peft_low_memory(base, adapter, name="default", **kwargs):
    model = load_base(base, **kwargs)
    return PeftModel.from_pretrained(model, adapter, adapter_name=name, low_cpu_mem_usage=True)


def _peft_second(base, adapter, name="second", **kwargs):
    name = "second" if name == "default" else name
    model = get_peft_model(load_base(base, **kwargs), config(num_experts=3))
    model.load_adapter(adapter, name)
    model.set_adapter(name)
    return model


def _auto_peft(_base, adapter, name="default", **kwargs):
    return AutoPeftModelForCausalLM.from_pretrained(adapter, adapter_name=name, **kwargs)


def _transformers(base, adapter, name="default", **kwargs):
    model = load_base(base, **kwargs)
    model.load_adapter(adapter, adapter_name=name)
    return model


def _auto_transformers(_base, adapter, name="default", **kwargs):
    return AutoModelForCausalLM.from_pretrained(adapter, adapter_name=name, **kwargs)


PEFT_LOADERS = {
    "PeftModel.from_pretrained": _peft,
    "low_cpu_mem_usage": _peft_low_memory,
    "PeftModel.load_adapter": _peft_second,
    "AutoPeftModelForCausalLM": _auto_peft,
}
TRANSFORMERS_LOADERS = {
    "model.load_adapter": _transformers,
    "AutoModelForCausalLM": _auto_transformers,
}
LOADERS = PEFT_LOADERS | TRANSFORMERS_LOADERS
