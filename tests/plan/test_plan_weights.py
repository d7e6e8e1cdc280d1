"""The base's weights in each format: plain ones against built models (test_plan_figures), quantised ones against bitsandbytes."""

import pytest
import torch
from real import KINDS, base_of, config_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from srde.plan.base import build_base
from srde.plan.weights import weigh

HIDDEN = {
    "llama": {"hidden_size": 192},
    "gpt2": {"n_embd": 192},
    "opt": {"hidden_size": 192, "word_embed_proj_dim": 192},
}
FORMATS = {
    "int8": ({"load_in_8bit": True}, "int8", False),
    "NF4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", False),
    "NF4, double": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4", True,
    ),
}  # fmt: skip


@pytest.mark.quant
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_exact(kind, name, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, kind, KINDS[kind] | HIDDEN[kind])
    flags, field, double_quant = FORMATS[name]
    base_of(kind, torch.bfloat16).save_pretrained(tmp_path)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**flags), dtype=torch.bfloat16, device_map="cpu"
    )
    weights = weigh(build_base(config_of(kind), torch.bfloat16), torch.bfloat16, double_quant)
    assert getattr(weights, field) == sum({t.data_ptr(): t.nbytes for t in all_tensors(model)}.values())


def all_tensors(model):
    """Parameters and buffers, and what bitsandbytes keeps beside them."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        if scales is not None:
            yield scales
