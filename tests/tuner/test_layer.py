"""The layer inside whole models: training, checkpointing, generation, padding, compilation, and what it refuses to run."""

import re

import pytest
import torch
from adapters import LAYERS, adapted, config, fill, load_base, tensors, tokens, trainable
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import rms_norm

from srde.errors import UnsupportedModelError, UsageError
from srde.tuner.layer import SrdeLayer
from tiny import MODELS, tiny

GRANULARITIES = ["neuron", "element"]
KINDS = ["llama", "gpt2", "phi3", "opt"]


def gradients(model, **call):
    model.zero_grad()
    model(tokens(), labels=tokens(), **call).loss.backward()
    return {name: p.grad.clone() for name, p in trainable(model).items()}


# ---- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model_type", KINDS)
def test_gradients_are_the_slopes(model_type, granularity, monkeypatch):
    model = adapted(model_type, granularity=granularity, num_shared_experts=1).double()
    for norm in model.modules():  # Transformers' own falls back to float32
        if type(norm).__name__.endswith("RMSNorm"):
            monkeypatch.setattr(
                norm, "forward", lambda x, norm=norm: rms_norm(x, norm.weight.shape, norm.weight, 1e-6)
            )

    def score():
        logits = model(tokens()).logits
        return (logits * torch.arange(logits.numel()).view(logits.shape).cos()).sum()

    score().backward()
    assert len(trainable(model)) == 4
    for parameter in trainable(model).values():
        generator = torch.Generator().manual_seed(5)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        start, scores = parameter.data.clone(), []
        for step in (1e-6, -1e-6):
            parameter.data = start + step * direction
            scores.append(score().item())
        parameter.data = start
        slope = (scores[0] - scores[1]) / 2e-6
        assert abs(slope) > 1e-3
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_steps_lower_the_loss_and_leave_the_base_as_it_was(granularity):
    model = get_peft_model(tiny(), config(granularity=granularity)).train()
    before = tensors(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(tokens(), labels=tokens()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05
    after = model.state_dict()
    assert {n for n, tensor in before.items() if not torch.equal(tensor, after[n])} == set(trainable(model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_gradient_checkpointing_changes_no_gradient(model_type, reentrant):
    model = adapted(model_type).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    torch.manual_seed(0)
    want = gradients(model)
    calls = []
    hook = model.srde.layers[next(iter(model.srde.layers))].register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    got = gradients(model)
    hook.remove()
    assert len(calls) == 2  # once more in the backward
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert all(gradient.abs().max() > 0 for gradient in got.values())


def test_autocast_rounds_the_base_as_ever_and_never_the_router():
    base = tiny().eval()
    with torch.autocast("cpu", torch.bfloat16):
        want = base(tokens()).logits
        model = get_peft_model(base, config())
        assert torch.equal(model(tokens()).logits, want)
        with fill(model).srde.record() as record:
            assert not torch.equal(model(tokens()).logits, want)
    assert {route.logits_TE.dtype for route in record.calls[0].routes.values()} == {torch.float32}
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


# ---- generation and padding --------------------------------------------------------------------------------------------


def generate(model, ids, mask, **kwargs):
    """Greedy new tokens; never the end, so that all sequences have the same length."""
    new = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **kwargs
    )
    return new[:, ids.shape[1] :]


def prompts():
    """Eight prompts of different lengths, padded on the left."""
    lengths = [3, 9, 5, 9, 1, 7, 2, 8]
    ids, mask = torch.zeros(8, 9, dtype=torch.long), torch.zeros(8, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 9 - length :] = tokens(1, length, seed=row)[0]
        mask[row, 9 - length :] = 1
    return ids, mask, lengths


@pytest.mark.parametrize("path", ["masked", "grouped"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_batches_caches_and_padding_change_no_generated_token(model_type, cache, path):
    model = adapted(model_type)
    ids, mask, lengths = prompts()
    want = torch.cat([generate(model, ids[n : n + 1, -length:], None) for n, length in enumerate(lengths)])
    with model.disable_adapter():
        assert not torch.equal(generate(model, ids, mask), want)
    model.srde.path = path
    assert torch.equal(generate(model, ids, mask, **cache), want)


@pytest.mark.parametrize("path", ["masked", "grouped"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_what_padding_says_is_nobodys_business(model_type, granularity, path):
    model = adapted(model_type, granularity=granularity)
    model.srde.path = path
    ids, mask, lengths = prompts()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    noisy = torch.where(mask.bool(), ids, tokens(8, 9, seed=77))
    assert not torch.equal(noisy, ids)
    real = mask.bool()
    logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
    other = model(noisy, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(other[real], logits[real], atol=1e-6, rtol=0)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, -length:]).logits
        torch.testing.assert_close(logits[row : row + 1, -length:], alone, atol=1e-5, rtol=0)


# ---- compilation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "granularity"), [("llama", "neuron"), ("opt", "element")])
def test_the_whole_model_compiles_without_a_graph_break(model_type, granularity):
    model = adapted(model_type, granularity=granularity, layers_to_transform=1)
    with torch.no_grad():
        want = model(tokens()).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens()).logits, want, atol=1e-5, rtol=0)


# ---- the layer ---------------------------------------------------------------------------------------------------------


def test_a_layer_shows_what_its_block_has():
    model = adapted()
    layer = model.srde.layers[LAYERS[0]]
    assert isinstance(layer, SrdeLayer) and layer.act_fn is layer.base_layer.act_fn
    assert layer.gate_proj.weight.shape == (48, 32)
    with pytest.raises(AttributeError, match="no attribute 'gate_projection'"):
        _ = layer.gate_projection
    down = adapted("opt").get_submodule("base_model.model.model.decoder.layers.0.fc2")
    assert down.in_features == 48 and down.weight.shape == (32, 48)


def test_values_and_routers_are_float32_whatever_the_base_is_in():
    model = adapted(dtype=torch.bfloat16)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    with model.srde.record() as record:
        assert model(tokens()).logits.dtype == torch.bfloat16
    assert {route.logits_TE.dtype for route in record.calls[0].routes.values()} == {torch.float32}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_neuron_goes_to_two_experts_while_there_are_enough(granularity):
    for mask_init in ("magnitude", "random"):
        for layer in adapted(granularity=granularity, mask_init=mask_init).srde.layers.values():
            index = layer.srde_experts["default"].index
            assert layer.srde_experts["default"].disjoint() and index.min() >= 0
            assert (index.diff(dim=-1) > 0).all()


def test_random_masks_differ_by_layer_and_seed_and_not_by_which_layers_are_chosen():
    def masks(**fields):
        model = get_peft_model(tiny(), config(mask_init="random", **fields))
        return {name: layer.srde_experts["default"].index for name, layer in model.srde.layers.items()}

    first, again, other = masks(), masks(), masks(mask_seed=1)
    assert all(
        torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in LAYERS
    )
    assert not torch.equal(first[LAYERS[0]], first[LAYERS[1]])
    assert torch.equal(masks(layers_to_transform=[1])[LAYERS[1]], first[LAYERS[1]])


def test_masks_by_gradient_must_be_calibrated_first():
    model = get_peft_model(tiny(), config(mask_init="gradient"))
    message = (
        "adapter in model.layers.0.mlp='default': mask_init='gradient' chooses the masks on data, and has seen none yet. "
        "call srde.calibrate_masks(model, batches) first, or use mask_init='magnitude'."
    )
    with pytest.raises(UsageError, match="^" + re.escape(message) + "$"):
        model(tokens())
    with model.disable_adapter():
        assert torch.equal(model.eval()(tokens()).logits, tiny().eval()(tokens()).logits)


def test_a_configuration_from_a_file_makes_no_new_adapter(tmp_path):
    adapted().save_pretrained(tmp_path)
    saved = PeftModel.from_pretrained(tiny(), tmp_path).peft_config["default"]
    model = get_peft_model(tiny(), saved)
    message = (
        "adapter in model.layers.0.mlp='default': its tensors were to come from a file, and the file did not hold them "
        "all. load the adapter from a complete folder; for a new adapter use a new SrdeConfig."
    )
    with pytest.raises(UsageError, match="^" + re.escape(message) + "$"):
        model(tokens())


class Block(nn.Module):
    """Has the shapes of an MLP; whether it is one shows when it runs."""

    def __init__(self, odd):
        super().__init__()
        self.up, self.down, self.act, self.odd = nn.Linear(8, 24), nn.Linear(24, 8), nn.GELU(), odd

    def forward(self, x):
        return self.down(self.act(self.up(x))) + (x if self.odd else 0)


@pytest.mark.parametrize("odd", [False, True])
def test_weights_that_come_later_are_tried_at_the_first_forward(odd):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = get_peft_model(nn.Sequential(Block(odd)), config(task_type=None))
    layer = model.srde.layers["0"]
    assert not layer.layout.tried
    fresh = get_peft_model(nn.Sequential(Block(False)), config(task_type=None))
    model.load_state_dict(fresh.state_dict(), assign=True)
    x = torch.randn(3, 8)
    if odd:
        message = (
            "0='Block': its forward is not act(x W) W', though its shapes are those of an MLP. "
            "leave this module out with target_modules."
        )
        with pytest.raises(UnsupportedModelError, match="^" + re.escape(message) + "$"):
            model(x)
    else:
        assert torch.equal(model(x), fresh(x)) and layer.layout.tried


def test_a_loaded_base_on_meta_is_tried_too(tmp_path):
    """`low_cpu_mem_usage` and Transformers build on the meta device and fill in later."""
    for model_type in ("llama", "gpt2"):
        assert model_type in MODELS
        tiny(model_type).save_pretrained(tmp_path / model_type)
        model = get_peft_model(load_base(tmp_path / model_type), config())
        assert all(layer.layout.tried for layer in model.srde.layers.values())
