"""The folders that a run has saved, and whether they are still what was written."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from srde.artifacts import MANIFEST_NAME, read_manifest, verify
from srde.errors import ArtifactError

_NAME = re.compile(r"checkpoint-(?P<step>\d{1,15}|best)")
ADAPTER = "adapter"
"""The name that the final adapter has here; it lies in the run's folder itself."""

_State = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Checkpoint:
    """A saved folder.

    Attributes:
        name: `checkpoint-<step>`, `checkpoint-best`, or `adapter` for the final one in the run's folder.
        step: The step it was saved at, where its name has one.
        bytes: The size of its files.
        verified: Whether every file is as the manifest says; None as long as nobody has looked.
        problem: What `srde.artifacts.verify` found, else empty.
    """

    name: str
    step: int | None
    bytes: int
    verified: bool | None
    problem: str = ""


class Checkpoints:
    """Looks for a run's checkpoints and hashes each only once, until one of its files has another size or date.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[_State, Checkpoint]] = {}

    def look(self, verify_seconds: float = math.inf) -> tuple[Checkpoint, ...]:
        """All checkpoints by step, then the best, then the final adapter.

        Args:
            verify_seconds: Verifies, newest first, until so much time has gone; what is left then has `verified=None` and is
                verified by later calls. 0 verifies nothing.
        """
        until = time.monotonic() + verify_seconds
        found = []
        for name, step, place in sorted(self._places(), key=lambda one: one[1] or math.inf, reverse=True):
            try:
                state = _state(place, name)
            except FileNotFoundError:
                continue  # removed while we look, as trainers do with old ones
            known = self._known.get(name)
            if known is not None and known[0] == state:
                found.append(known[1])
                continue
            size = sum(size for _, size, _ in state)
            if verify_seconds <= 0 or time.monotonic() > until:
                found.append(Checkpoint(name, step, size, None))
                continue
            problem = _problem(place)
            try:
                if _state(place, name) != state:  # replaced meanwhile: what was found means neither
                    found.append(Checkpoint(name, step, size, None))
                    continue
            except FileNotFoundError:
                continue
            checkpoint = Checkpoint(name, step, size, not problem, problem)
            self._known[name] = (state, checkpoint)
            found.append(checkpoint)
        order = {"checkpoint-best": math.inf, ADAPTER: math.inf}
        return tuple(
            sorted(found, key=lambda one: (order.get(one.name, one.step), one.name != "checkpoint-best"))
        )

    def _places(self) -> Iterator[tuple[str, int | None, Path]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match and entry.is_dir():
                    step = None if match["step"] == "best" else int(match["step"])
                    yield entry.name, step, Path(entry.path)
                elif entry.name == MANIFEST_NAME:
                    yield ADAPTER, None, self.folder


def _problem(place: Path) -> str:
    try:
        verify(place)
    except ArtifactError as error:
        return str(error)
    return ""


def _state(place: Path, name: str) -> _State:
    """Names, sizes and dates of a checkpoint's files: when they are the same, so is what was found in them."""
    if name != ADAPTER:
        files = sorted(file for file in place.rglob("*") if file.is_file())
    else:
        files = [place / MANIFEST_NAME]
        with suppress(ArtifactError):  # verifying tells what is wrong with it
            files += [place / entry.file for entry in read_manifest(place).files]
        files = [file for file in files if file.is_file()]
    stats = [(file.relative_to(place).as_posix(), file.stat()) for file in files]
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
