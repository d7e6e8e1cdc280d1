"""deploy/vastai_startup.sh with a stand-in for `srde`: settings, installation, download, retries, signals, secrecy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from startup_rig import ROOT, SCRIPT, DataServer, environment, kill_all, start
from webhook_server import WebhookServer

pytestmark = pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("bash", "curl", "flock", "sha256sum")),
    reason="bash, curl, flock or sha256sum is missing: the startup script is NOT tested",
)

HF_TOKEN = "hf_QwErTyUiOpAsDfGhJkLz"
ROWS = b"".join(b'{"prompt": "What is %d + 1?", "response": "%d"}\n' % (n, n + 1) for n in range(2000))

# What `srde train` does as far as the script can see: it takes the next way to end from a list, and notes how it was called.
SRDE = f"""#!{sys.executable} -S
import json, os, signal, sys, time
from pathlib import Path

if sys.argv[1:] == ["--version"]:
    print("srde 0.0.0")
    sys.exit()
room = Path(os.environ["ROOM"])
names = ("SRDE_ATTEMPT", "HF_TOKEN", "WEBHOOK_URL")
with (room / "calls.jsonl").open("a") as calls:
    call = {{"argv": sys.argv[1:], "stdin": sys.stdin.read()}} | {{name: os.environ.get(name) for name in names}}
    calls.write(json.dumps(call) + "\\n")
print("training with", os.environ.get("HF_TOKEN"), "and", os.environ.get("WEBHOOK_URL"), "on", os.environ["DATA_URL"])
ends = (room / "ends").read_text().split()
(room / "ends").write_text(" ".join(ends[1:]))
out = Path(sys.argv[sys.argv.index("--output_dir") + 1])
if ends[0] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    (room / "ready").write_text("")
    while True:
        time.sleep(30)
if ends[0] == "0":
    (out / "adapter_model.safetensors").write_text("")
if ends[0] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(ends[0]))
"""


class Room:
    """A place where the script runs; programs in `bin` stand before those of the machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.work = folder / "work"
        self.bin = folder / "bin"
        self.started: list[subprocess.Popen] = []
        self.bin.mkdir()
        self.program("sleep", f'echo "$@" >>"{folder}/pauses"')
        self.env = {
            "ROOM": str(folder),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "WORK_DIR": str(self.work),
            "SRDE_VENV": str(environment(folder / "venv", SRDE)),
            "SRDE_SOURCE": "srde",
            "HF_TOKEN": HF_TOKEN,
            "MODEL_NAME": "some/model",
            "MAX_STEPS": "70",
            "MAX_RETRIES": "2",
            "WEBHOOK_ALLOW_PRIVATE": "1",
            "DATA_URL": "http://127.0.0.1:9/none.jsonl",
        }

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def ends(self, *ways: object) -> None:
        (self.folder / "ends").write_text(" ".join(map(str, ways)))

    def start(self, *, piped=False, flags=(), **env: str):
        process = start(self.env | env, piped=piped, flags=flags)
        self.started.append(process)
        return process

    def run(self, *, piped=False, flags=(), **env: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(piped=piped, flags=flags, **env)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    @property
    def calls(self) -> list[dict]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def pauses(self) -> list[int]:
        file = self.folder / "pauses"
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def data(self) -> list[Path]:
        return sorted((self.work / "data").iterdir())

    def until(self, path: str) -> None:
        """Returns when a file is there."""
        for _ in range(1000):
            if (self.folder / path).exists():
                return
            threading.Event().wait(0.01)
        raise AssertionError(f"{path} has not come")


@pytest.fixture
def room(tmp_path):
    one = Room(tmp_path)
    yield one
    for process in one.started:
        if process.poll() is None:
            kill_all(process, one.work)


@pytest.fixture
def data(room):
    with DataServer(ROWS) as server:
        room.env["DATA_URL"] = server.url
        yield server


@pytest.fixture
def hook(room):
    with WebhookServer() as server:
        room.env["WEBHOOK_URL"] = server.url
        yield server


# The whole


@pytest.mark.parametrize("piped", [False, True], ids=["file", "piped"])
def test_one_start_does_it_all_and_the_next_one_nothing(room, data, hook, piped):
    room.ends(0)
    status, out = room.run(piped=piped, TRAIN_ARGS="--top_k 1\n --learning_rate  0.01")
    assert status == 0, out
    (call,) = room.calls
    (file,) = room.data
    assert (
        call["argv"]
        == (
            f"train --model_name_or_path some/model --train_file {file} --output_dir {room.work}/run --max_steps 70"
            " --top_k 1 --learning_rate 0.01"
        ).split()
    )
    assert call["SRDE_ATTEMPT"] == "1/3" and call["HF_TOKEN"] == HF_TOKEN and call["WEBHOOK_URL"] == hook.url
    assert call["stdin"] == "" and file.read_bytes() == ROWS
    assert hook.received == [] and room.pauses == []
    log = (room.work / "startup.log").read_text()
    assert log == out and all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in log.splitlines()
    )
    assert not (room.work / "startup.pid").exists()

    status, out = room.run(piped=piped, TRAIN_ARGS="--top_k 1\n --learning_rate  0.01")
    assert status == 0 and "the run is complete" in out and len(room.calls) == 1 and len(data.requests) == 1
    room.ends(0)
    status, out = room.run(piped=piped, MAX_STEPS="80")
    assert status == 0 and room.calls[1]["argv"][8] == "80" and len(data.requests) == 1


def test_empty_secrets_are_not_passed_on(room, data):
    room.ends(0)
    assert room.run(HF_TOKEN="", WEBHOOK_URL="")[0] == 0
    assert room.calls[0]["HF_TOKEN"] is None and room.calls[0]["WEBHOOK_URL"] is None


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("DATA_URL", "", "must be the http(s) URL of the training rows"),
        ("DATA_URL", "ftp://example.org/x", "must be the http(s) URL of the training rows"),
        ("DATA_URL", "http://example.org/x y", "must be the http(s) URL of the training rows"),
        ("MAX_STEPS", "many", "must be a whole number"),
        ("MAX_STEPS", "0", "must be at least 1"),
        ("RETRY_SECONDS", "0.5", "must be a whole number"),
        ("MAX_RETRIES", "-1", "must be a whole number"),
    ],
    ids=["no data", "ftp", "blank in the URL", "words", "no steps", "fraction", "negative"],
)
def test_settings_that_break_their_rule(room, name, value, rule):
    status, out = room.run(**{name: value})
    assert status == 2 and out == f"vastai_startup.sh: {name} {rule}. See deploy/README.md.\n"
    assert not room.work.exists()


def test_a_piped_script_needs_a_source(room):
    status, out = room.run(piped=True, SRDE_SOURCE="", SRDE_VENV=str(room.folder / "none"))
    assert status == 2 and "SRDE_SOURCE must say where srde is installed from" in out


# Training


@pytest.mark.faults
def test_training_is_tried_again_with_growing_pauses(room, data, hook):
    room.ends(1, "killed", 1, 0)
    status, out = room.run(MAX_RETRIES="4", RETRY_SECONDS="250")
    assert status == 0 and [call["SRDE_ATTEMPT"] for call in room.calls] == ["1/5", "2/5", "3/5", "4/5"]
    assert room.pauses == [250, 500, 600] and hook.received == []
    assert (
        "srde train ended with status 137" in out and len({tuple(call["argv"]) for call in room.calls}) == 1
    )


@pytest.mark.faults
def test_it_gives_up_after_the_last_retry_and_says_so(room, data, hook):
    room.ends(1, 1, 1)
    assert room.run()[0] == 1 and len(room.calls) == 3 and room.pauses == [30, 60]
    (body,) = hook.bodies
    assert body["event"] == "failed" and body["run"] == "run"
    assert body["text"] == "gave up after 3 attempts; the last one ended with status 1"
    room.ends(0)
    assert room.run()[0] == 0


@pytest.mark.parametrize(("end", "status", "told"), [(75, 75, 0), (130, 75, 0), (2, 1, 1)])
def test_ends_that_are_not_tried_again(room, data, hook, end, status, told):
    room.ends(end)
    assert room.run()[0] == status
    assert len(room.calls) == 1 and room.pauses == [] and len(hook.received) == told


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_is_passed_on_and_waited_for(room, data, hook, number):
    room.ends("wait")
    process = room.start()
    room.until("ready")
    assert (room.work / "startup.pid").read_text().strip() == str(process.pid)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "srde train ended with status 75" in out and hook.received == []
    room.ends(0)
    assert room.run()[0] == 0 and len(room.calls) == 2


@pytest.mark.faults
def test_a_signal_to_the_whole_group(room, data):
    """Ctrl-C in a terminal, or the end of a container: all get it, and the last words are logged all the same."""
    room.ends("wait")
    process = room.start()
    room.until("ready")
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "srde train ended with status 75" in out


@pytest.mark.faults
def test_a_signal_during_a_pause(room, data):
    room.ends(1)
    room.program("sleep", f'touch "{room.folder}/pausing"; exec /bin/sleep 30')
    process = room.start()
    room.until("pausing")
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert (
        process.returncode == 75
        and "stopped; the next start goes on from here" in out
        and len(room.calls) == 1
    )


@pytest.mark.faults
def test_a_signal_during_a_download(room, data):
    data.cut = [20_000]
    data.hold.clear()
    process = room.start()
    assert data.sent.wait(20)
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert (
        process.returncode == 75 and "stopped; the next start goes on from here" in out and room.calls == []
    )


@pytest.mark.faults
def test_only_one_at_a_time(room, data):
    room.ends("wait")
    process = room.start()
    room.until("ready")
    status, out = room.run()
    assert status == 1 and f"another one is at work in {room.work} (process {process.pid})" in out
    kill_all(process, room.work)
    room.ends(0)
    assert room.run()[0] == 0


# Data


@pytest.mark.faults
def test_a_download_that_breaks_off_goes_on_where_it_ended(room, data):
    data.cut = [20_000, 50_000]
    room.ends(0)
    status, out = room.run()
    assert status == 0 and room.data[0].read_bytes() == ROWS and len(room.data) == 1
    (first, second, third) = data.requests
    assert first == (None, None) and second[0] == "bytes=20000-" and third[0] == "bytes=50000-" and second[1]
    assert "going on at byte 50000" in out and room.pauses == [30, 60]


@pytest.mark.faults
def test_a_download_that_was_killed_goes_on_where_it_ended(room, data):
    data.cut = [40_000]
    data.hold.clear()
    process = room.start()
    assert data.sent.wait(20)
    for _ in range(1000):
        parts = list((room.work / "data").glob("*.part"))
        if parts and parts[0].stat().st_size:
            break
        threading.Event().wait(0.01)
    kill_all(process, room.work)
    size = parts[0].stat().st_size
    data.hold.set()
    assert 0 < size <= 40_000 and not list((room.work / "data").glob("*.jsonl"))
    room.ends(0)
    assert room.run()[0] == 0
    assert room.data[0].read_bytes() == ROWS and data.requests[1][0] == f"bytes={size}-"


@pytest.mark.faults
@pytest.mark.parametrize("case", ["another file", "no ranges", "nothing left"])
def test_downloads_that_cannot_go_on_begin_again(room, data, case):
    old = data.tag
    room.ends(0, 0)
    if case == "nothing left":  # killed between the last byte and the renaming
        assert room.run()[0] == 0
        (file,) = room.data
        file.rename(file.with_name(f"{file.name}.part"))
        file.with_name(f"{file.name}.headers").write_text(f"HTTP/1.1 200 OK\r\nETag: {data.tag}\r\n\r\n")
        (room.work / "completed").unlink()
    else:
        data.cut = [20_000]
        assert room.run(MAX_RETRIES="0")[0] == 1
        data.content = b'{"new": "file"}\n' + ROWS if case == "another file" else ROWS
        data.ranges = case != "no ranges"
    data.requests.clear()
    status, out = room.run()
    assert status == 0, out
    assert room.data[0].read_bytes() == data.content and len(room.data) == 1
    if case != "nothing left":  # curl itself finds that nothing is left
        assert "the server does not go on where it ended" in out
        assert data.requests == [("bytes=20000-", old), (None, None)]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("content", "status", "tries"),
    [(ROWS, 404, 3), (b"<html>Please log in</html>", 200, 1), (b"", 200, 1), (b"[1]\n", 200, 1), (b"\xff\xfe\x00", 200, 1)],
    ids=["404", "a page", "empty", "no object", "bytes"],
)  # fmt: skip
def test_data_that_is_none(room, data, hook, content, status, tries):
    data.content, data.status = content, status
    ended, out = room.run()
    assert ended == 1 and len(data.requests) == tries and room.calls == []
    assert not list((room.work / "data").glob("*.jsonl"))
    (body,) = hook.bodies
    assert body["event"] == "failed" and body["text"] == "downloading the data failed; see startup.log"
    assert "Traceback" not in out


@pytest.mark.security
def test_the_hub_gets_its_token_and_nobody_else_does(room):
    room.program(
        "curl", f'while [[ $1 != --config ]]; do shift; done; cat "$2" >"{room.folder}/config"; exit 6'
    )
    for url, given in [
        ("https://huggingface.co/datasets/me/private/resolve/main/train.jsonl", True),
        ("http://huggingface.co/datasets/me/private/resolve/main/train.jsonl", False),
        ("https://huggingface.co.example.org/train.jsonl", False),
        ("https://huggingface.co@example.org/train.jsonl", False),
    ]:
        assert room.run(DATA_URL=url, MAX_RETRIES="0", WEBHOOK_URL="")[0] == 1
        config = (room.folder / "config").read_text().splitlines()
        assert config == [f'url = "{url}"'] + [f'oauth2-bearer = "{HF_TOKEN}"'] * given


@pytest.mark.faults
@pytest.mark.parametrize("tenth", range(1, 10))
def test_of_a_script_that_is_cut_off_nothing_runs(room, tenth):
    text = SCRIPT.read_bytes()
    done = subprocess.run(
        ["bash", "-s"], input=text[: len(text) * tenth // 10], env=room.env, capture_output=True, timeout=20
    )
    assert not room.work.exists() and done.stdout == b""


# Installation


def install_with(room, fails="false"):
    """Python as the script finds it: `-m venv` makes an environment whose pip notes its arguments and installs the stand-in."""
    (room.folder / "srde").write_text(SRDE)
    pip = f"""#!/bin/bash
if [[ $1 == -m && $2 == pip ]]; then
  echo "${{@:3}}" >>"{room.folder}/pip"
  if {fails}; then echo "pip: no network" >&2; exit 1; fi
  if [[ ${{@: -1}} != torch ]]; then install -m 755 "{room.folder}/srde" "$(dirname "$0")/srde"; fi
  exit
fi
exec "{sys.executable}" "$@"
"""
    (room.folder / "fake_python").write_text(pip)
    room.program(
        "python3",
        f'if [[ $1 == -m ]]; then mkdir -p "$3/bin"; install -m 755 "{room.folder}/fake_python" "$3/bin/python"; exit; fi\n'
        f'exec "{sys.executable}" "$@"',
    )
    room.env["SRDE_VENV"] = ""


def pip_calls(room) -> list[list[str]]:
    return [line.split() for line in (room.folder / "pip").read_text().splitlines()]


def test_installs_from_a_checkout_with_its_pinned_packages(room, data):
    install_with(room)
    room.ends(0, 0)
    assert room.run(SRDE_SOURCE="")[0] == 0
    first, second = pip_calls(room)
    pinned = ["--constraint", str(ROOT / "constraints.txt")]
    assert first[-3:] == [*pinned, "torch"] and second[-3:] == [*pinned, str(ROOT)]
    # the environment is kept
    assert room.run(SRDE_SOURCE="", MAX_STEPS="80")[0] == 0 and len(pip_calls(room)) == 2


def test_installs_from_git(room, data):
    install_with(room)
    source = room.folder / "project"
    git = ["git", "-C", str(source), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    source.mkdir()
    (source / "constraints.txt").write_text("torch==2\n")
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "x"], check=True)
    subprocess.run([*git, "tag", "v1"], check=True)
    subprocess.run(["git", "clone", "--quiet", "--bare", str(source), str(room.folder / "x.git")], check=True)
    room.ends(0)
    status, out = room.run(SRDE_SOURCE=f"git+file://{room.folder}/x.git@v1")
    assert status == 0, out
    assert pip_calls(room)[1][-3:] == [
        "--constraint",
        f"{room.work}/source/constraints.txt",
        f"{room.work}/source",
    ]


def test_installs_a_requirement(room, data):
    install_with(room)
    room.ends(0)
    assert room.run(SRDE_SOURCE="srde==0.1.0")[0] == 0
    assert pip_calls(room)[1][-1] == "srde==0.1.0" and "--constraint" not in pip_calls(room)[1]


@pytest.mark.faults
def test_an_installation_that_was_cut_off_is_made_again(room, data):
    install_with(room)
    room.ends(0)
    venv = environment(room.work / "venv", SRDE)
    (venv / ".srde-startup").write_text("installing\n")
    status, out = room.run(piped=True, SRDE_SOURCE="")
    assert status == 1 and "the installation was not finished: set SRDE_SOURCE again" in out
    assert room.run()[0] == 0 and len(pip_calls(room)) == 2


@pytest.mark.faults
def test_an_installation_that_fails_is_tried_again_and_told(room, data, hook):
    install_with(room, fails="true")
    status, out = room.run()
    assert status == 1 and len(pip_calls(room)) == 3 and room.pauses == [30, 60] and data.requests == []
    (body,) = hook.bodies
    assert body["text"] == "installing srde failed; see startup.log" and "pip: no network" in out


@pytest.mark.faults
@pytest.mark.parametrize("allowed", [True, False], ids=["allowed", "not allowed"])
def test_a_failed_installation_is_told_even_without_srde(room, data, hook, allowed):
    room.program("python3", "exit 1")
    for version in ("3.11", "3.12", "3.13", "3.14"):
        room.program(f"python{version}", "exit 1")
    output = str(room.folder / 'a "run"\\')
    status, out = room.run(SRDE_VENV="", OUTPUT_DIR=output, WEBHOOK_ALLOW_PRIVATE="1" if allowed else "")
    assert status == 1 and "Python 3.11 or newer must be installed" in out and room.pauses == []
    if allowed:
        (body,) = hook.bodies
        assert body.pop("time") > 1e9
        assert body == {
            "event": "failed", "run": 'a "run"\\', "text": "installing srde failed; see startup.log", "facts": {},
        }  # fmt: skip
    else:
        assert hook.received == [] and "no notification" in out


# Secrets


@pytest.mark.security
@pytest.mark.parametrize("flags", [(), ("-x",)], ids=["plain", "traced"])
def test_no_secret_in_any_output_or_argument(room, data, hook, flags):
    """The stand-in prints them all, and fails, so that the script notifies too."""
    for name in ("curl", "git", "flock"):
        real = shutil.which(name)
        room.program(name, f'printf "%s\\n" "$@" >>"{room.folder}/arguments"; exec {real} "$@"')
    room.ends(1, 1)
    data.cut = [20_000]
    _, out = room.run(flags=flags, MAX_RETRIES="1", MY_API_KEY="k-0123456789")
    assert len(hook.received) == 1 and "training with [hidden] and [hidden] on [hidden]" in out
    log = (room.work / "startup.log").read_text()
    arguments = (room.folder / "arguments").read_text()
    assert "--continue-at" in arguments
    path, query = hook.url.split("/hook/")[1].split("?token=")
    for secret in (HF_TOKEN, hook.url, path, query, data.url, "5ca1ab1e0ddba11", "k-0123456789"):
        for where in (out, log, arguments, json.dumps(hook.bodies)):
            assert secret not in where


# The files beside it


def settings() -> dict[str, str]:
    """The script's settings and their defaults."""
    return dict(re.findall(r"^([A-Z_]+)=\"\$\{\1:-(.*?)\}\"", SCRIPT.read_text(), re.MULTILINE))


def test_the_readme_lists_every_setting_with_its_default():
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", (SCRIPT.parent / "README.md").read_text(), re.MULTILINE)
    listed = dict(rows)
    assert len(settings()) == 12 and set(listed) == {*settings(), "WEBHOOK_ALLOW_PRIVATE"}
    for name, default in settings().items():
        assert not default or listed[name].strip("`") == default


def test_the_task_and_the_image_name_what_there_is():
    task = yaml.safe_load((SCRIPT.parent / "sky.yaml").read_text())
    assert set(task["envs"]) <= set(settings()) and str(SCRIPT.relative_to(ROOT)) in task["run"]
    for name, value in task["envs"].items():
        assert value is None or str(value) == settings()[name]
    image = (SCRIPT.parent / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", image, re.MULTILINE) for name in line.split()]
    assert {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "src"} == set(copied)
    assert all((ROOT / name).exists() for name in copied) and re.search(r"^USER srde$", image, re.MULTILINE)
