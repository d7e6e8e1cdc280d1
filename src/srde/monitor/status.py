"""Whether a run is alive, from the newest sign of a process: its heartbeat, or an event that says that one has started since.

    starting           the model is being loaded
    running            it trains, evaluates or saves
    stalled            no sign of life for longer than `stall_seconds`
    died               it never said that it ended, and no process of this machine has its id
    stopped, failed, completed    as the process said itself

On other machines a dead process cannot be told from a hanging one: both are `stalled`.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srde.artifacts.disk import is_alive
from srde.monitor.facts import Facts
from srde.monitor.history import number, whole

ENDED = frozenset({"completed", "stopped", "failed", "died"})
"""Statuses after which nothing more comes, unless somebody resumes the run."""

_SHORTEST_STALL = 60.0
_LONG_WORK_STALL = 600.0
_STATUS = {
    "loading": "starting",
    "training": "running",
    "evaluating": "running",
    "saving": "running",
    "stopped": "stopped",
    "failed": "failed",
    "completed": "completed",
}


@dataclass(frozen=True)
class Sign:
    """The newest word of a process about itself."""

    time: float
    pid: int
    host: str
    status: str
    reason: str


def newest_sign(heartbeat: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]]) -> Sign | None:
    """The heartbeat, unless a process has started after it: that one is loading."""
    starts = [one for one in events if one.get("event") in ("started", "resumed")]
    start = starts[-1] if starts else None
    told = [(one, status) for one, status in ((start, "loading"), (heartbeat, None)) if one is not None]
    if not told:
        return None
    record, status = max(told, key=lambda one: (number(one[0], "time") or 0.0, one[1] is None))
    return Sign(
        number(record, "time") or 0.0,
        whole(record, "pid"),
        str(record.get("host", "")),
        status or str(record.get("status", "")),
        str(record.get("reason") or "") if status is None else "",
    )


def stall_seconds(sign: Sign | None, facts: Facts, step_seconds: float | None) -> float:
    """Five times the time between two signs, at least a minute; ten minutes while there are none in between, or no
    step has been timed yet."""
    if sign is None or sign.status != "training" or step_seconds is None:
        return _LONG_WORK_STALL
    between = step_seconds * min(facts.heartbeat_steps, facts.logging_steps)
    return max(_SHORTEST_STALL, 5 * between)


def status_of(sign: Sign | None, silent: float | None, limit: float) -> str:
    status = "starting" if sign is None else _STATUS.get(sign.status, "running")
    if status in ENDED:
        return status
    if sign is not None and sign.host == socket.gethostname() and not _lives(sign.pid):
        return "died"
    return "stalled" if silent is not None and silent > limit else status


def _lives(pid: int) -> bool:
    return 0 < pid < 2**31 and is_alive(pid)
