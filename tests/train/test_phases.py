"""The phases of a run: the founding notes' table, what is left of it in short runs, and what is refused."""

import random
from itertools import pairwise

import pytest

from srde.errors import ConfigError
from srde.train.phases import NAMES, plan_phases
from srde.train.schedules import unlock_span


def table(*args, **kwargs):
    return {phase.name: (phase.start, phase.end) for phase in plan_phases(*args, **kwargs)}


@pytest.mark.parametrize("max_steps", [5000, 10000])
def test_long_runs_have_the_phases_of_the_founding_notes(max_steps):
    want = {
        "warm_up": (0, 100),
        "mask_learning": (100, 600),
        "delta_training": (600, 1600),
        "joint": (1600, max_steps),
    }
    assert table(max_steps) == want
    del want["delta_training"]
    want |= {"expert_pretraining": (600, 1100), "delta_training": (1100, 1600)}
    assert table(max_steps, pretraining=None) == want
    want = {"warm_up": (0, 100), "delta_training": (100, 1100), "joint": (1100, max_steps)}
    assert table(max_steps, learn_masks=False) == want


@pytest.mark.parametrize(
    ("max_steps", "want"),
    [
        (1000, {"warm_up": (0, 20), "mask_learning": (20, 120), "delta_training": (120, 320), "joint": (320, 1000)}),
        (50, {"warm_up": (0, 1), "mask_learning": (1, 6), "delta_training": (6, 16), "joint": (16, 50)}),
        (10, {"mask_learning": (0, 1), "delta_training": (1, 3), "joint": (3, 10)}),
        (2, {"mask_learning": (0, 1), "joint": (1, 2)}),
    ],
)  # fmt: skip
def test_short_runs_have_them_in_proportion(max_steps, want):
    assert table(max_steps) == want


def test_pretraining_is_the_first_part_of_delta_training():
    assert table(5000, pretraining=200) == {
        "warm_up": (0, 100), "mask_learning": (100, 600), "expert_pretraining": (600, 800), "delta_training": (800, 1600),
        "joint": (1600, 5000),
    }  # fmt: skip
    # longer than delta training by default: that grows with it
    assert table(5000, pretraining=2000, learn_masks=False) == {
        "warm_up": (0, 100), "expert_pretraining": (100, 2100), "joint": (2100, 5000)
    }  # fmt: skip
    # by default: never longer than a delta training that was given
    assert table(5000, pretraining=None, delta_training=100)["expert_pretraining"] == (600, 700)
    assert "expert_pretraining" not in table(5000, pretraining=None, delta_training=0)


def test_given_lengths_hold_and_those_of_0_are_left_out():
    assert table(30, warm_up=0, mask_learning=4, delta_training=0) == {
        "mask_learning": (0, 4),
        "joint": (4, 30),
    }
    assert table(30, warm_up=3, mask_learning=4, delta_training=23) == {
        "warm_up": (0, 3), "mask_learning": (3, 7), "delta_training": (7, 30)
    }  # fmt: skip
    assert table(1, warm_up=0, learn_masks=False, delta_training=0) == {"joint": (0, 1)}


@pytest.mark.parametrize(
    ("flag", "given"), [("delta_training_steps", "delta_training"), ("expert_pretrain_steps", "pretraining")]
)
def test_a_length_that_does_not_fit_is_refused(flag, given):
    with pytest.raises(ConfigError, match=rf"{flag}=24: max_steps=30 leaves 23 steps for it"):
        table(30, warm_up=3, mask_learning=4, **{given: 24})


def test_every_step_is_in_exactly_one_phase_and_phases_come_in_order():
    rng = random.Random(0)
    accepted = 0
    for _ in range(600):
        settings = {
            "warm_up": rng.choice([None, 0, rng.randrange(40)]),
            "mask_learning": rng.choice([None, rng.randrange(40)]),
            "delta_training": rng.choice([None, 0, rng.randrange(60)]),
            "pretraining": rng.choice([None, 0, rng.randrange(30)]),
            "learn_masks": rng.random() < 0.7,
        }
        max_steps = rng.choice([1, 2, 10, 50, 333, 5000, 7001])
        try:
            phases = plan_phases(max_steps, **settings)
        except ConfigError:
            continue
        accepted += 1
        own = list(phases)
        assert own[0].start == 0 and own[-1].end == max_steps
        assert all(a.end == b.start for a, b in pairwise(own)) and all(p.end > p.start for p in own)
        order = [NAMES.index(phase.name) for phase in own]
        assert order == sorted(set(order))
        for step in rng.sample(range(max_steps), min(max_steps, 30)):
            assert [p for p in own if p.start <= step < p.end] == [phases.at(step)]
        assert phases.at(max_steps) == phases.at(max_steps + 7) == own[-1]
        assert phases.at(phases.first_trained).values
        assert not any(phases.at(step).values for step in range(phases.first_trained))
        for phase in own:
            assert phases.named(phase.name) is phase
            if (given := settings.get(phase.name)) and phase.name in ("warm_up", "mask_learning"):
                assert phase.end - phase.start == given
        start, end = unlock_span(phases)
        assert end - start > 0 and (start == max_steps or phases.at(start).values)
        assert start == max_steps or phases.at(start).name in ("delta_training", "joint")
    assert accepted > 200


def test_what_each_phase_trains():
    phases = plan_phases(5000, pretraining=None)
    assert {p.name: (p.values, p.routers) for p in phases} == {
        "warm_up": (False, False), "mask_learning": (False, False), "expert_pretraining": (True, True),
        "delta_training": (True, False), "joint": (True, True),
    }  # fmt: skip
    assert phases.first_trained == 600 and plan_phases(5000, learn_masks=False).named("mask_learning") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_up": -1}, "phase_warmup_steps=-1: a phase has at least 0 steps. use 0 to leave it out."),
        ({"mask_learning": -2}, "mask_learning_steps=-2: a phase has at least 0 steps. use 0 to leave it out."),
        ({"delta_training": -3}, "delta_training_steps=-3: a phase has at least 0 steps. use 0 to leave it out."),
        ({"pretraining": -4}, "expert_pretrain_steps=-4: a phase has at least 0 steps. use 0 to leave it out."),
        (
            {"mask_learning": 5, "learn_masks": False},
            "mask_learning_steps=5: masks are learned only with mask_init='learned'. pass --mask_init learned, or leave the "
            "phase out.",
        ),
        (
            {"mask_learning": 0},
            "mask_learning_steps=0: mask_init='learned' needs steps to learn them in. pass --mask_init magnitude, gradient or "
            "random, or leave --mask_learning_steps out.",
        ),
        (
            {"pretraining": 40, "delta_training": 30},
            "expert_pretrain_steps=40: it is a part of delta training, which has 30 steps. raise --delta_training_steps, or "
            "leave it out.",
        ),
        (
            {"warm_up": 60, "mask_learning": 40},
            "max_steps=100: the first 100 steps train nothing (warm-up and mask learning). raise --max_steps, or shorten "
            "--phase_warmup_steps and --mask_learning_steps.",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_run_is_refused(settings, message):
    with pytest.raises(ConfigError) as raised:
        plan_phases(100, **settings)
    assert str(raised.value) == message


def test_a_single_step_cannot_also_learn_masks():
    with pytest.raises(ConfigError, match=r"^max_steps=1: the first 1 steps train nothing"):
        plan_phases(1)
