"""F4, F5: SIGTERM and Ctrl-C end a run where it can go on, with the state saved; and it ends the same."""

from __future__ import annotations

import random
import signal

import pytest
from rig import hook, signal_at
from runs import SIMPLE, events, metrics

from srde.train.checkpoint import checkpoints

pytestmark = pytest.mark.faults

RUNNER = "srde.train.runner:RunTrainer"
STOPPED = 75
INTERRUPTED = 130


def in_step(step, number=signal.SIGTERM):
    """A signal in the middle of a step, counted from 0."""
    return signal_at(f"{RUNNER}.training_step", f"args[0].state.global_step == {step}", number)


def in_evaluation(step, number=signal.SIGTERM):
    return signal_at(f"{RUNNER}._check_stop", f"args[0].state.global_step == {step}", number)


def in_save(step, number=signal.SIGTERM):
    return signal_at(f"{RUNNER}._write_checkpoint", f"args[0].state.global_step == {step}", number)


MOMENTS = {
    "data": (signal_at("srde.train.data:open_data", "True", signal.SIGTERM), None),
    "load": (signal_at("srde.tuner.loading:load_base", "True", signal.SIGTERM, after=True), None),
    "tokenisation": (signal_at("srde.data.tokenize:tokenize_rows", "True", signal.SIGTERM), None),
    "first evaluation": (in_evaluation(0), None),
    "first step": (in_step(0), 1),
    "mask learning": (in_step(3), 4),
    "evaluation": (in_evaluation(6), 6),
    "save": (in_save(9), 10),
    "step with an evaluation due": (in_step(11), 12),
    "step, and again while saving": (in_step(12) + in_save(13), 13),
    "load of a resumed run": (signal_at("srde.train.checkpoint:load_into", "True", signal.SIGTERM), 13),
    "joint training": (in_step(16), 17),
    "last evaluation": (in_evaluation(20), 20),
}
"""When SIGTERM comes, and the step that the newest checkpoint is of afterwards."""
LAST = ("checkpoint-20/trainer_state.json", "checkpoint-20/run_state.json")
"""Stopped in the last evaluation, this checkpoint is from before it; nothing else tells."""


@pytest.mark.parametrize(
    "names",
    [("load", "first step", "evaluation", "save"), pytest.param(tuple(MOMENTS), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_sigterm_stops_a_run_that_then_ends_the_same(lab, tmp_path, names):
    out = tmp_path / "out"
    for name in names:
        before, step = MOMENTS[name]
        job = lab.run(out, before=before)
        assert job.code == STOPPED, (name, job.text()[-3000:])
        assert "signal='SIGTERM': the run was stopped;" in job.last_line(), name
        assert "run the same command to go on" in job.last_line()
        have = checkpoints(out)
        assert (have[0].name if have else None) == (None if step is None else f"checkpoint-{step}"), name
        last = events(out)[-1]
        assert last["event"] == "stopped" and last["pid"] == job.pid
    lab.same(out, less=LAST)


OTHERS = {
    "plateau": "--eval_strategy steps --lr_scheduler_type reduce_lr_on_plateau --metric_for_best_model loss",
    "by epoch": "--eval_strategy epoch --save_strategy epoch --logging_strategy epoch",
    "unaligned": "--save_steps 4 --eval_steps 5 --logging_steps 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_due_at_the_stop_is_done_once_whatever_the_strategy(lab, tmp_path, name):
    """An evaluation that was interrupted, left out or not due yet; 11 steps are an epoch."""
    more = OTHERS[name].split()
    out = tmp_path / "out"
    points = [in_step(3), in_step(8), in_step(10), in_step(13)]
    due = {"plateau": 15, "unaligned": 15, "by epoch": None}[name]
    for before in points + ([] if due is None else [in_evaluation(due)]):
        job = lab.run(out, *more, before=before)
        assert job.code == STOPPED, job.text()[-3000:]
    lab.same(out, *more)


AT_CPU_TIME = """
import os, signal
signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
signal.setitimer(signal.ITIMER_PROF, {seconds})
"""


@pytest.mark.slow
def test_sigterm_at_random_moments(lab, tmp_path):
    """Half of them while the run loads, where a signal is an exception in the middle of some library."""
    rng, codes, out = random.Random(3), [], tmp_path / "out"
    for number in range(24):
        seconds = rng.uniform(0.01, 0.25) if number % 2 else rng.uniform(0.1, 0.4)
        job = lab.run(out, before=AT_CPU_TIME.format(seconds=seconds))
        codes.append(job.code)
        if job.code == -signal.SIGTERM:  # before the run listens, or after it has done all
            own = [event["event"] for event in events(out) if event["pid"] == job.pid]
            assert own[-1:] in ([], ["completed"]), job.text()[-3000:]
        else:
            assert job.code in (0, STOPPED), job.text()[-3000:]
    assert codes.count(STOPPED) >= 6
    lab.same(out, less=LAST)


def test_sigterm_after_the_last_step_does_not_matter(lab, tmp_path):
    job = lab.run(
        tmp_path, settings=SIMPLE, before=signal_at("srde.tuner.store:save_adapter", "True", signal.SIGTERM)
    )
    assert job.code == 0, job.text()[-3000:]


@pytest.mark.slow
def test_an_evaluation_that_was_made_up_for_is_in_the_metrics_once(lab, tmp_path):
    """Stopped in an evaluation, resumed, killed after it was made up for, resumed again."""
    out = tmp_path / "out"
    assert lab.run(out, before=in_evaluation(9)).code == STOPPED
    job = lab.run(out, before=signal_at(f"{RUNNER}.training_step", "args[0].state.global_step == 10"))
    assert job.code == -signal.SIGKILL, job.text()[-3000:]
    lab.same(out)


@pytest.mark.parametrize("way", ["own", pytest.param("workers", marks=pytest.mark.slow)])
def test_ctrl_c_once_saves_and_twice_ends_at_once(lab, tmp_path, way):
    """The terminal sends it to the whole process group, so also to the processes that read data."""
    more = ["--dataloader_num_workers", "2"] if way == "workers" else []
    out = tmp_path / "out"
    to_all = "os.killpg(os.getpgrp(), signal.SIGINT)"
    here = "args[0].state.global_step == {}"
    job = lab.run(out, *more, before=hook(f"{RUNNER}.training_step", f"if {here.format(6)}: {to_all}"))
    assert job.code == STOPPED and "signal='SIGINT'" in job.last_line(), job.text()[-3000:]
    assert checkpoints(out)[0].name == "checkpoint-7"
    twice = hook(f"{RUNNER}.training_step", f"if {here.format(9)}: {to_all}") + hook(
        f"{RUNNER}._write_checkpoint", after=f"if {here.format(10)}: {to_all}; time.sleep(20); os._exit(3)"
    )
    job = lab.run(out, *more, before=twice)
    assert job.code == INTERRUPTED, job.text()[-3000:]
    assert checkpoints(out)[0].name == "checkpoint-9"
    if way == "workers":
        job = lab.run(
            out, *more, before=hook(f"{RUNNER}.training_step", f"if {here.format(10)}: {to_all}; {to_all}")
        )
        assert job.code == INTERRUPTED, job.text()[-3000:]
    lab.same(out)


def test_ctrl_c_while_loading(lab, tmp_path):
    job = lab.run(tmp_path, before=signal_at("srde.tuner.loading:load_base", "True", signal.SIGINT))
    assert job.code == STOPPED and "there was nothing new to save" in job.last_line()
    assert metrics(tmp_path) == [] if (tmp_path / "metrics.jsonl").exists() else True
