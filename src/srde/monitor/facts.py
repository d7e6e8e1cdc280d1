"""What a run is: the content of its `run.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srde.errors import ArtifactError
from srde.monitor.log import read_json

_FORMAT = 1


@dataclass(frozen=True)
class Phase:
    """A phase of the run: its steps from `start` on, before `end`."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Facts:
    """What `run.json` says of the run; of a run that has just started it may not be there yet.

    Attributes:
        max_steps: Its last step; 0 if not known.
        phases: Its phases in order.
        num_experts: Routed experts of each layer; None if not known.
        layers: Names of the layers with experts.
        model: The base.
        heartbeat_steps: Steps between two heartbeats.
        logging_steps: Steps between two lines of metrics.
        started: When, in unix seconds.
        raw: Everything, as read.
    """

    max_steps: int = 0
    phases: tuple[Phase, ...] = ()
    num_experts: int | None = None
    layers: tuple[str, ...] = ()
    model: str = ""
    heartbeat_steps: int = 1
    logging_steps: int = 1
    started: float | None = None
    raw: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Facts:
        """Reads a `run.json`; none gives facts that know nothing.

        Raises:
            ArtifactError: It is of another format, or a field is not what it should be.
        """
        if not path.exists():
            return cls()
        raw = read_json(path)
        if raw.get("format") != _FORMAT:
            raise ArtifactError.of(
                f"{path}: format", raw.get("format"), rule=f"this srde reads format {_FORMAT}",
                fix="Use the srde release that wrote the run",
            )  # fmt: skip
        try:
            return cls(
                max_steps=int(raw["max_steps"]),
                phases=tuple(
                    Phase(str(one["name"]), int(one["start"]), int(one["end"])) for one in raw["phases"]
                ),
                num_experts=int(raw["num_experts"]),
                layers=tuple(map(str, raw["layers"])),
                model=str(raw["model"]),
                heartbeat_steps=max(int(raw["heartbeat_steps"]), 1),
                logging_steps=max(int(raw["logging_steps"]), 1),
                started=float(raw["started"]),
                raw=raw,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError.of(
                "file", str(path), rule=f"a field is missing or of another kind: {error!r}",
                fix="Restore it from a copy; a resumed run writes it anew",
            ) from error  # fmt: skip
