"""The hidden folder in which a build keeps what is done: chunks, the evaluation index, the plan.

.build/plan.json                        what is being built; see `srde.data.build.plan`
.build/state.json                       the same with paths, for `srde data merge`
.build/raw/<source>/<split>/<chunk>/    records from the hub, as they came
.build/evaluation/...                   passages of evaluation rows, by chunk
.build/index/                           all of them, to be looked up
.build/rows/<source>/<split>/<chunk>/   rows that are fit to be chosen
.build/shard.json                       written when one machine's part is complete
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from srde.artifacts import MANIFEST_NAME, sweep, verify
from srde.errors import ArtifactError, UsageError

FOLDER = ".build"
_PATIENCE = 3.0  # seconds


class Stage:
    """Finds and places the parts of a build.

    Args:
        work_dir: The build's own folder.
        parts: Work folders of other machines, whose chunks are used as they are.
    """

    def __init__(self, work_dir: Path, parts: Sequence[Path] = ()) -> None:
        self.work_dir = work_dir
        self.own = work_dir / FOLDER
        self._roots = [self.own, *(part / FOLDER for part in parts)]

    def find(self, *names: str) -> Path | None:
        """A finished folder, wherever it is."""
        for root in self._roots:
            if (root.joinpath(*names) / MANIFEST_NAME).is_file():
                return root.joinpath(*names)
        return None

    def place(self, *names: str) -> Path:
        """Where this build writes it."""
        return self.own.joinpath(*names)

    def sweep(self) -> list[Path]:
        """Removes what killed processes left half written, and finished folders that are damaged; returns the latter."""
        damaged = []
        for folder, names, files in os.walk(self.own):
            if any(name.startswith((".tmp-", ".old-")) for name in names):
                sweep(folder)
            if MANIFEST_NAME in files:
                try:
                    verify(folder)
                except ArtifactError:
                    damaged.append(Path(folder))
        for path in damaged:
            shutil.rmtree(path)
        sweep(self.work_dir)
        self.sweep_files()
        return damaged

    def sweep_files(self) -> None:
        """Removes files of the result that were being written."""
        for path in self.work_dir.glob(".tmp-*"):
            if path.is_file():
                path.unlink()

    def clear(self) -> None:
        """Removes all but the plan: the result is complete."""
        for entry in self.own.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in ("plan.json", "lock"):
                entry.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other builds out of the folder; the system opens the lock when the process dies.

        Raises:
            UsageError: Another process is building here.
        """
        self.own.mkdir(parents=True, exist_ok=True)
        with open(self.own / "lock", "a+", encoding="utf-8") as stream:
            try:
                _lock(stream)
            except BlockingIOError as error:
                stream.seek(0)
                raise UsageError.of(
                    "work_dir",
                    str(self.work_dir),
                    rule=f"another build is at work there ({stream.read().strip() or 'unknown process'})",
                    fix="wait for it, or name another --work_dir",
                ) from error
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
            yield


def _lock(stream: TextIO) -> None:
    """Takes the lock. The processes of a build that was killed hold it until they notice, so it is asked for a while."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def chunk_name(number: int) -> str:
    """The folder of a chunk."""
    return f"{number:06d}"
