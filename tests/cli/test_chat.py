"""`srde chat` from the command line: through a pipe, and in a terminal with Ctrl-C."""

import io
import os
import pty
import subprocess
import sys
import time

import pytest
from adapters import config, fill
from peft import get_peft_model

from srde.cli import main
from srde.infer.generate import generate
from srde.tuner.loading import load_adapter, load_base
from tiny import save_tiny

AT_A_TERMINAL = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "from srde.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = fill(get_peft_model(load_base(str(save_tiny(folder / "base"))), config(num_experts=4)))
    model.save_pretrained(folder / "out")
    return folder / "out"


def say(monkeypatch, adapter, lines, *flags):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    return main(["chat", "--adapter", str(adapter), "--max_new_tokens", "6", *flags])


def test_a_pipe_in_a_pipe_out(monkeypatch, adapter, capsys):
    assert say(monkeypatch, adapter, b"yes\nhow many\n/exit\nno\n", "--system", "no") == 0
    model, tokenizer = load_adapter(str(adapter))
    turns, want = [{"role": "system", "content": "no"}], ""
    for question in ("yes", "how many"):
        turns.append({"role": "user", "content": question})
        text = generate(model, tokenizer, [turns], max_new_tokens=6).answers[0].text
        turns.append({"role": "assistant", "content": text})
        want += text + "\n"
    got = capsys.readouterr()
    assert got.out == want and ">" not in got.err


def test_flags_set_the_route_and_show_it(monkeypatch, adapter, capsys):
    assert say(monkeypatch, adapter, b"yes\n", "--expert", "2", "--show_routing") == 0
    out = capsys.readouterr().out
    assert out.startswith("[2]") and out.endswith("experts:  [2]\n")


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        (b"yes\n/rotue\n", [], "command='/rotue': there is no such command. the nearest is /route."),
        (b"\xff\n", [], "standard input:1: text: is not UTF-8"),
        (b"", ["--route", "math"], "expert='math': the adapter's experts are numbered 0 to 3 and have no names"),
        (b"", ["--seed", "1"], "seed=1: it is for drawn tokens"),
        (b"", ["--prompt", "a"], "srde chat has no such flag"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_exit_1(monkeypatch, adapter, capsys, lines, flags, message):
    assert say(monkeypatch, adapter, lines, *flags) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


class Screen:
    """A program at a terminal of its own."""

    def __init__(self, argv):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_A_TERMINAL, *argv],
            stdin=slave, stdout=slave, stderr=subprocess.DEVNULL, start_new_session=True, env=environment,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, text):
        """Reads on until a text comes; what came before it is gone."""
        end = time.monotonic() + 100
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        os.write(self.master, text.encode())


@pytest.mark.slow
def test_at_a_terminal_answers_are_coloured_and_ctrl_c_stops_then_leaves(adapter):
    screen = Screen(
        [
            "chat",
            "--adapter",
            str(adapter),
            "--show_routing",
            "--max_new_tokens",
            "1500",
            "--stop_strings",
            "zzz",
        ]
    )
    try:
        assert "4 experts. /help lists" in screen.until("> ")
        screen.type("yes\n")
        screen.until("\x1b[38;5;")  # an answer is on its way
        screen.type("\x03")
        screen.until("stopped; Ctrl-C again leaves")
        screen.until("> ")
        screen.type("/route 2\n")
        screen.until("route: 2")
        screen.until("> ")
        screen.type("\x03")
        screen.until("Ctrl-C again leaves, and so does /exit")
        screen.until("> ")  # a signal just before readline waits for a key is seen only with the next key
        time.sleep(0.2)
        screen.type("\x03")
        assert screen.process.wait(timeout=60) == 130
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.master)
