"""Frozen bases in 4 and 8 bits: the adapter sees what the quantised base computes, and never touches it."""

import re

import pytest
import torch
from adapters import LAYERS, LOADERS, config, fill, load_base, tensors, tokens, trainable
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM

from srde import calibrate_masks
from srde.core import find_mlps
from srde.errors import UsageError
from srde.tuner.weights import dense_weights

pytestmark = pytest.mark.quant

DTYPES = [torch.float32, torch.bfloat16]


def nf4(dtype):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: NF4 bases are NOT tested")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def int8(_dtype):
    pytest.importorskip("torchao", reason="torchao is not installed: int8 bases are NOT tested")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTS = {"nf4": nf4, "int8": int8}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small Llama whose sizes are whole blocks of 64, as NF4 wants them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=64, **sizes))
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=QUANTS)
def quantised(request, plain):
    """A function that loads the quantised base."""

    def load(dtype=torch.float32):
        return load_base(plain, dtype=dtype, quantization_config=QUANTS[request.param](dtype))

    return load


def dequantised(base, plain):
    """The same numbers in plain float32 matrices."""
    model = load_base(plain)
    for name, module in base.named_modules():
        if type(module).__name__.startswith("Linear") and not name.startswith("lm_head"):
            from peft.utils.integrations import dequantize_module_weight

            model.get_submodule(name).weight.data = dequantize_module_weight(module).detach().float()
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_zero_deltas_leave_every_bit_and_others_do_not(quantised, granularity, dtype):
    base = quantised(dtype)
    want = base(tokens()).logits
    model = get_peft_model(base, config(granularity=granularity)).eval()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    for path in ("masked", "grouped"):
        model.srde.path = path
        assert torch.equal(model(tokens()).logits, want)
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, want)
    assert (fill(model)(tokens()).logits - want).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, want)
    assert torch.equal(model.unload()(tokens()).logits, want)


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_outputs_and_gradients_are_those_on_the_dequantised_base(quantised, plain, granularity):
    base = quantised()
    reference = fill(get_peft_model(dequantised(base, plain), config(granularity=granularity)))
    model = fill(get_peft_model(base, config(granularity=granularity)))
    found = {name: layer.srde_experts["default"].index for name, layer in model.srde.layers.items()}
    assert all(
        torch.equal(layer.srde_experts["default"].index, found[n])
        for n, layer in reference.srde.layers.items()
    )
    model.eval()(tokens())  # on some CPUs, bitsandbytes would now repack the weights and lose the gradients
    results = []
    for one in (model, reference):
        out = one.train()(tokens(), labels=tokens())
        out.loss.backward()
        results.append([out.logits.detach(), *(p.grad for p in trainable(one).values())])
    assert len(results[0]) == 5
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("loader", ["PeftModel.from_pretrained", "low_cpu_mem_usage", "model.load_adapter"])
def test_saving_and_loading_changes_no_bit_of_adapter_or_base(
    quantised, plain, tmp_path, loader, monkeypatch
):
    base = quantised(torch.bfloat16)
    before = tensors(base)
    model = fill(get_peft_model(base, config())).eval()
    want = model(tokens()).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(model(tokens()).logits, want)
    after = model.unload().state_dict()
    assert before.keys() == after.keys() and all(
        _same(after[name], tensor) for name, tensor in before.items()
    )
    monkeypatch.setattr("adapters.load_base", lambda *_args, **_kwargs: quantised(torch.bfloat16))
    assert torch.equal(LOADERS[loader](plain, str(tmp_path)).eval()(tokens()).logits, want)


def _same(one, other):
    if hasattr(one, "dequantize"):
        one, other = one.dequantize(), other.dequantize()
    return torch.equal(one, other)


def test_steps_after_peft_s_preparation_lower_the_loss(quantised):
    model = prepare_model_for_kbit_training(
        quantised(torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, config()).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(tokens(), labels=tokens()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05


def test_masks_by_gradient_work_too(quantised, plain):
    base = quantised()
    reference = get_peft_model(dequantised(base, plain), config(mask_init="gradient"))
    model = get_peft_model(base, config(mask_init="gradient"))
    for one in (model, reference):
        calibrate_masks(one, [{"input_ids": tokens(), "labels": tokens()}])
    for name in LAYERS:
        index, want = (one.srde.layers[name].srde_experts["default"].index for one in (model, reference))
        assert len(set(index.flatten().tolist()) & set(want.flatten().tolist())) >= index.numel() - 1


def test_folding_into_quantised_weights_is_refused(quantised):
    base = quantised()
    kind = type(base.model.layers[0].mlp.gate_proj)
    model = fill(get_peft_model(base, config())).eval()
    want = model(tokens()).logits
    message = (
        f"base weight of model.layers.0.mlp.gate_proj='{kind.__name__} {base.model.layers[0].mlp.gate_proj.weight.dtype}': "
        "folding an expert into quantised weights would round most of it away. "
        "load the base in bf16 or fp32, load the adapter on it, and merge there."
    )
    with pytest.raises(UsageError, match="^" + re.escape(message) + "$"):
        model.merge_and_unload(expert=0)
    assert torch.equal(model(tokens()).logits, want)


def test_an_adapter_trained_on_a_quantised_base_folds_into_the_plain_one(quantised, plain, tmp_path):
    fill(get_peft_model(quantised(), config())).save_pretrained(tmp_path)
    model = LOADERS["PeftModel.from_pretrained"](plain, str(tmp_path)).eval()
    with model.srde.force_experts(1):
        want = model(tokens()).logits
    torch.testing.assert_close(model.merge_and_unload(expert=1)(tokens()).logits, want, atol=1e-4, rtol=0)


def test_the_weights_of_a_quantised_block_can_be_read(quantised, plain):
    base = quantised()
    layouts = find_mlps(base).layouts
    assert list(layouts) == LAYERS
    exact = load_base(plain)
    for name, layout in layouts.items():
        read = dense_weights(base.get_submodule(name), layout)
        want = dense_weights(exact.get_submodule(name), layout)
        for got, weight in zip(read, want, strict=True):
            assert got.shape == weight.shape and not torch.equal(got.float(), weight)
            assert (got.float() - weight).abs().max() < 0.2 * weight.abs().max()
