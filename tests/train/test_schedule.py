from itertools import pairwise

import pytest
import torch
from peft import get_peft_model

from srde import SrdeConfig
from srde.train.schedule import SparsitySchedule
from srde.tuner.prune import prune_adapter
from tiny import tiny


def test_sparsity_falls_from_the_initial_to_the_target_in_cuts():
    schedule = SparsitySchedule(0.05, 0.01, begin=0.2, end=0.7, cuts=5)
    values = [schedule.at(step, 100) for step in range(101)]
    assert values[:30] == [0.05] * 30 and values[70:] == pytest.approx([0.01] * 31)
    assert all(a >= b for a, b in pairwise(values)) and len(set(values)) == 6
    assert values[30] == pytest.approx(0.01 + 0.04 * (1 - 0.2) ** 3)


def test_a_schedule_without_a_fall_changes_nothing():
    assert {SparsitySchedule(0.02, 0.02).at(step, 10) for step in range(11)} == {0.02}


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_pruned_training_goes_on_as_if_the_dropped_values_had_been_held_at_zero(granularity):
    """Parameters and Adam's momenta shrink together: the next steps equal those of the masked, unpruned model."""

    def fresh():
        torch.manual_seed(0)
        config = SrdeConfig(
            num_experts=3, initial_sparsity=0.25, target_sparsity=0.1, sparsity=0.2, granularity=granularity
        )
        model = get_peft_model(tiny(), config)
        deltas = [layer.srde_experts["default"] for layer in model.srde.layers.values()]
        for delta in deltas:
            torch.nn.init.normal_(delta.values, std=0.1, generator=torch.Generator().manual_seed(2))
        return model, deltas, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def step(model, optimizer, after=lambda: None):
        ids = torch.arange(24).view(2, 12)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        after()

    model, deltas, optimizer = fresh()
    step(model, optimizer)
    masks = []
    for delta in deltas:
        kept = delta.prune(0.1)
        at = (
            kept
            if granularity == "element"
            else kept.view(1, *kept.shape, 1).expand(delta.num_matrices, -1, -1, 32)
        )
        masks.append(torch.zeros_like(delta.values).scatter(-1 if granularity == "element" else 2, at, 1.0))

    def hold():
        for delta, mask in zip(deltas, masks, strict=True):
            delta.values.data *= mask

    hold()
    for _ in range(3):
        step(model, optimizer, hold)
    want = [layer.srde_experts["default"].dense(torch.ones(3)) for layer in model.srde.layers.values()]

    model, deltas, optimizer = fresh()
    step(model, optimizer)
    prune_adapter(model, 0.1, optimizer=optimizer)
    assert model.peft_config["default"].sparsity == 0.1
    for _ in range(3):
        step(model, optimizer)
    for delta, matrices in zip(deltas, want, strict=True):
        for got, expected in zip(delta.dense(torch.ones(3)), matrices, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
