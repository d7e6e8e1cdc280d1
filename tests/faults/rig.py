"""Runs `srde` commands in processes that can be killed, many in a short time.

Importing torch and Transformers takes seconds and a run on a tiny model a fraction of one. So one process imports everything
once and then forks a child for each command: a real process with a real command line, its own process group, its own end.

Two things are left out in the children, as they take most of such a run's time and no kill can tell: `os.fsync` (what was handed
to the system outlives the process) and the plots.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SERVER = r"""
import gc, json, os, sys, threading, traceback
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # libraries print as they are imported
import torch
torch.set_num_threads(1)
from tqdm import tqdm
tqdm.set_lock(threading.RLock())  # its own is shared with all children: one killed while it holds it would stop the others
from accelerate.utils import extract_model_from_parallel
from srde.cli import main
import srde.cli.train, srde.train.run, srde.monitor.plots, srde.monitor.run
from srde.data.tokenizers import load_tokenizer
from srde.tuner.loading import load_base
extract_model_from_parallel(torch.nn.Identity())  # imports what accelerate looks for
load_base(sys.argv[1], "auto"), load_tokenizer(sys.argv[1])  # and what Transformers needs for such a model
os.fsync = lambda descriptor: None
srde.monitor.plots.save_plots = lambda *_: None
gc.collect(), gc.freeze()
print("ready", file=answers)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1), os.dup2(out, 2)
        os.close(0)
        os.environ.update(job["env"])
        code = 1
        try:
            if job["before"]:
                exec(job["before"], {})
            code = main(job["argv"])
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    print(pid, file=answers)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), file=answers)
"""


@dataclass
class Job:
    """A command that runs.

    Attributes:
        pid: Its process, the leader of its group.
        log: What it prints.
    """

    rig: Rig
    pid: int
    log: Path
    code: int | None = None

    def wait(self, timeout: float = 60) -> int:
        """Its exit status; negative for a signal. After so many seconds it is killed, and the test fails."""
        if self.code is None and not self.rig.has_answered(timeout):
            self.kill()
            self.rig.answer(10)
            raise AssertionError(f"the command did not end in {timeout} s:\n{self.text()[-3000:]}")
        if self.code is None:
            self.code = int(self.rig.answer(1))
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the process alone."""
        os.kill(self.pid, number)

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        """The last line that it has printed: the error, if it ended with one."""
        return ([line for line in self.text().splitlines() if line.strip()] or [""])[-1]


class Rig:
    """The process that forks.

    Args:
        folder: For what the commands print.
        base: The model that they will load, so that what it needs is imported already.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.count = 0
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        env = {name: value for name, value in env.items() if name not in ("WEBHOOK_URL", "SRDE_ATTEMPT")}
        said = folder / "server.log"
        with open(said, "wb") as stream:
            self.server = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", SERVER, str(base)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True, env=env,
            )  # fmt: skip
        if self.answer(120) != "ready":
            self.close()
            raise RuntimeError(said.read_text())

    def has_answered(self, timeout: float) -> bool:
        """Whether the server says something within so many seconds."""
        return bool(select.select([self.server.stdout], [], [], timeout)[0])

    def answer(self, timeout: float) -> str:
        """The next line of the server."""
        assert self.has_answered(timeout), "the server does not answer"
        return self.server.stdout.readline().strip()

    def start(self, argv: list[str], before: str = "", **env: str) -> Job:
        """Starts `srde` with arguments; one at a time.

        Args:
            argv: The arguments.
            before: Python code that runs in the process first.
            env: Further environment variables.
        """
        self.count += 1
        log = self.folder / f"job-{self.count}.log"
        job = {"argv": argv, "log": str(log), "env": env, "before": before}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return Job(self, int(self.answer(10)), log)

    def run(self, argv: list[str], before: str = "", timeout: float = 60, **env: str) -> Job:
        """Runs a command to its end."""
        job = self.start(argv, before, **env)
        job.wait(timeout)
        return job

    def close(self) -> None:
        """Ends the server."""
        self.server.stdin.close()
        self.server.wait(10)
        self.server.stdout.close()


HOOK = """
def _hook():
    import importlib, os, signal, sys, time
    module, _, path = {target!r}.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    inner = getattr(owner, name)
    count = 0
    def call(*args, **kwargs):
        nonlocal count
        count += 1
        {before}
        result = inner(*args, **kwargs)
        {after}
        return result
    setattr(owner, name, call)
    for other in list(sys.modules.values()):  # who has imported it by name has it too
        if getattr(other, "__name__", "").startswith("srde.") and vars(other).get(name) is inner:
            setattr(other, name, call)
_hook()
"""


def hook(target: str, before: str = "pass", after: str = "pass") -> str:
    """Code for `Rig.start` that does something whenever a function is called.

    Args:
        target: Where it is defined, as in ``srde.train.runner:RunTrainer.training_step``.
        before: A statement that runs before each call; it sees `args`, `kwargs` and `count`, the number of the call from 1.
        after: One that runs after it; it sees `result` too.
    """
    return HOOK.format(target=target, before=before, after=after)


def signal_at(target: str, condition: str, number: int = signal.SIGKILL, *, after: bool = False) -> str:
    """Code that sends the process a signal at a call of a function (or right after it) for which a condition holds."""
    statement = f"if {condition}: os.kill(os.getpid(), {int(number)})"
    return hook(target, after=statement) if after else hook(target, before=statement)


def wait_for(condition: Callable[[], bool], timeout: float = 30) -> None:
    """Returns when a condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)
