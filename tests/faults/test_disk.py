"""F9: the disk is full while a run saves. What was saved stands, the message has path and bytes, and the same command goes on."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from rig import hook
from runs import SIMPLE

from srde.artifacts import verify
from srde.train.checkpoint import checkpoints, choose_checkpoint

pytestmark = pytest.mark.faults

RUNNER = "srde.train.runner:RunTrainer"
LARGE = "64m"


@pytest.fixture
def disk(tmp_path):
    """A file system of its own in memory; `size` makes it as large as is said."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={LARGE}", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs: F9 on a real full disk is NOT tested")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def full_at(step, free, place):
    """Leaves so many bytes free when the checkpoint of a step has begun: after the first look at the disk's size."""
    room = f"os.statvfs({str(place)!r}).f_bavail * 4096 - {free}"
    ballast = f"os.posix_fallocate(os.open({str(place / 'ballast')!r}, os.O_CREAT | os.O_WRONLY), 0, {room})"
    return hook(f"{RUNNER}._write_checkpoint", f"if args[0].state.global_step == {step}: {ballast}")


@pytest.mark.parametrize(
    "room",
    [(40_000,), pytest.param((0, 4096, 12_288, 20_480, 30_720, 61_440, 90_112), marks=pytest.mark.slow)],
    ids=["one", "many"],
)
def test_a_disk_that_fills_up_in_a_save_loses_nothing(lab, disk, room):
    out = disk / "out"
    for free in room:
        job = lab.run(out, settings=SIMPLE, before=full_at(4, free, disk))
        assert job.code == 1, (free, job.text()[-3000:])
        last = job.last_line()
        assert last.startswith("srde train: path=") and str(out / "checkpoint-4") in last, (
            free,
            job.text()[-3000:],
        )
        assert re.search(r"the disk is too full: [\d,]+ bytes are needed and [\d,]+ are free", last)
        assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
        assert choose_checkpoint(out, "auto") == verify(out / "checkpoint-2").folder
        assert not list(out.glob(".tmp-*"))
        (disk / "ballast").unlink()
    lab.same(out, settings=SIMPLE, steps=6)


@pytest.mark.slow
def test_a_disk_that_is_too_small_from_the_start(lab, disk, tmp_path):
    """Full at other moments: heartbeats, metrics, the first save, the adapter at the end."""
    lab.uninterrupted(settings=SIMPLE, steps=6)
    failed = []
    for size in ("8k", "24k", "1100k", "1300k"):
        out = disk / "out"
        subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
        job = lab.run(out, settings=SIMPLE)
        if job.code:
            failed.append(size)
            assert job.code == 1 and "the disk is too full" in job.last_line(), (size, job.text()[-3000:])
            assert str(disk) in job.last_line()
            for path in checkpoints(out):
                verify(path)
            subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(disk)], check=True)
            lab.same(out, settings=SIMPLE, steps=6)
            shutil.rmtree(out)
    assert len(failed) >= 2, failed
