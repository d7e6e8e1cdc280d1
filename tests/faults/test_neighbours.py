"""F14, F17: other runs in the same folder, and services that fail, hang or are not there."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time

import pytest
from rig import hook, signal_at
from runs import SIMPLE, digests

from srde.errors import UsageError
from srde.train.lock import LOCK_FILE, lock

pytestmark = pytest.mark.faults

RUNNER = "srde.train.runner:RunTrainer"


# ---- F14 ----------------------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_with_pid_and_host(lab, tmp_path):
    with lock(tmp_path):
        job = lab.run(tmp_path, settings=SIMPLE)
        assert job.code == 1
        who = f"process {os.getpid()} on {socket.gethostname()} is training into this folder"
        assert job.last_line().startswith(f"srde train: output_dir={str(tmp_path)!r}: {who}")
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]  # not even a heartbeat


def test_the_same_process_twice_is_refused_and_keeps_the_lock(lab, tmp_path):
    with lock(tmp_path):
        for _ in range(2):
            with pytest.raises(
                UsageError, match=rf"process \(?{os.getpid()} on .* is training into this folder"
            ):
                with lock(tmp_path):
                    pass
        job = lab.run(tmp_path, settings=SIMPLE)
        assert job.code == 1 and f"process {os.getpid()} on " in job.last_line(), job.text()[-3000:]
    with lock(tmp_path):
        pass


def test_a_run_that_trains_holds_the_lock_and_a_stale_one_stops_nobody(lab, tmp_path):
    paused = f"if args[0].state.global_step == 2: open({str(tmp_path / 'paused')!r}, 'w'); signal.pause()"
    out = tmp_path / "out"
    job = lab.start(out, settings=SIMPLE, before=hook(f"{RUNNER}.training_step", paused))
    end = time.monotonic() + 60
    while not (tmp_path / "paused").exists():
        assert time.monotonic() < end, job.text()
        time.sleep(0.01)
    with pytest.raises(
        UsageError, match=f"process {job.pid} on {socket.gethostname()} is training into this folder"
    ):
        with lock(out):
            pass
    job.kill(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert json.loads((out / LOCK_FILE).read_text())["pid"] == job.pid
    content = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": 0,
    }  # and if its number has gone to another process
    (out / LOCK_FILE).write_text(json.dumps(content))
    lab.same(out, settings=SIMPLE, steps=6)


# ---- F17 ----------------------------------------------------------------------------------------------------------------------


TRACKER = """
from transformers import TrainerCallback
from transformers.integrations import integration_utils
import time
class Tracker(TrainerCallback):
    def {event}(self, *args, **kwargs):
        {statement}
integration_utils.INTEGRATION_TO_CALLBACK["mine"] = Tracker
"""


@pytest.mark.parametrize(
    "event",
    [
        "on_log",
        *(pytest.param(e, marks=pytest.mark.slow) for e in ("on_train_begin", "on_save", "on_train_end")),
    ],
)
def test_a_tracker_that_fails_does_not_stop_the_run(lab, tmp_path, event):
    before = TRACKER.format(event=event, statement="raise ConnectionError('no route to the tracker')")
    job = lab.run(tmp_path, "--report_to", "mine", settings=SIMPLE, before=before)
    assert job.code == 0, job.text()[-3000:]
    assert "no route to the tracker" in job.text() and "Tracker" in job.text()
    assert job.text().count("no route to the tracker") == 1  # once, and not at every step


def test_a_tracker_that_is_not_installed_is_named(lab, tmp_path):
    job = lab.run(tmp_path, "--report_to", "swanlab", settings=SIMPLE)
    assert job.code == 1
    assert job.last_line().startswith("srde train: report_to='swanlab': "), job.text()[-3000:]
    job = lab.run(tmp_path, "--report_to", "nonsense", settings=SIMPLE)
    assert job.code == 1 and job.last_line().startswith("srde train: report_to='nonsense': "), job.text()[
        -3000:
    ]


@pytest.mark.slow
def test_tensorboard_takes_what_is_logged(lab, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    lab.run(
        out,
        "--report_to",
        "tensorboard",
        settings=SIMPLE,
        before=signal_at(f"{RUNNER}.training_step", "count == 4"),
    )
    job = lab.run(
        out, "--report_to", "tensorboard", settings=SIMPLE, TENSORBOARD_LOGGING_DIR=str(tmp_path / "board")
    )
    assert job.code == 0, job.text()[-3000:]
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))
    lab.uninterrupted(settings=SIMPLE, steps=6)
    expected = lab.uninterrupted(settings=SIMPLE, steps=6)["checkpoint-6/adapter_model.safetensors"]
    assert digests(out / "checkpoint-6")["adapter_model.safetensors"] == expected


@pytest.mark.slow
def test_a_webhook_that_hangs_does_not_slow_the_run(lab, tmp_path):
    """Takes connections and never answers: the steps do not wait, and the end waits for 5 seconds at most."""
    listener = socket.create_server(("127.0.0.1", 0))
    held = []

    def accept():
        while True:
            try:
                held.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/hook/s3cret"
    start = time.monotonic()
    job = lab.run(tmp_path, "--webhook_url", url, "--webhook_allow_private", settings=SIMPLE)
    took = time.monotonic() - start
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in [listener, *held]:
        connection.close()
    assert job.code == 0, job.text()[-3000:]
    assert held and "was not delivered" in job.text() and "s3cret" not in job.text()
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["seconds"] < 3 and took < 12


ONLINE = """
import socket
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = False
def connect(*_):
    raise SystemExit("a connection was tried")
socket.socket.connect = socket.socket.connect_ex = connect
"""


def test_no_hub_is_asked(lab, tmp_path):
    """A base and rows on the disk: not a single connection is tried, also where it might be."""
    job = lab.run(tmp_path, settings=SIMPLE, before=ONLINE)
    assert job.code == 0, job.text()[-3000:]
