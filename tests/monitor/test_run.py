"""What is read from a run's folder: status, pace, experts, held-out losses, checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import numpy as np
import pytest

from srde.errors import ArtifactError, UsageError
from srde.monitor import checkpoints, history
from srde.monitor.history import Columns, Loads, thinned
from srde.monitor.log import HEARTBEAT_FILE, METRICS_FILE, RUN_FILE, read_jsonl, replace_json
from srde.monitor.routing import recent_routing, share_history
from srde.monitor.run import RunReader, read_run


def test_a_running_run(fabricate):
    fabricated = fabricate(steps=60, max_steps=100)
    run = read_run(fabricated.folder)
    assert (run.status, run.step, run.max_steps, run.phase) == ("running", 60, 100, "joint")
    assert run.tokens_per_second == pytest.approx(8192, abs=50) and run.step_seconds == 0.5
    assert run.eta_seconds == 20.0 and run.memory_mb == 9100.0
    assert run.sparsity == pytest.approx(0.026)
    assert len(run.train) == 60 and [record["step"] for record in run.evals] == [20, 40, 60]
    assert run.routing.share_LE.shape == (4, 8)  # the shared expert is no matter of routing
    assert run.routing.share_LE.sum(-1) == pytest.approx(1) and run.dead_experts == []
    names = [one.name for one in run.held_out]
    assert names == ["math", "logic", "code", "all"]
    assert run.held_out[1].base == 2.0 and run.held_out[1].best == run.held_out[1].loss < 2.0


@pytest.mark.parametrize(
    ("heartbeat", "later", "status"),
    [
        ({"status": "loading"}, 0, "starting"),
        ({"status": "evaluating"}, 0, "running"),
        ({"status": "saving"}, 0, "running"),
        ({"status": "training"}, 59, "running"),
        ({"status": "training"}, 61, "stalled"),
        ({"status": "evaluating"}, 599, "running"),
        ({"status": "evaluating"}, 601, "stalled"),
        ({"status": "training", "host": "elsewhere", "pid": -1}, 59, "running"),
        ({"status": "training", "host": "elsewhere", "pid": -1}, 61, "stalled"),
        ({"status": "completed"}, 10**6, "completed"),
        ({"status": "stopped"}, 10**6, "stopped"),
        ({"status": "failed", "reason": "out of memory"}, 10**6, "failed"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_every_status(heartbeat, later, status, fabricate):
    fabricated = fabricate()
    fabricated.beat(**heartbeat)
    run = RunReader(fabricated.folder).read(now=fabricated.time_of(60) + later)
    assert run.status == status and run.silent_seconds == later
    assert run.reason == heartbeat.get("reason", "")
    assert (run.eta_seconds is None) == (status not in ("starting", "running"))


def test_a_dead_process_of_this_machine(fabricate, dead_pid):
    fabricated = fabricate()
    fabricated.beat(pid=dead_pid)
    assert read_run(fabricated.folder).status == "died"
    fabricated.beat("completed", pid=dead_pid)
    assert read_run(fabricated.folder).status == "completed"


def test_the_expected_time_between_two_signs_sets_the_limit(fabricate):
    fabricated = fabricate(heartbeat_steps=200, logging_steps=100)
    run = RunReader(fabricated.folder).read(now=fabricated.time_of(60) + 249)
    assert run.stall_seconds == 5 * 100 * 0.5 and run.status == "running"
    assert RunReader(fabricated.folder).read(now=fabricated.time_of(60) + 251).status == "stalled"


def test_a_resumed_run_is_starting_until_its_first_heartbeat(fabricate, dead_pid):
    fabricated = fabricate()
    fabricated.beat("failed", pid=dead_pid, reason="the disk was full")
    fabricated.event("resumed", "resumed from step 60", time=fabricated.time_of(61))
    run = read_run(fabricated.folder)
    assert run.status == "starting" and run.reason == ""
    fabricated.event("resumed", "again", time=fabricated.time_of(62), pid=dead_pid)
    assert read_run(fabricated.folder).status == "died"


def test_a_run_that_has_just_started(tmp_path, fabricate):
    run = read_run(fabricate(steps=0).folder)
    assert (run.status, run.step, run.routing, run.held_out, run.eta_seconds) == (
        "running",
        0,
        None,
        [],
        None,
    )
    replace_json(tmp_path / HEARTBEAT_FILE, {"time": time.time(), "status": "loading", "host": "elsewhere"})
    run = read_run(tmp_path)
    assert (run.status, run.max_steps, run.checkpoints) == ("starting", 0, ())


def test_where_no_run_has_been(tmp_path, fabricate):
    with pytest.raises(UsageError, match=r"no such folder"):
        read_run(tmp_path / "none")
    with pytest.raises(UsageError, match=r"no run has been here.*run\.json"):
        read_run(tmp_path)
    reader = RunReader(fabricate().folder)
    shutil.rmtree(reader.folder)
    with pytest.raises(UsageError, match=r"no such folder"):
        reader.read()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"format=2.*reads format 1"),
        ({"max_steps": "many"}, r"run\.json.*many"),
        ({"phases": [{"name": "joint"}]}, r"run\.json.*start"),
    ],
    ids=["format", "kind", "missing"],
)
def test_facts_of_another_kind_are_named(change, message, fabricate):
    fabricated = fabricate()
    replace_json(fabricated.folder / RUN_FILE, fabricated.facts | change)
    with pytest.raises(ArtifactError, match=message):
        read_run(fabricated.folder)


@pytest.mark.faults
def test_a_torn_tail_and_null_numbers_are_no_trouble(fabricate):
    fabricated = fabricate()
    fabricated.train(1, loss=float("nan"), grad_norm=float("inf"), expert_load=[[1.0], [1.0, 2.0]])
    for name in (METRICS_FILE, "events.jsonl"):
        with open(fabricated.folder / name, "ab") as stream:
            stream.write(b'{"kind": "train", "step": 62, "lo')
    run = read_run(fabricated.folder)
    assert run.step == 61 and run.train.last("loss") is None and run.train.median("loss") is not None
    assert run.routing.windows == 9 and len(run.events) == 1


@pytest.mark.faults
def test_a_file_that_is_being_written_never_breaks_the_reader(fabricate):
    fabricated = fabricate(steps=0, max_steps=400)
    line = json.dumps({"kind": "train", "step": 1, "loss": 1.0, "text": "é" * 40}).encode() + b"\n"
    done = threading.Event()

    def write():
        with open(fabricated.folder / METRICS_FILE, "ab", buffering=0) as stream:
            for place in range(4000):  # in pieces that end anywhere, even within a character
                cut = place % len(line)
                stream.write(line[:cut])
                stream.write(line[cut:])
        done.set()

    writer = threading.Thread(target=write)
    reader = RunReader(fabricated.folder)
    writer.start()
    counts = []
    while not done.is_set():
        counts.append(len(reader.read(verify_seconds=0).train))
    writer.join()
    assert len(reader.read().train) == 4000 and counts == sorted(counts)


def test_a_resumed_run_is_read_anew(fabricate):
    fabricated = fabricate(steps=60)
    reader = RunReader(fabricated.folder)
    assert len(reader.read().train) == 60
    fabricated.metrics.truncate_after(30)
    fabricated.step = 30
    fabricated.train(5)
    run = reader.read()
    assert len(run.train) == 35 and run.train["step"].tolist() == list(range(1, 36)) and len(run.evals) == 1


def test_refreshing_reads_only_what_is_new(fabricate, monkeypatch):
    fabricated = fabricate()
    reader = RunReader(fabricated.folder)
    reader.read()
    taken = []
    append = history.Metrics.append
    monkeypatch.setattr(history.Metrics, "append", lambda self, one: taken.append(one) or append(self, one))
    reader.read()
    fabricated.train(2)
    assert reader.read().step == 62 and len(taken) == 2


def test_columns_have_gaps_where_lines_had_no_number():
    columns = Columns()
    columns.append({"step": 1, "loss": 2.0})
    columns.append({"step": 2, "loss": None, "late": 5, "flag": True, "clock": {"step_seconds": 0.5}})
    assert columns.names == ["step", "loss", "late", "step_seconds"]
    np.testing.assert_array_equal(columns["loss"], [2.0, np.nan])
    np.testing.assert_array_equal(columns["late"], [np.nan, 5.0])
    np.testing.assert_array_equal(columns["none"], [np.nan, np.nan])
    assert columns.last("loss") is None and columns.last("late") == 5.0 and columns.last("none") is None
    assert columns.median("loss") == 2.0 and columns.median("none") is None


def test_loads_of_a_long_run_are_thinned_and_the_last_are_all_there():
    loads = Loads()
    for step in range(5000):
        loads.append({"step": step, "expert_load": [[1.0, 3.0]]})
    steps = [window.step for window in loads.spread]
    assert 128 <= len(steps) <= 256 and steps[0] == 0 and len(set(np.diff(steps))) == 1
    assert [window.step for window in loads.recent] == list(range(4990, 5000))
    at, ratio_TE = share_history(loads, None)
    assert at[-1] == 4999 and ratio_TE == pytest.approx(np.tile([0.5, 1.5], (len(at), 1)))


def test_a_long_curve_is_thinned_to_medians():
    step_N = np.arange(1000.0)
    value_N = np.where(step_N % 10 == 0, 100.0, 1.0)
    value_N[5] = np.nan
    at, values = thinned(step_N, value_N, 50)
    assert len(at) == 50 and set(values) == {1.0} and at[0] < at[-1]


def windows(*loads, phase="joint", opened=None):
    found = Loads()
    for step, load in enumerate(loads):
        found.append({"step": step, "phase": phase, "open_experts": opened, "expert_load": load})
    return found


def test_dead_experts_are_those_below_one_per_cent_of_an_even_share():
    load = [[0.5, 0.4974, 0.0026], [0.5, 0.4966, 0.0034]]  # even is 1/3: the line is at 0.00333
    assert recent_routing(windows(*[load] * 3), 3).dead == [(0, 2)]
    assert recent_routing(windows(*[load] * 2), 3).dead == []  # too early to tell
    assert recent_routing(windows(*[load] * 3), 2).dead == []  # the third is a shared one
    assert recent_routing(windows(*[load] * 3, opened=2), 3).dead == []  # not open yet
    assert recent_routing(windows(*[load] * 3, phase="expert_pretraining"), 3).dead == []


def test_routing_is_that_of_the_windows_since_the_last_expert_was_opened():
    loads = windows(*[[[1.0, 0.0]]] * 5, opened=1)
    loads.append({"step": 9, "phase": "", "open_experts": 2, "expert_load": [[1.0, 0.0]]})
    assert recent_routing(loads, 2).windows == 1 and recent_routing(loads, 2).dead == []


def test_a_layer_without_load_is_neither_dead_nor_collapsed():
    routing = recent_routing(windows(*[[[0.0, 0.0], [0.5, 0.5]]] * 4), 2)
    assert routing.dead == [] and routing.collapsed == [] and np.isnan(routing.share_LE[0]).all()


def test_checkpoints_are_verified_once_and_again_when_a_file_has_changed(fabricate, monkeypatch):
    fabricated = fabricate()
    fabricated.checkpoint("checkpoint-20")
    fabricated.checkpoint("checkpoint-100")
    fabricated.checkpoint("checkpoint-best")
    (fabricated.folder / "checkpoint-old").mkdir()
    asked = []
    verify = checkpoints.verify
    monkeypatch.setattr(checkpoints, "verify", lambda place: asked.append(place.name) or verify(place))
    reader = RunReader(fabricated.folder)
    found = reader.read().checkpoints
    assert [one.name for one in found] == ["checkpoint-20", "checkpoint-100", "checkpoint-best"]
    assert all(one.verified for one in found) and [one.step for one in found] == [20, 100, None]
    assert found[0].bytes > 2000 and reader.read().newest_checkpoint.step == 100
    assert sorted(asked) == sorted(one.name for one in found)
    asked.clear()
    fabricated.damage("checkpoint-100")
    damaged = reader.read().newest_checkpoint
    assert asked == ["checkpoint-100"] and damaged.verified is False and "sha256" in damaged.problem


@pytest.mark.faults
def test_checkpoints_that_are_incomplete_or_go_away(fabricate):
    fabricated = fabricate()
    folder = fabricated.checkpoint("checkpoint-20")
    (folder / "MANIFEST.json").unlink()
    fabricated.checkpoint("checkpoint-40")
    reader = RunReader(fabricated.folder)
    found = reader.read().checkpoints
    assert [one.verified for one in found] == [False, True] and "MANIFEST.json" in found[0].problem
    shutil.rmtree(folder)
    assert [one.name for one in reader.read().checkpoints] == ["checkpoint-40"]


def test_a_live_view_verifies_as_long_as_it_has_time(fabricate, monkeypatch):
    fabricated = fabricate()
    for step in (20, 40, 60):
        fabricated.checkpoint(f"checkpoint-{step}")
    reader = RunReader(fabricated.folder)
    assert [one.verified for one in reader.read(verify_seconds=0).checkpoints] == [None] * 3
    clock = iter(range(100))
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(clock))
    assert [one.verified for one in reader.read(verify_seconds=1.5).checkpoints] == [None, None, True]
    assert [one.verified for one in reader.read(verify_seconds=1.5).checkpoints] == [None, True, True]


def test_the_final_adapter_counts_as_saved(fabricate):
    from srde.artifacts import write_manifest

    fabricated = fabricate()
    (fabricated.folder / "adapter_config.json").write_text("{}")
    write_manifest(fabricated.folder, only=["adapter_config.json"])
    reader = RunReader(fabricated.folder)
    (adapter,) = reader.read().checkpoints
    assert adapter.name == "adapter" and adapter.verified and adapter.step is None
    (fabricated.folder / "adapter_config.json").write_text("[]")
    os.utime(fabricated.folder / "adapter_config.json", ns=(1, 1))
    assert reader.read().checkpoints[0].verified is False


def test_what_is_fabricated_has_the_form_that_trainers_write(fabricate):
    record = next(one for one in read_jsonl(fabricate().folder / METRICS_FILE) if one["expert_load"])
    assert len(record["expert_load"]) == 4 and len(record["expert_load"][0]) == 9
