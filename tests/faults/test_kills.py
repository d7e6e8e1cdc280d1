"""F1, F2, F3: killed at any moment, a run goes on to the same bits."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter

import pytest
import save_points
from rig import hook, signal_at
from runs import PHASES, STEPS, differences, events

from srde.train.checkpoint import checkpoints, choose_checkpoint

pytestmark = pytest.mark.faults

CONTROL = "srde.train.control:Controller"
RUNNER = "srde.train.runner:RunTrainer"
BY_CPU_TIME = "import signal; signal.setitimer(signal.ITIMER_PROF, {seconds})"
"""Ends the process after so much of the processor's time, which other work does not change, by a signal that nobody handles."""


# ---- F1: every point of a save -------------------------------------------------------------------------------------------


def killed_saves(lab, place, at_step, stride):
    """The folders that a save killed at every so manieth of its points has left, in order. Prunes and the best adapter come
    before it."""
    place.mkdir()
    job = lab.run("out", before=save_points.code(at_step, place, stride), timeout=300)
    assert job.code == 0, job.text()[-3000:]
    told = json.loads((place / "copies/points.json").read_text())
    assert told["status"] == 0 and told["points"] > 60
    return [place / f"copies/{number:03d}/out" for number in range(1, told["points"] + 1, stride)]


def require_old_or_new(outs, old, new):
    """In each folder a start finds the old checkpoint or the new one, whole; and once the new one is there, it stays."""
    found = [choose_checkpoint(out, "auto").name for out in outs]
    turn = found.index(new)
    assert set(found[:turn]) == {old} and set(found[turn:]) == {new}
    unfinished = [any(path.name.startswith(".tmp-checkpoint") for path in out.iterdir()) for out in outs]
    assert sum(unfinished) >= len(outs) // 2
    return turn


def test_a_killed_save_leaves_a_checkpoint_that_verifies_and_the_run_ends_the_same(lab, tmp_path):
    outs = killed_saves(lab, tmp_path / "run", at_step=12, stride=11)
    turn = require_old_or_new(outs, "checkpoint-9", "checkpoint-12")
    for place in (outs[turn - 1], outs[turn]):  # `same` also requires that no leftover stays
        lab.same(place)


@pytest.mark.slow
def test_killed_at_every_point_of_a_save(lab, tmp_path):
    outs = killed_saves(lab, tmp_path / "run", at_step=15, stride=1)
    require_old_or_new(outs, "checkpoint-12", "checkpoint-15")
    for out in outs[::8]:
        lab.same(out)


@pytest.mark.slow
def test_killed_while_the_best_adapter_or_the_final_one_is_written(lab, tmp_path):
    """What is replaced in place: `checkpoint-best`, the adapter of the run's folder, `metrics.jsonl`, small JSON files."""
    out = tmp_path / "out"
    points = (
        signal_at("srde.artifacts.folder:_put_in_place", "args[1].name == 'checkpoint-best' and args[1].exists()"),
        signal_at("srde.artifacts.folder:_put_in_place", "args[1].name == 'checkpoint-best'", after=True),
        signal_at("srde.monitor.log:MetricsLog.truncate_after", "True"),
        hook("srde.monitor.log:_replace", "if args[0].name == 'metrics.jsonl': os.replace = lambda *_: os.kill(os.getpid(), 9)"),
        signal_at("srde.monitor.log:replace_json", "args[0].name == 'train_results.json'", after=True),
        signal_at("srde.tuner.store:save_adapter", "True"),
        hook("srde.tuner.store:roll_forward", "if count == 2: os.kill(os.getpid(), 9)"),
        signal_at("srde.tuner.store:save_adapter", "True", after=True),
    )  # fmt: skip
    for point in points:
        job = lab.run(out, before=point)
        assert job.code == -signal.SIGKILL, job.text()[-3000:]
    lab.same(out)


# ---- F2: any moment --------------------------------------------------------------------------------------------------------


def moment(out):
    """What a killed run was doing, as its heartbeat and events tell."""
    if not (out / "heartbeat.json").exists():
        return "start"
    beat = json.loads((out / "heartbeat.json").read_text())
    if beat["status"] != "training":
        return beat["status"]
    own = [event for event in events(out) if event["pid"] == beat["pid"]]
    if beat["step"] >= STEPS:
        return "after the last step"
    entered = [event["text"].split(",")[0] for event in own if event["event"] == "phase"]
    return entered[-1] if entered else "start of the loop"


def test_killed_at_random_moments(lab, tmp_path):
    out, rng = tmp_path / "out", random.Random(1)
    codes = [lab.run(out, before=BY_CPU_TIME.format(seconds=rng.uniform(0.1, 0.4))).code for _ in range(3)]
    assert codes[0] == -signal.SIGPROF and set(codes) <= {0, -signal.SIGPROF}
    lab.same(out)


@pytest.mark.slow
def test_killed_at_thirty_moments_over_the_whole_run(lab, tmp_path, record_property):
    """Sixteen runs; the first kill of each is in its own sixteenth of a whole run, the second somewhere in what is left."""
    clock = hook(
        "srde.cli.train:main",
        "call.start = time.process_time()",
        "print('CPU', time.process_time() - call.start)",
    )
    job = lab.run(tmp_path / "timed", before=clock)
    whole = float(job.text().split("CPU ")[1].split()[0])
    rng, hit = random.Random(2), Counter()
    for number in range(16):
        out = tmp_path / f"run-{number}"
        for seconds in ((number + rng.random()) / 16 * whole, rng.uniform(0.1, 0.4) * whole):
            job = lab.run(out, before=BY_CPU_TIME.format(seconds=seconds))
            assert job.code in (0, -signal.SIGPROF), job.text()[-3000:]
            if job.code:
                hit[moment(out)] += 1
        lab.same(out)
    record_property("killed in", dict(hit))
    print("\nkilled in:", dict(hit))
    assert sum(hit.values()) >= 24 and len(hit) >= 6, hit


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
@pytest.mark.slow
def test_killed_amid_the_accumulation_of_gradients(lab, tmp_path, muon):
    more = [
        "--gradient_accumulation_steps",
        "3",
        "--per_device_train_batch_size",
        "1",
        *(["--use_muon"] if muon else []),
    ]
    out = tmp_path / "out"
    for step in (1, 4, 7, 13):  # the second of three micro-batches, between its forward and its backward
        second = f"args[0]._place == 2 and args[0].state.global_step == {step}"
        job = lab.run(out, *more, before=signal_at(f"{RUNNER}.compute_loss", second, after=True))
        assert job.code == -signal.SIGKILL, job.text()[-3000:]
    lab.same(out, *more)


VARIANTS = {
    "unaligned": "--save_steps 4 --logging_steps 3 --eval_steps 5",
    "noise": "--neftune_noise_alpha 5 --warm_start kmeans",  # draws from torch's generator in every step
    "taylor": "--prune_by taylor --num_shared_experts 1 --null_expert",
    "importance": "--prune_by importance --progressive_unlock warmup --router_temperature_start 3",
    "element": "--granularity element --mask_init gradient --phase_warmup_steps 2",
    "packed rows in pairs": "--per_device_train_batch_size 2 --dataloader_num_workers 2 --max_grad_norm 0",
    "plateau": "--eval_strategy steps --lr_scheduler_type reduce_lr_on_plateau --metric_for_best_model loss",
    "schedule": "--lr_scheduler_type cosine_with_restarts --optim sgd --label_smoothing_factor 0.1",
}
"""Settings that keep a state of their own from step to step."""


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_killed_with_other_settings(lab, tmp_path, name):
    more = VARIANTS[name].split()
    if "element" in more:  # single entries have no learned masks
        more += ["--mask_learning_steps", "0"]
    out = tmp_path / "out"
    for step in (4, 7, 14):
        job = lab.run(
            out,
            *more,
            before=signal_at(f"{RUNNER}.training_step", f"args[0].state.global_step == {step}", after=True),
        )
        assert job.code == -signal.SIGKILL, job.text()[-3000:]
    lab.same(out, *more)


@pytest.mark.slow
def test_an_optimizer_whose_state_cannot_be_pruned_is_refused(lab, tmp_path):
    job = lab.run(tmp_path, "--optim", "adafactor")
    assert job.code == 0 or job.last_line().startswith("srde train: optim"), job.text()[-3000:]


# ---- F3: the borders of phases ------------------------------------------------------------------------------------------------


STEP = "args[2].global_step == {}"
POINTS = (
    (f"{CONTROL}._begin", "True", True, 1),  # warm start
    (f"{CONTROL}.on_step_begin", STEP.format(2), True, 2),
    ("srde.train.masks:MaskLearner.update", "args[1] == 4", True, 4),
    ("srde.train.masks:MaskLearner.finish", "True", False, 5),
    ("srde.train.masks:MaskLearner.finish", "True", True, 5),
    (f"{RUNNER}.training_step", "args[0].state.global_step == 6", True, 6),
    (f"{CONTROL}.on_step_begin", STEP.format(9), False, 8),
    (f"{CONTROL}._apply", "args[1] == 9", True, 8),  # routers are frozen, experts locked
    (f"{CONTROL}._prune", "args[2] == 11", False, 10),
    ("srde.tuner.prune:prune_adapter", "args[1] < 0.14", True, 11),
    (f"{CONTROL}.on_step_begin", STEP.format(12), False, 11),
    (f"{CONTROL}.on_step_begin", STEP.format(12), True, 12),
    (f"{CONTROL}._prune", "args[2] == 13", True, 12),
    ("srde.tuner.prune:prune_adapter", "count == 2", False, 14),
    (f"{CONTROL}._prune", "args[2] == 16", True, 15),
)
"""Where a run is killed, in turn: function, condition, whether after its call, and the last step that was entered then."""


def passes(out):
    """The phases that each process has entered, with the step that it began with."""
    result = []
    for event in events(out, "started", "resumed", "phase"):
        if event["event"] == "phase":
            result[-1][1].append((event["text"].split(",")[0], event["step"]))
        else:
            result.append((event["step"], []))
    return result


@pytest.mark.parametrize(
    "points", [POINTS[3:12:4], pytest.param(POINTS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_killed_at_the_borders_of_phases(lab, tmp_path, points):
    """No phase is run twice or left out: each process enters just those that begin between its first step and its last."""
    out = tmp_path / "out"
    for target, condition, after, _ in points:
        job = lab.run(out, before=signal_at(target, condition, after=after))
        assert job.code == -signal.SIGKILL, (target, condition, job.text()[-3000:])
    lab.same(out)
    last_steps = [*(last for *_, last in points), STEPS]
    for (first, entered), last in zip(passes(out), last_steps, strict=True):
        expected = [(name, start) for name, (start, _) in PHASES.items() if first <= start <= last]
        assert entered == expected
    assert checkpoints(out)[0].name == f"checkpoint-{STEPS}"


@pytest.mark.slow
def test_a_second_uninterrupted_run_is_the_same(lab, tmp_path):
    """Without this, the comparisons of this room would mean nothing."""
    assert differences(lab.uninterrupted(), lab.finish(tmp_path / "out")) == []
