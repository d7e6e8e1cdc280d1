"""A token that stands alone takes a shorter way to the same numbers; and only where that way is right."""

import copy

import pytest
import torch
from adapters import adapted, config
from peft import get_peft_model

from srde.core import lone
from srde.hub.convert import from_adapter
from srde.tuner.prune import prune_adapter
from tiny import tiny

IDS = torch.tensor([[7, 23, 41, 9]])
SETTINGS = {
    "plain": {},
    "all": {"top_k": 4},
    "one": {"top_k": 1},
    "null": {"null_expert": True, "top_k": 3},
    "shared": {"num_shared_experts": 2},
    "warm": {"router_temperature": 2.5},
    "one layer": {"layers_to_transform": 1},
}


@pytest.fixture
def taken(monkeypatch):
    """How often the short way was gone."""
    calls = []
    run = lone.LoneToken.run
    monkeypatch.setattr(lone.LoneToken, "run", lambda self, *given: calls.append(1) or run(self, *given))
    return calls


def step(model):
    """Logits of one more token after a prompt."""
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        return model(IDS[:, :1], past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_what_the_long_way_gives(kind, settings, dtype, taken):
    model = adapted(kind, **settings)
    model.get_base_model().to(dtype)
    for name, parameter in model.named_parameters():  # as they are on such a base
        parameter.data = parameter.data.float() if ".srde_" in name else parameter.data
    short = step(model)
    layers = 1 if "layers_to_transform" in settings else 2
    assert len(taken) == layers
    model.srde.path = "masked"
    long = step(model)
    assert len(taken) == layers
    model.srde.path = None
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(short, long, atol=tolerance * float(long.abs().max()), rtol=0)
    with model.disable_adapter():
        assert (step(model) - short).abs().max() > 1e-3 and len(taken) == layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_deltas_leave_every_bit(dtype, taken):
    base = tiny().to(dtype).eval()
    before = step(base)
    model = get_peft_model(base, config()).eval()
    assert torch.equal(step(model), before) and len(taken) == 2


def test_it_takes_the_numbers_as_they_are_now(taken):
    model = adapted()

    def long():
        model.srde.path = "masked"
        logits = step(model)
        model.srde.path = None
        return logits

    step(model)
    layer = model.srde.layers["model.layers.0.mlp"]
    for change in (
        lambda: layer.srde_experts["default"].values.data.mul_(-1),
        lambda: setattr(
            layer.srde_experts["default"].values, "data", layer.srde_experts["default"].values.data * 3
        ),
        lambda: setattr(
            layer.srde_router["default"].weight, "data", layer.srde_router["default"].weight.data.flip(0)
        ),
        lambda: prune_adapter(model, 0.03),
        lambda: layer.srde_experts["default"].index.copy_(layer.srde_experts["default"].index.flip(0)),
    ):
        change()
        torch.testing.assert_close(step(model), long(), atol=1e-4, rtol=0)
    twin = copy.deepcopy(model)
    layer.srde_experts["default"].values.data.zero_()
    assert not torch.equal(step(twin), step(model))


def test_what_is_recorded_is_the_same(taken):
    model = adapted(null_expert=True, num_shared_experts=1)
    records = []
    for path in (None, "masked"):
        model.srde.path = path
        with model.srde.record() as record:
            step(model)
        records.append(record)
    assert len(taken) == 2 and len(records[0].calls) == len(records[1].calls) == 2
    for (slots, gates), (other_slots, other_gates) in zip(
        records[0].layers().values(), records[1].layers().values(), strict=True
    ):
        assert torch.equal(slots, other_slots)
        torch.testing.assert_close(gates, other_gates)


def test_where_it_is_not_gone(taken):
    model = adapted()
    with model.srde.force_experts(1), model.srde.record() as record:
        step(model)
    assert all((gates[:, 1] == 1).all() for _, gates in record.layers().values())
    model.srde.lock([0])
    step(model)
    model.srde.lock([])
    step(adapted(granularity="element"))
    step(adapted("phi3"))  # gate and up in one matrix
    step(adapted("opt"))
    step(adapted().double())
    model(IDS[:, :1]).logits.sum().backward()
    assert all(layer.srde_experts["default"].values.grad is not None for layer in model.srde.layers.values())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(IDS[:, :1])
    assert taken == []


def test_two_adapters_and_exported_models(taken, tmp_path):
    model = adapted()
    one = step(model)
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(step(model), one, atol=1e-5, rtol=0)  # the second is zero
    assert len(taken) == 2
    model.base_model.set_adapter("default")
    made = from_adapter(model)
    assert torch.equal(step(made), one) and len(taken) == 4
