from itertools import pairwise

import pytest
import torch
from peft import get_peft_model

from srde import SrdeConfig
from srde.train.schedules import LinearSchedule, SparsitySchedule, UnlockSchedule
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


def test_cuts_fall_in_the_span_that_trains_values():
    """Until step 60 of 160 nothing is trained: the cuts are those of a run of 100 steps that begins there."""
    late = SparsitySchedule(0.05, 0.01, start=60)
    plain = SparsitySchedule(0.05, 0.01)
    assert [late.at(step, 160) for step in range(60, 161)] == [plain.at(step, 100) for step in range(101)]
    assert {late.at(step, 160) for step in range(60)} == {0.05}


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7, 5000])
def test_every_run_ends_at_its_target(max_steps):
    for start in {0, max_steps // 2, max_steps - 1, max_steps}:
        schedule = SparsitySchedule(0.05, 0.01, start=start)
        values = [schedule.at(step, max_steps) for step in range(max_steps + 1)]
        assert values[-1] == pytest.approx(0.01) and all(a >= b for a, b in pairwise(values))
        assert set(values[:start]) <= {0.05}


def test_a_line_goes_from_first_to_last_and_is_flat_outside():
    line = LinearSchedule(2.0, 1.0, start=10, end=30)
    assert [line.at(step) for step in (0, 10, 15, 20, 29, 30, 1000)] == pytest.approx(
        [2, 2, 1.75, 1.5, 1.05, 1, 1]
    )
    assert line.at(30) == 1.0 and line.at(10) == 2.0  # exactly
    assert {LinearSchedule(1.5, 1.5, 0, 9).at(step) for step in range(12)} == {1.5}


@pytest.mark.parametrize(("start", "end"), [(5, 5), (7, 5), (0, 0)])
def test_a_line_without_length_is_a_step(start, end):
    line = LinearSchedule(2.0, 1.0, start, end)
    assert [line.at(step) for step in range(10)] == [2.0] * end + [1.0] * (10 - end)


def test_experts_are_opened_one_after_the_other():
    opened = [UnlockSchedule("linear", 4, start=10, end=40).at(step) for step in range(50)]
    assert opened == [1] * 20 + [2] * 10 + [3] * 10 + [4] * 10


def test_one_expert_is_open_at_first_and_then_all():
    assert [UnlockSchedule("warmup", 4, 10, 20).at(step) for step in range(25)] == [1] * 20 + [4] * 5


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("end", [6, 7, 12, 100])
def test_whatever_the_span_at_least_one_is_open_and_at_its_end_all_are(experts, end):
    for kind in ("none", "linear", "warmup"):
        opened = [UnlockSchedule(kind, experts, 5, end).at(step) for step in range(120)]
        assert all(1 <= a <= b <= experts for a, b in pairwise(opened))
        assert opened[end] == experts and (kind != "none" or opened[0] == experts)
        if kind == "linear" and end - 5 >= experts:
            assert set(opened) == set(range(1, experts + 1))


@pytest.mark.parametrize("start", [0, 3])
def test_an_unlocking_without_length_opens_all_at_once(start):
    for kind in ("linear", "warmup"):
        schedule = UnlockSchedule(kind, 4, start, start)
        assert [schedule.at(step) for step in range(6)] == [1] * start + [4] * (6 - start)


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
