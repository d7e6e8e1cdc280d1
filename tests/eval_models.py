"""Tiny models with experts and rows to evaluate them on."""

from __future__ import annotations

import torch
from peft import get_peft_model

from srde import SrdeConfig
from srde.data.rows import Row
from tiny import VOCABULARY, tiny, tiny_tokenizer

CHOICE = "how many\nOptions:\nA) 1\nB) 2\nC) 3"


def row(domain, prompt, response, line=1, **more):
    """A row; plain text where the prompt is empty."""
    turns = [{"role": "user", "content": prompt}] if prompt else []
    return Row(prompt=turns, response=response, file="f", line=line, domain=domain, **more)


def adapted(model_type="llama", **fields):
    """A tiny model whose experts change what it says, in evaluation mode, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    base = tiny(
        model_type, vocab_size=VOCABULARY, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048
    )
    settings = {"num_experts": 4, "target_sparsity": 0.05, "num_shared_experts": 1} | fields
    model = get_peft_model(base, SrdeConfig(**settings)).eval()
    for layer in model.srde.layers.values():
        torch.nn.init.normal_(layer.srde_experts["default"].values, std=0.3)
    return model, tokenizer
