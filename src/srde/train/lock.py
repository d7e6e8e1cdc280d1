"""One run, one output folder: a lock that a dead process cannot keep.

`run.lock` is held by `lockf`, which the system takes back when the process ends, however it ends; so a lock file that a killed
run left behind stops nobody. Its content says who holds it.

Covered: processes of one machine, and of several where the file system has POSIX locks (NFS from version 4). Not covered:
file systems without locks; there, two runs in one folder are not noticed.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from srde.errors import UsageError

LOCK_FILE = "run.lock"

_held: set[Path] = set()
"""Folders that this process has locked: `lockf` never refuses a process its own lock."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds the folder's lock while the context is open.

    Raises:
        UsageError: Another run holds it; the message has its process and machine.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error
    path = (folder / LOCK_FILE).resolve()
    if path in _held:  # before the file is opened: closing it would give up the lock that this process has
        raise _refused(folder, f"this process ({os.getpid()} on {socket.gethostname()})")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise _refused(folder, _holder(descriptor)) from error
        os.truncate(descriptor, 0)
        content = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        os.write(descriptor, json.dumps(content).encode())
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(
                path
            )  # the file stays: who removes it could take it from a run that has just opened it
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError):  # it has just opened the file and not written yet
        return "another process"


def _unusable(folder: Path, error: OSError) -> UsageError:
    failure = UsageError.of(
        "output_dir",
        str(folder),
        rule=f"cannot be written to ({error.strerror})",
        fix="Name another --output_dir",
    )
    assert isinstance(failure, UsageError)
    return failure


def _refused(folder: Path, who: str) -> UsageError:
    error = UsageError.of(
        "output_dir", str(folder), rule=f"{who} is training into this folder",
        fix="Wait for it, stop it, or name another --output_dir",
    )  # fmt: skip
    assert isinstance(error, UsageError)
    return error
