"""Pruning a whole adapter: what stays computes as before, and trains on as if nothing else had ever been there."""

import copy

import pytest
import torch
from adapters import LOADERS, adapted, config, fill, load_base, tokens, trainable
from peft import get_peft_model

from srde.tuner.prune import prune_adapter
from tiny import tiny

GRANULARITIES = ["neuron", "element"]


def drop_small(model, sparsity):
    """The same adapter with the values that pruning would drop at zero; and which ones stay, per parameter."""
    kept = {}
    for layer in model.srde.layers.values():
        delta = layer.srde_experts["default"]
        positions = delta.prune(sparsity)
        stays = torch.zeros(delta.index.shape, dtype=torch.bool).scatter(-1, positions, True)
        if delta.values.ndim == 4:
            stays = stays.view(1, *stays.shape, 1).expand_as(delta.values)
        delta.values.data *= stays
        kept[layer.name] = stays
    return kept


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_pruned_adapter_is_the_old_one_without_its_smallest_values(model_type, granularity):
    model = adapted(model_type, granularity=granularity, sparsity=0.25)
    before, small = model(tokens()).logits, copy.deepcopy(model)
    drop_small(small, 0.05)
    want = small(tokens()).logits
    assert not torch.allclose(want, before)
    prune_adapter(model, 0.05)
    torch.testing.assert_close(model(tokens()).logits, want, atol=1e-6, rtol=0)
    fresh = adapted(model_type, granularity=granularity)
    assert model.get_nb_trainable_parameters() == fresh.get_nb_trainable_parameters()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_optimizer_goes_on_with_the_momenta_of_what_stays(granularity):
    model = adapted(granularity=granularity, sparsity=0.25).double()

    def step(one, optimizer):
        optimizer.zero_grad()
        one(tokens(), labels=tokens()).loss.backward()
        optimizer.step()

    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
    step(model, optimizer)
    whole = copy.deepcopy(model)
    other = torch.optim.AdamW(trainable(whole).values(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    prune_adapter(model, 0.05, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert all(a is b for a, b in zip(trainable(model).values(), group["params"], strict=True))
    kept = drop_small(whole, 0.05)
    step(model, optimizer)
    step(whole, other)
    for name, stays in kept.items():
        got = model.srde.layers[name].srde_experts["default"].values
        want = whole.srde.layers[name].srde_experts["default"].values
        assert got.numel() < want.numel()
        torch.testing.assert_close(got.flatten(), want[stays], atol=1e-9, rtol=0)


def test_a_pruned_adapter_is_saved_as_what_it_is_now(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = fill(get_peft_model(load_base(tmp_path / "base"), config(sparsity=0.25))).eval()
    prune_adapter(model, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    for loader in LOADERS.values():
        loaded = loader(str(tmp_path / "base"), str(tmp_path / "adapter"))
        assert torch.equal(loaded.eval()(tokens()).logits, model(tokens()).logits)
    assert model.peft_config["default"].current_sparsity == 0.1
    assert model.peft_config["default"].target_sparsity == 0.05


def test_only_the_named_adapter_is_pruned():
    model = adapted(sparsity=0.25)
    model.add_adapter("other", config(sparsity=0.25))
    want = model(tokens()).logits
    prune_adapter(model, 0.05, adapter="other")
    assert torch.equal(model(tokens()).logits, want)
    assert [model.peft_config[name].sparsity for name in ("default", "other")] == [0.25, 0.05]
