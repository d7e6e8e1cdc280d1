"""Runs `srde` commands in processes that can be killed, many in a short time.

Importing torch and Transformers takes seconds and a run on a tiny model a fraction of one. So one process imports everything once and
then forks a child for each command: a real process with a real command line, its own process group, and its own end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SERVER = r"""
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
from srde.cli import main
import srde.train.run, srde.monitor.plots, safetensors.torch, sklearn.cluster, scipy.optimize
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot
print("ready", flush=True)
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
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
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
        """Its exit status; negative for a signal."""
        if self.code is None:
            self.code = int(self.rig.answer(timeout))
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the process alone."""
        os.kill(self.pid, number)

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Rig:
    """The process that forks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip
        assert self.answer(120) == "ready"

    def answer(self, timeout: float) -> str:
        """The next line of the server."""
        import select

        ready, _, _ = select.select([self.server.stdout], [], [], timeout)
        assert ready, "the command did not end in time"
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


def wait_for(condition, timeout: float = 30) -> None:
    """Returns when a condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)
