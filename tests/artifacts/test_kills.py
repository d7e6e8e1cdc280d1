"""F1 of the fault table, for a folder: a process killed at any step of a save leaves the old version or the new one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KILLER = Path(__file__).with_name("killer.py")


@pytest.mark.faults
@pytest.mark.parametrize("way", ["exchange", pytest.param("fallback", marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", ["fresh", "replace"])
def test_killed_at_every_step_of_a_save(tmp_path, start, way):
    done = subprocess.run(
        [sys.executable, str(KILLER), str(tmp_path), start, way],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["bad"] == []
    assert report["steps"] > 40
    before = "absent" if start == "fresh" else "old"
    assert set(report["outcomes"]) == {before, "new"}
    turns = [
        one for one, other in zip(report["outcomes"], report["outcomes"][1:], strict=False) if one != other
    ]
    assert turns == [before]  # once new, never old again


SAVE = """
import sys, pathlib
sys.path.insert(0, {here!r})
from killer import NEW, save
print("start", file=sys.stderr, flush=True)
save(pathlib.Path(sys.argv[1]), NEW)
"""
CALLS = "mkdir,openat,write,fsync,rename,renameat2,unlink,unlinkat,rmdir,close"


@pytest.mark.faults
@pytest.mark.slow
def test_killed_at_every_system_call(tmp_path):
    """The same with the kernel's own calls: strace delivers SIGKILL as the n-th of them is entered."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: the system-call kills of F1 are NOT tested")
    sys.path.insert(0, str(KILLER.parent))
    from killer import OLD, save, version

    program = SAVE.format(here=str(KILLER.parent))

    def traced(target: Path, *options: str) -> subprocess.CompletedProcess[str]:
        log = tmp_path / "strace.log"
        command = [
            "strace",
            "-f",
            "-o",
            str(log),
            "-e",
            f"trace={CALLS}",
            *options,
            sys.executable,
            "-c",
            program,
            str(target),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    first = tmp_path / "first" / "adapter"
    save(first, OLD)
    assert traced(first).returncode == 0
    lines = (tmp_path / "strace.log").read_text().splitlines()
    begin = next(n for n, line in enumerate(lines) if '"start' in line)
    names = [name for line in lines[begin + 1 :] for name in CALLS.split(",") if f" {name}(" in line]
    earlier = {name: sum(f" {name}(" in line for line in lines[: begin + 1]) for name in CALLS.split(",")}
    assert {"mkdir", "openat", "write", "fsync", "renameat2"} <= set(names)

    outcomes, kills = set(), 0
    for name in sorted(set(names)):
        for nth in range(1, names.count(name) + 1):
            target = tmp_path / f"{name}-{nth}" / "adapter"
            save(target, OLD)
            kills += (
                traced(target, "-e", f"inject={name}:signal=SIGKILL:when={earlier[name] + nth}").returncode
                == -9
            )
            outcomes.add(version(target))  # verifies every byte
    assert outcomes == {"old", "new"}
    assert kills > 30
