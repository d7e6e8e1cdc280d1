"""Each alert when it is due, and none when all is well."""

from __future__ import annotations

import pytest

from srde.monitor.alerts import ERROR, WARNING, alerts
from srde.monitor.run import RunReader, read_run


def raised(fabricated, **reading):
    run = RunReader(fabricated.folder).read(**reading) if reading else read_run(fabricated.folder)
    return {alert.kind: alert for alert in alerts(run)}


def test_a_healthy_run_raises_nothing(fabricate):
    fabricated = fabricate()
    fabricated.checkpoint()
    assert raised(fabricated) == {}
    assert raised(fabricate("new", steps=0)) == {}


def test_stalled(fabricate):
    fabricated = fabricate()
    alert = raised(fabricated, now=fabricated.time_of(60) + 300)["stalled"]
    assert alert.severity == ERROR and "5 min" in alert.text and "within 1 min" in alert.text


def test_died_names_the_checkpoint_to_resume_from(fabricate, dead_pid):
    fabricated = fabricate()
    fabricated.beat(pid=dead_pid)
    assert "no checkpoint" in raised(fabricated)["died"].text
    fabricated.checkpoint("checkpoint-20")
    fabricated.checkpoint("checkpoint-40")
    assert "resume from checkpoint-40" in raised(fabricated)["died"].text
    fabricated.damage("checkpoint-40")
    assert "resume from checkpoint-20" in raised(fabricated)["died"].text


def test_failed_says_why(fabricate):
    fabricated = fabricate()
    fabricated.beat("failed", reason="CUDA out of memory")
    alert = raised(fabricated)["failed"]
    assert alert.severity == ERROR and "step 60: CUDA out of memory" in alert.text


# The losses before: 1.0 and 1.2 in turns, so median 1.1 and 6 deviations of 1.4826 x 0.1 = 0.89 above it.
@pytest.mark.parametrize(("last", "due"), [(1.98, False), (2.0, True), (0.1, False)])
def test_a_loss_spike_is_six_robust_deviations(last, due, fabricate):
    fabricated = fabricate(steps=20, max_steps=100)  # the phase changes here
    for step in range(40):
        fabricated.train(1, loss=1.0 + 0.2 * (step % 2))
    fabricated.train(1, loss=last)
    found = raised(fabricated)
    assert set(found) == ({"loss_spike"} if due else set())
    if due:
        assert found["loss_spike"].severity == WARNING and "2.000" in found["loss_spike"].text


@pytest.mark.parametrize(
    ("before", "last", "due"),
    [(2.0, 2.39, False), (2.0, 2.41, True), (0.1, 0.19, False), (0.1, 0.21, True)],
)
def test_a_loss_spike_is_twenty_per_cent_and_a_tenth_at_least(before, last, due, fabricate):
    fabricated = fabricate(steps=20, max_steps=100)
    fabricated.train(30, loss=before)
    fabricated.train(1, loss=last)
    assert ("loss_spike" in raised(fabricated)) == due


def test_a_new_phase_is_no_spike(fabricate):
    fabricated = fabricate(steps=0, max_steps=100)
    fabricated.train(10, loss=0.5)  # warm-up ends
    fabricated.train(9, loss=2.0)
    assert raised(fabricated) == {}


def test_a_loss_that_is_no_number(fabricate):
    fabricated = fabricate()
    fabricated.train(1, loss=float("nan"))
    assert raised(fabricated)["loss_not_finite"].severity == ERROR


@pytest.mark.parametrize(
    ("steps", "severity"), [([10], None), ([950], WARNING), (range(955, 960), ERROR)], ids=str
)
def test_skipped_steps_of_the_last_tenth(steps, severity, fabricate):
    fabricated = fabricate(steps=20, max_steps=2000)
    fabricated.beat(step=1000)
    for step in steps:
        fabricated.event("skipped_step", "the loss is not finite", step=step)
        fabricated.event("skipped_step", "again after a resumption", step=step)
    found = raised(fabricated)
    assert [alert.severity for alert in found.values()] == ([severity] if severity else [])
    if severity:
        assert f"{len(steps)} step" in found["skipped_steps"].text


COLLAPSED = [0.93, 0.03, 0.02, 0.02, 1.0]
LOW_ENTROPY = [0.89, 0.11, 0.0, 0.0, 1.0]  # entropy 0.35 of 1.39 nats: 0.25
EVEN = [0.25, 0.25, 0.25, 0.25, 1.0]


@pytest.mark.parametrize(
    ("layers", "due"),
    [
        ([COLLAPSED, EVEN, EVEN, EVEN], False),
        ([COLLAPSED, COLLAPSED, EVEN, EVEN], True),
        ([COLLAPSED, LOW_ENTROPY, EVEN, EVEN], True),
        ([EVEN] * 4, False),
    ],
    ids=["a quarter", "half", "entropy", "even"],
)
def test_collapsed_routers_in_more_than_a_quarter_of_the_layers(layers, due, fabricate):
    fabricated = fabricate(experts=4)
    fabricated.train(12, loads=layers)
    found = raised(fabricated)
    assert ("collapsed_router" in found) == due
    if due:
        assert "2 of 4 layers (0, 1)" in found["collapsed_router"].text


def test_labels_that_force_one_expert_are_no_collapse(fabricate):
    fabricated = fabricate(experts=4, steps=10, max_steps=200)
    fabricated.train(25, loads=[COLLAPSED] * 4)
    assert fabricated.phase_of(fabricated.step - 1) == "expert_pretraining" and raised(fabricated) == {}


def test_dead_experts_are_named(fabricate):
    fabricated = fabricate(experts=4)
    fabricated.train(12, loads=[EVEN, [0.4, 0.3, 0.3, 0.0, 1.0], EVEN, EVEN])
    alert = raised(fabricated)["dead_experts"]
    assert alert.severity == WARNING and "1 dead expert (" in alert.text and "layer 1 expert 3" in alert.text


def test_a_damaged_newest_checkpoint(fabricate):
    fabricated = fabricate()
    for step in (20, 40):
        fabricated.checkpoint(f"checkpoint-{step}")
    fabricated.damage("checkpoint-20")
    assert raised(fabricated) == {}
    fabricated.damage("checkpoint-40")
    alert = raised(fabricated)["damaged_checkpoint"]
    assert "checkpoint-40 is damaged. No other is whole." in alert.text and "safetensors" in alert.text
    fabricated.checkpoint("checkpoint-30")
    assert "whole is checkpoint-30" in raised(fabricated)["damaged_checkpoint"].text
    assert raised(fabricated, verify_seconds=0) == {}


def test_errors_come_first(fabricate, dead_pid):
    fabricated = fabricate(experts=4)
    fabricated.train(12, loads=[EVEN, [0.4, 0.3, 0.3, 0.0, 1.0], EVEN, EVEN])
    fabricated.beat(pid=dead_pid)
    assert [alert.severity for alert in alerts(read_run(fabricated.folder))] == [ERROR, WARNING]
