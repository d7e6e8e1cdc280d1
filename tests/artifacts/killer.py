"""Kills a save at each of its steps in turn, and reports how the folder stands afterwards.

Run as a program: `killer.py FOLDER (fresh|replace) (exchange|fallback)`; prints one JSON object. Every step is run in a
forked child that SIGKILLs itself just before its n-th call of an operating-system function; the parent then looks at
the folder as a reader would, and as the next run would.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from srde.artifacts import atomic_folder, disk, folder, standing, sweep, verify

OLD = {"config.json": b"old", "data/weights.bin": b"o" * 5000}
NEW = {"config.json": b"new!", "data/weights.bin": b"n" * 9000, "README.md": b"# new"}
WATCHED = ("mkdir", "open", "close", "fsync", "rename", "unlink", "rmdir", "stat", "scandir")


def save(path: Path, files: dict[str, bytes]) -> None:
    with atomic_folder(path, {"files": len(files)}, expected_bytes=20_000) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            with open(temporary / name, "wb", buffering=0) as stream:
                for start in range(0, len(content), 4096):
                    stream.write(content[start : start + 4096])


def version(path: Path) -> str:
    if not standing(path).exists():
        return "absent"
    manifest = verify(path)
    found = {entry.file: (manifest.folder / entry.file).read_bytes() for entry in manifest.files}
    return {str(OLD): "old", str(NEW): "new"}[
        str({name: found[name] for name in (NEW if len(found) == 3 else OLD)})
    ]


def die_at(step: int) -> None:
    """Counts calls from now on; at the given one the process is gone."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in WATCHED:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = counted(builtins.open)
    disk.exchange = counted(disk.exchange)


def run_and_kill(path: Path, step: int) -> bool:
    """Whether the child was killed; `False` when it ended its save before that step."""
    child = os.fork()
    if child == 0:
        die_at(step)
        save(path, NEW)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def main(root: Path, start: str, way: str) -> dict[str, object]:
    if way == "fallback":
        disk.exchange = lambda one, other: False
    outcomes, bad, step = [], [], 0
    while True:
        step += 1
        parent = root / str(step)
        parent.mkdir()
        path = parent / "adapter"
        if start == "replace":
            save(path, OLD)
        killed = run_and_kill(path, step)
        seen = version(path)
        sweep(parent)
        if version(path) != seen or sorted(os.listdir(parent)) != (["adapter"] if seen != "absent" else []):
            bad.append([step, seen, os.listdir(parent)])
        save(path, NEW)
        if version(path) != "new" or os.listdir(parent) != ["adapter"]:
            bad.append([step, "save after the kill", os.listdir(parent)])
        outcomes.append(seen)
        shutil.rmtree(parent)
        if not killed:
            return {"steps": step, "outcomes": outcomes, "bad": bad, "module": folder.__name__}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])))
