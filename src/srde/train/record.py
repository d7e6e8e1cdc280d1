"""What a run writes down about itself: metrics, events, signs of life. The first process writes, the others nothing."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from srde.errors import SrdeError
from srde.monitor.log import EVENTS_FILE, HEARTBEAT_FILE, METRICS_FILE, RUN_FILE, MetricsLog, replace_json

FORMAT = 1

logger = logging.getLogger(__name__)


class Record:
    """Writes `run.json`, `metrics.jsonl`, `events.jsonl` and `heartbeat.json` of a run; `srde monitor` reads them.

    Args:
        folder: The run's folder.
        max_steps: Steps in all.
        heartbeat_steps: Steps between two heartbeats.
        writes: Whether this process is the one that writes.
        scrub: Takes secrets out of texts.
    """

    def __init__(
        self,
        folder: Path,
        max_steps: int,
        heartbeat_steps: int,
        *,
        writes: bool = True,
        scrub: Callable[[str], str] = str,
    ) -> None:
        self.scrub = scrub
        self.folder, self.max_steps, self.heartbeat_steps, self.writes = (
            folder, max_steps, heartbeat_steps, writes,
        )  # fmt: skip
        self.metrics = MetricsLog(folder / METRICS_FILE)
        self._events = MetricsLog(folder / EVENTS_FILE)
        self._who = {"pid": os.getpid(), "host": socket.gethostname()}
        self.step, self.phase = 0, ""

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Writes `run.json`."""
        if self.writes:
            replace_json(self.folder / RUN_FILE, {"format": FORMAT, **facts, "started": time.time()})

    def resume(self, step: int, *, again: bool = False) -> None:
        """Drops the lines of later steps than the one that the run goes on from.

        Args:
            step: That step.
            again: Its evaluation is still to be made up for: a line of it, from a process that died since, goes too.
        """
        if self.writes:
            self.metrics.truncate_after(
                step, drop=lambda line: again and line.get("kind") == "eval" and line["step"] == step
            )

    def line(self, kind: str, step: int, facts: Mapping[str, Any], clock: Mapping[str, Any]) -> None:
        """Adds a line of metrics. What depends on the machine and the hour is under `clock`, apart from the rest."""
        if self.writes:
            self.metrics.append(
                {"kind": kind, "step": step, **facts, "clock": {"time": time.time(), **clock}}
            )

    def event(self, name: str, step: int, text: str) -> None:
        """Adds an event, and tells it on the log."""
        text = self.scrub(text)
        if self.writes:
            self._events.append({"time": time.time(), **self._who, "event": name, "step": step, "text": text})
            logger.info("step %d: %s: %s", step, name, text)

    def bad_batch(self, name: str, facts: Mapping[str, Any]) -> None:
        """Adds a line about a batch that could not be used to a file of its own."""
        if self.writes:
            MetricsLog(self.folder / name).append(facts)

    def beat(
        self, status: str, step: int | None = None, phase: str | None = None, reason: str | None = None
    ) -> None:
        """Replaces the sign of life."""
        self.step = self.step if step is None else step
        self.phase = self.phase if phase is None else phase
        if self.writes:
            replace_json(
                self.folder / HEARTBEAT_FILE,
                {
                    "time": time.time(), **self._who, "status": status, "step": self.step, "max_steps": self.max_steps,
                    "phase": self.phase, "reason": None if reason is None else self.scrub(reason),
                },
            )  # fmt: skip

    def fail(self, reason: str) -> None:
        """Says that the run ends here, and why; what cannot be written any more is left."""
        with suppress(OSError, SrdeError):
            self.beat("failed", reason=reason)
            self.event("failed", self.step, reason)

    def step_done(self, step: int, phase: str) -> None:
        """Called after every step: a heartbeat when it is due."""
        self.step, self.phase = step, phase
        if step % self.heartbeat_steps == 0:
            self.beat("training")


def memory_mb() -> float:
    """Peak memory of this process: on the accelerator, if there is one, else in main memory; in MB of 10^6 bytes."""
    import resource
    import sys

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
