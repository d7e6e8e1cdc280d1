"""Locked experts: never chosen, no gradient, and held to the bit under any optimizer."""

import re

import pytest
import torch
from adapters import LAYERS, adapted, config, tokens, trainable

from srde.errors import ConfigError, UsageError


@pytest.mark.parametrize("granularity", ["neuron", "element"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_held_locked_experts_keep_every_bit_while_the_others_train(granularity, weight_decay):
    model = adapted(granularity=granularity, num_shared_experts=1).train()
    groups = trainable(model).values()
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=weight_decay)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()  # now every expert has momentum
    model.srde.lock([1, 3])
    handle = model.srde.hold_locked(optimizer)
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}

    def moved():
        out = {}
        for name, parameter in trainable(model).items():
            change = (parameter.detach() - before[name]).abs()
            by_expert = change if "router" in name else change.transpose(0, 1)
            out[name] = by_expert.flatten(1).amax(1) > 0
        return out

    for _ in range(2):
        optimizer.zero_grad()
        with model.srde.record() as record:
            model(tokens(), labels=tokens()).loss.backward()
        assert not {1, 3} & set(record.layers()[LAYERS[0]][0].flatten().tolist())
        for layer in model.srde.layers.values():
            assert layer.srde_experts["default"].values.grad[:, [1, 3]].abs().max() == 0
        optimizer.step()
    for name, by_expert in moved().items():
        assert by_expert.tolist() == [True, False, True, False] + [True] * ("router" not in name)

    handle.remove()
    optimizer.step()
    assert all(by_expert[:4].all() for by_expert in moved().values())


def test_a_lock_replaces_the_one_before_and_is_of_one_adapter():
    model = adapted()
    model.add_adapter("other", config())
    model.srde.lock([0, 1])
    model.srde.lock([2])
    assert {layer.srde_router["default"].locked for layer in model.srde.layers.values()} == {(2,)}
    assert {layer.srde_router["other"].locked for layer in model.srde.layers.values()} == {()}
    model.srde.lock([], adapter="default")
    assert {layer.srde_router["default"].locked for layer in model.srde.layers.values()} == {()}


def test_impossible_locks_are_refused_and_change_nothing():
    model = adapted()
    model.srde.lock([2])
    with pytest.raises(
        ConfigError, match=r"^locked expert=4: routed experts are numbered 0 to 3. lock only experts that"
    ):
        model.srde.lock([0, 4])
    with pytest.raises(
        ConfigError, match=r"^locked experts=\[0, 1, 2, 3\]: at least one slot must stay open"
    ):
        model.srde.lock(range(4))
    message = "adapter='math': the model has no such srde adapter; it has default. name one that it has."
    with pytest.raises(UsageError, match="^" + re.escape(message) + "$"):
        model.srde.lock([0], adapter="math")
    assert {layer.srde_router["default"].locked for layer in model.srde.layers.values()} == {(2,)}
