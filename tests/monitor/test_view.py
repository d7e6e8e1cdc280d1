"""The terminal view: what it shows, that it fits, how it ends."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from srde.cli import main
from srde.monitor import view
from srde.monitor.curve import curve
from srde.monitor.routing import Routing
from srde.monitor.run import RunReader, read_run
from srde.monitor.strip import strip
from srde.monitor.texts import count, duration, percent, printable, size
from srde.monitor.view import frame, watch

HOSTILE = "</b> [red]数学数学数学 \x1b[31m\x07\u202e" + "long" * 30


@pytest.fixture
def troubled(fabricate, dead_pid):
    """A large run with everything that there is to show: names made to do harm, many alerts, a damaged checkpoint."""
    fabricated = fabricate(
        steps=150, max_steps=200, layers=40, experts=16, model=HOSTILE, domains=[HOSTILE, *"abcdefghijkl"]
    )
    load = fabricated.loads()
    load[3][5] = 0.0
    fabricated.train(12, loads=load)
    fabricated.checkpoint()
    fabricated.damage(f"checkpoint-{fabricated.step}")
    fabricated.event("skipped_step", HOSTILE)
    fabricated.train(1, loss=40.0, loads=load)
    fabricated.beat(pid=dead_pid, phase=HOSTILE)
    return fabricated


def text(run, width=80, height=None, **settings):
    return "\n".join(line.plain for line in frame(run, width, height, **settings))


def test_one_frame_shows_the_figures(fabricate):
    fabricated = fabricate(steps=60, max_steps=100)
    fabricated.checkpoint()
    shown = text(read_run(fabricated.folder))
    loss = read_run(fabricated.folder).train.last("loss")
    for part in (
        "SmolLM2-135M-Instruct", "running", "60/100 60 %", "joint", "ETA 20 s", f"loss {loss:.3f}", "held-out 1.432",
        "base 2.000", "tokens/s 8.2 k", "memory 9.1 GB", "sparsity 2.6 %", "8 experts x 4 layers, 0 dead", "router_aux 0.011",
        "checkpoint-60, 2.5 kB, verified", "checkpoint: saved checkpoint-60", "step 1 ", "1.9",
    ):  # fmt: skip
        assert part in shown, part
    assert re.search(r"logic +1\.532 +2\.000 +-23 %", shown) and "\u28ff" > max(shown) > "\u2800"
    assert shown.count("●") >= 3 and "╌" in shown


@pytest.mark.parametrize("ascii_only", [False, True], ids=["unicode", "ascii"])
def test_a_frame_fits(ascii_only, troubled):
    run = read_run(troubled.folder)
    for width, height in itertools.product([40, 66, 80, 200], [None, 12, 24, 50]):
        lines = frame(run, width, height, ascii_only=ascii_only)
        assert max(cell_len(line.plain) for line in lines) <= width
        shown = "\n".join(line.plain for line in lines)
        assert height is None or len(lines) <= height
        assert "died" in shown and not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", shown)
        assert shown.isascii() or not ascii_only


def test_80_by_24_has_room_for_all_parts(fabricate):
    fabricated = fabricate(steps=150, max_steps=200, layers=40, experts=8)
    fabricated.checkpoint()
    lines = [line.plain for line in frame(read_run(fabricated.folder), 80, 24)]
    assert len(lines) == 24
    assert sum(max(line) > "\u2800" for line in lines) >= 6
    rows = [re.match(r" {2}(\d) ([×·░▒▓█]+)(?: |$)", line) for line in lines]
    assert [len(row[2]) for row in rows if row] == [40] * 8  # one mark for each layer
    for part in (
        "8 experts x 40 layers",
        "math ",
        "code ",
        "checkpoint-150",
        "saved checkpoint-150",
        "tokens/s",
    ):
        assert any(part in line for line in lines), part


def test_alerts_are_shown_and_counted_where_there_is_no_room(troubled):
    run = read_run(troubled.folder)
    roomy, tight = text(run), text(run, height=24)
    for kind in ("died", "damaged_checkpoint", "loss_spike", "skipped_steps", "dead_experts"):
        assert f"! {kind}: " in roomy
    assert "! died" in tight and "more alert" in tight and "DAMAGED" in tight


def test_a_run_that_has_just_started_has_a_frame(fabricate):
    shown = text(read_run(fabricate(steps=0).folder), height=24)
    assert "0/100 0 %" in shown and "no loss has been logged yet" in shown and "no checkpoint yet" in shown


def test_the_strip_tells_dead_even_and_crowded_experts_apart():
    share_LE = np.array([[0.25, 0.25, 0.25, 0.25], [0.0, 0.02, 0.1, 0.88], [np.nan] * 4])
    lines = [line.plain for line in strip(Routing(share_LE, 3, False), 80, 8)]
    assert lines == ["  0 ▒▒▒×××   ", "  1 ▒▒▒···   ", "  2 ▒▒▒░░░   ", "  3 ▒▒▒███   "]
    even = Routing(np.full((100, 64), 1 / 64), 3, False)
    grouped = [line.plain for line in strip(even, 58, 8)]
    assert len(grouped) == 8 and grouped[1].split() == ["8-15", "▒" * 50]


def test_the_curve_falls_where_the_loss_falls():
    step_N = np.arange(1.0, 101.0)
    lines = [line.plain for line in curve(step_N, 3 - step_N / 50, [(50, 2.0)], None, 48, 8, ascii_only=True)]
    assert len(lines) == 9 and lines[0][8] == "*" and lines[7].rstrip()[-1] == "*"
    heights = [[row for row in range(8) if lines[row].ljust(48)[column] == "*"] for column in range(8, 48)]
    tops = [min(rows) for rows in heights if rows]
    assert tops == sorted(tops) and sum(line.count("o") for line in lines[:8]) == 1
    assert lines[8].split() == ["step", "1", "100"] and lines[0].split()[0] == "3.00"


def test_one_first_loss_does_not_flatten_the_curve():
    loss_N = np.array([50.0, *np.linspace(2, 1, 99)])
    lines = [line.plain for line in curve(np.arange(100.0), loss_N, [], None, 88, 10)]
    assert float(lines[0].split()[0]) < 3


def console(**settings):
    settings = {"width": 80, "force_terminal": True, "highlight": False} | settings
    return Console(file=io.StringIO(), **settings)


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_colours_only_where_they_are_wanted(environment, coloured, fabricate):
    out = console(_environ={"TERM": "xterm-256color"} | environment)
    view.show(out, read_run(fabricate().folder))
    shown = out.file.getvalue()
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", shown)) == coloured
    assert shown.isascii() == (environment.get("TERM") == "dumb")


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("stopped", 0), ("failed", 1)])
def test_watching_ends_with_the_run(status, code, fabricate, monkeypatch):
    fabricated = fabricate()
    out = console(height=24, _environ={"TERM": "xterm"})
    naps = []

    def nap(seconds):
        naps.append(seconds)
        fabricated.train(1)
        fabricated.beat(status if len(naps) == 3 else "training")

    monkeypatch.setattr(view.time, "sleep", nap)
    assert watch(out, RunReader(fabricated.folder), 1.5) == code
    shown = out.file.getvalue()
    assert naps == [1.5] * 3 and "62/100" in shown
    left = shown.split("\x1b[?1049l")[-1]  # what stays when the terminal has its own screen again
    assert status in left and "63/100" in left


def test_ctrl_c_leaves_cleanly(fabricate, monkeypatch):
    fabricated = fabricate()

    def interrupted(_):
        fabricated.beat("failed")  # what happens afterwards is no matter of who has left
        raise KeyboardInterrupt

    monkeypatch.setattr(view.time, "sleep", interrupted)
    out = console(height=24, _environ={"TERM": "xterm"})
    assert watch(out, RunReader(fabricated.folder), 1) == 0
    assert "60/100" in out.file.getvalue().split("\x1b[?1049l")[-1]


def test_without_a_terminal_each_new_step_gives_a_line(fabricate, monkeypatch):
    fabricated = fabricate()
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) % 2:
            fabricated.train(1)
        if len(naps) == 4:
            fabricated.beat("completed")

    monkeypatch.setattr(view.time, "sleep", nap)
    out = console(force_terminal=False)
    assert watch(out, RunReader(fabricated.folder), 1) == 0
    shown = out.file.getvalue()
    assert [shown.count(f"running  step {step}/100") for step in (60, 61, 62)] == [1, 1, 1]
    assert shown.count("srde monitor") == 1 and "\x1b" not in shown


def test_once_through_the_command_line(fabricate, capsys):
    fabricated = fabricate()
    assert main(["monitor", "--output_dir", str(fabricated.folder), "--once"]) == 0
    out = capsys.readouterr().out
    assert "60/100" in out and max(map(cell_len, out.splitlines())) <= 80
    fabricated.beat("failed")
    assert main(["monitor", "--output_dir", str(fabricated.folder), "--once"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--intervall", "3"], "--interval"),
        (["--interval", "0"], "from 0.1"),
        (["--interval", "nan"], "from 0.1"),
        ([], "no run has been here"),
    ],
    ids=["flag", "zero", "nan", "no run"],
)
def test_what_cannot_be_watched_is_said(more, message, tmp_path, capsys):
    assert main(["monitor", "--output_dir", str(tmp_path), *more]) == 1
    assert message in capsys.readouterr().err


def test_in_a_real_terminal_until_ctrl_c(fabricate):
    fabricated = fabricate()
    leader, follower = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "srde",
        "monitor",
        "--output_dir",
        str(fabricated.folder),
        "--interval",
        "0.1",
    ]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True
    )
    os.close(follower)
    seen, until, pressed = b"", time.monotonic() + 60, False
    while time.monotonic() < until:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            seen += part
        if b"60/100" in seen and not pressed:
            pressed = True
            process.send_signal(signal.SIGINT)
    os.close(leader)
    assert process.wait(timeout=10) == 0
    assert b"\x1b[?1049h" in seen and b"60/100" in seen.split(b"\x1b[?1049l")[-1] and b"Traceback" not in seen


def test_numbers_for_people():
    assert [duration(s) for s in (None, 0.4, 59, 60, 125, 3600, 7290, 90000)] == [
        "-", "0 s", "59 s", "1 min", "2 min 5 s", "1 h", "2 h 1 min", "1 d 1 h",
    ]  # fmt: skip
    assert [size(b) for b in (12, 2500, 999_000_000, 5e12)] == ["12 B", "2.5 kB", "999 MB", "5.0 TB"]
    assert [count(n) for n in (None, 950, 12_345, 4.5e6, 7.8e9)] == ["-", "950", "12.3 k", "4.5 M", "7.8 B"]
    assert [percent(p) for p in (None, 0.0, 0.05, 0.0002)] == ["-", "0.0 %", "5.0 %", "0.020 %"]
    assert printable("a\nb\x1b[0m\u202e\ud800é") == "a b\\x1b[0m\\u202e\\ud800é"
