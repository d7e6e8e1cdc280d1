"""The main promises on a real model, SmolLM2-135M-Instruct; the folder is named by SRDE_SMOLLM2 (see conftest.py)."""

import pytest
import torch
from adapters import LOADERS, config, fill, load_base
from peft import get_peft_model
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TEXTS = [
    "What is 12 times 7?",
    "Name a planet that has rings and explain in one sentence what they are made of.",
]
EXPERTS = {"num_experts": 8, "target_sparsity": 0.01}


def scaled(model):
    """Random deltas of the size of the weights they change: about 0.05 here."""
    fill(model)
    for layer in model.srde.layers.values():
        layer.srde_experts["default"].values.data *= 0.1
    return model


@pytest.fixture
def batch(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


@DTYPES
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_zero_deltas_leave_every_bit_of_prompt_and_decoding(smollm2, batch, granularity, dtype):
    base = load_base(smollm2, dtype=dtype)
    new = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    prompt, decoded = base(**batch).logits, torch.stack(base.generate(**batch, **new).logits)
    model = get_peft_model(base, config(granularity=granularity, **EXPERTS)).eval()
    assert torch.equal(model(**batch).logits, prompt)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, prompt)
    assert torch.equal(torch.stack(model.generate(**batch, **new).logits), decoded)
    assert (scaled(model)(**batch).logits - prompt).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(torch.stack(model.generate(**batch, **new).logits), decoded)


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_a_folded_expert_is_the_forced_one(smollm2, batch, granularity):
    base = load_base(smollm2, dtype=torch.float32)
    model = scaled(get_peft_model(base, config(granularity=granularity, **EXPERTS))).eval()
    with torch.no_grad():
        with model.srde.force_experts(5):
            want = model(**batch).logits
        real = batch["attention_mask"].bool()
        got = model.merge_and_unload(expert=5)(**batch).logits
        torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=0)


@DTYPES
@pytest.mark.parametrize("loader", LOADERS)
def test_a_loaded_adapter_gives_the_very_logits(smollm2, batch, tmp_path, loader, dtype):
    model = scaled(get_peft_model(load_base(smollm2, dtype=dtype), config(**EXPERTS))).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model(**batch).logits
        loaded = LOADERS[loader](smollm2, str(tmp_path), dtype=dtype).eval()
        assert torch.equal(loaded(**batch).logits, want)
