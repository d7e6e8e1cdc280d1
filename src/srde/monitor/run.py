"""A training run as its folder tells it: what it is, how far it is, whether it is alive.

run.json           what the run is (see `Facts`)
metrics.jsonl      {"kind": "train" | "eval", "step", "loss", ...}, one a logged step or evaluation
events.jsonl       {"time", "pid", "host", "event", "step", "text"}
heartbeat.json     {"time", "pid", "host", "status", "step", "max_steps", "phase", "reason"}
checkpoint-<step>/, checkpoint-best/, MANIFEST.json of the final adapter
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from srde.errors import UsageError
from srde.monitor.checkpoints import Checkpoint, Checkpoints
from srde.monitor.facts import Facts
from srde.monitor.history import Columns, Loads, Metrics, number, whole
from srde.monitor.log import (
    EVENTS_FILE,
    HEARTBEAT_FILE,
    METRICS_FILE,
    RUN_FILE,
    LineReader,
    read_json,
)
from srde.monitor.routing import Routing, recent_routing
from srde.monitor.status import ENDED, newest_sign, stall_seconds, status_of


@dataclass(frozen=True)
class DomainLoss:
    """Held-out loss of one domain, in nats per token: the last, the best so far, the frozen model's."""

    name: str
    loss: float | None
    best: float | None
    base: float | None


@dataclass(frozen=True)
class Run:
    """A run as it was when it was read. What is long (`train`, `loads`, `evals`, `events`) belongs to the reader and grows.

    Attributes:
        folder: The run's folder.
        facts: What the run is.
        train: Numbers of its logged steps.
        loads: Their experts' loads.
        evals: Its evaluations.
        events: What happened to its processes.
        heartbeat: The last heartbeat as read, or None.
        checkpoints: What it has saved.
        now: When it was read, in unix seconds.
        status: See `srde.monitor.status`.
        stall_seconds: After how many seconds without a sign of life it counts as stalled.
        silent_seconds: Seconds since the last sign of life; None if there never was one.
        reason: Why it stopped or failed, in its own words, else empty.
    """

    folder: Path
    facts: Facts
    train: Columns
    loads: Loads
    evals: list[dict[str, Any]]
    events: list[dict[str, Any]]
    heartbeat: Mapping[str, Any] | None
    checkpoints: tuple[Checkpoint, ...]
    now: float
    status: str
    stall_seconds: float
    silent_seconds: float | None
    reason: str

    @property
    def step(self) -> int:
        """Steps done."""
        return max(int(self.train.last("step") or 0), whole(self.heartbeat, "step") if self.heartbeat else 0)

    @property
    def max_steps(self) -> int:
        """Steps there will be; 0 if not known yet."""
        return self.facts.max_steps or (whole(self.heartbeat, "max_steps") if self.heartbeat else 0)

    @property
    def phase(self) -> str:
        """The present phase; empty before the first."""
        said = self.heartbeat.get("phase") if self.heartbeat else None
        return str(said or (self.train.phases[-1] if len(self.train) else ""))

    @property
    def tokens_per_second(self) -> float | None:
        """Median of the last logged steps."""
        return self.train.median("tokens_per_second")

    @property
    def step_seconds(self) -> float | None:
        """Median of the last logged steps."""
        return self.train.median("step_seconds")

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last step at the present pace, without evaluations and saves; None unless it is going."""
        if (
            self.status in ENDED
            or self.status == "stalled"
            or self.step_seconds is None
            or not self.max_steps
        ):
            return None
        return max(self.max_steps - self.step, 0) * self.step_seconds

    @property
    def memory_mb(self) -> float | None:
        """Memory of the last logged step."""
        return self.train.last("memory_mb")

    @property
    def sparsity(self) -> float | None:
        """Share of a layer that each expert rewrites, at the last logged step."""
        return self.train.last("sparsity")

    @cached_property
    def routing(self) -> Routing | None:
        """How the experts shared the tokens of the last windows; None in phases without experts."""
        return recent_routing(self.loads, self.facts.num_experts)

    @property
    def dead_experts(self) -> list[tuple[int, int]]:
        """Layer and number of each open expert that gets next to nothing."""
        return self.routing.dead if self.routing else []

    @cached_property
    def held_out(self) -> list[DomainLoss]:
        """Held-out losses by domain; the last entry, named `all`, is over everything."""
        names = list(dict.fromkeys(name for record in self.evals for name in _domains(record)))
        return [self._losses(name) for name in [*names, None]] if self.evals else []

    def _losses(self, domain: str | None) -> DomainLoss:
        records = self.evals if domain is None else [_domains(one).get(domain, {}) for one in self.evals]
        losses = [value for one in records if (value := number(one, "loss")) is not None]
        bases = [value for one in records if (value := number(one, "base_loss")) is not None]
        return DomainLoss(
            "all" if domain is None else domain,
            losses[-1] if losses else None,
            min(losses, default=None),
            bases[-1] if bases else None,
        )

    @property
    def newest_checkpoint(self) -> Checkpoint | None:
        """The checkpoint that a resumed run would start from."""
        numbered = [one for one in self.checkpoints if one.step is not None]
        return numbered[-1] if numbered else None


class RunReader:
    """Reads a run's folder again and again, each time only what is new of its long files.

    Args:
        output_dir: The run's folder.

    Raises:
        UsageError: There is no such folder, or no run has been there.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.folder = Path(output_dir)
        self._require_folder()
        marks = (RUN_FILE, HEARTBEAT_FILE, EVENTS_FILE, METRICS_FILE)
        if not any((self.folder / name).exists() for name in marks):
            raise UsageError.of(
                "output_dir", str(output_dir), rule=f"no run has been here: it holds none of {', '.join(marks)}",
                fix="Name the --output_dir of srde train",
            )  # fmt: skip
        self._metrics = Metrics()
        self._events: list[dict[str, Any]] = []
        self._metric_lines = LineReader(self.folder / METRICS_FILE, self._metrics)
        self._event_lines = LineReader(self.folder / EVENTS_FILE, self._events)
        self._checkpoints = Checkpoints(self.folder)

    def read(self, *, verify_seconds: float = math.inf, now: float | None = None) -> Run:
        """The run as it is at this moment.

        Args:
            verify_seconds: How long checkpoints may be hashed for; those that no time is left for have `verified=None`.
            now: The time to reckon ages from, in unix seconds; the present by default.

        Raises:
            UsageError: The folder is gone.
            ArtifactError: A file is broken in a way that no killed writer leaves behind.
        """
        self._require_folder()
        self._metric_lines.poll()
        self._event_lines.poll()
        now = time.time() if now is None else now
        facts = Facts.read(self.folder / RUN_FILE)
        place = self.folder / HEARTBEAT_FILE
        heartbeat = read_json(place) if place.exists() else None
        sign = newest_sign(heartbeat, self._events)
        train = self._metrics.train
        limit = stall_seconds(sign, facts, train.median("step_seconds"))
        times = [sign.time if sign else None, facts.started, train.last("time")]
        times += [number(self._events[-1], "time") if self._events else None]
        last = max((value for value in times if value is not None), default=None)
        silent = None if last is None else max(now - last, 0.0)
        return Run(
            self.folder, facts, train, self._metrics.loads, self._metrics.evals, self._events, heartbeat,
            self._checkpoints.look(verify_seconds), now, status_of(sign, silent, limit), limit, silent,
            sign.reason if sign else "",
        )  # fmt: skip

    def _require_folder(self) -> None:
        if not self.folder.is_dir():
            raise UsageError.of(
                "output_dir",
                str(self.folder),
                rule="there is no such folder",
                fix="Name a run's --output_dir",
            )


def read_run(output_dir: str | os.PathLike[str], *, verify_seconds: float = math.inf) -> Run:
    """Reads a run's folder once.

    Args:
        output_dir: The run's folder.
        verify_seconds: How long checkpoints may be hashed for; 0 leaves them unverified.

    Raises:
        UsageError: No run has been there.
        ArtifactError: A file is broken in a way that no killed writer leaves behind.
    """
    return RunReader(output_dir).read(verify_seconds=verify_seconds)


def specialisation_text(record: Mapping[str, Any]) -> str | None:
    """How far the experts differ by domain, as one evaluation found it; None where it did not say."""
    found = record.get("specialisation")
    if not isinstance(found, dict):
        return None
    try:
        return (
            f"{float(found['mean']):.3f} bits of mutual information between domain and expert, "
            f"{float(found['chance']):.3f} by chance (p = {float(found['p_value']):.3g}, "
            f"{int(found['permutations'])} permutations of the examples' domains)"
        )
    except (KeyError, TypeError, ValueError):
        return None


def _domains(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    domains = record.get("domains")
    if not isinstance(domains, dict):
        return {}
    return {name: one for name, one in domains.items() if isinstance(one, dict)}
