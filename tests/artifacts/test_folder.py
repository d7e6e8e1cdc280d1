"""`atomic_folder`: whole or not at all, and never at the cost of what was there."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest

from srde.artifacts import MANIFEST_NAME, atomic_folder, disk, read_manifest, standing, sweep, verify
from srde.errors import ArtifactError, UsageError


def write(path, text="one", **options):
    with atomic_folder(path, **options) as folder:
        (folder / "a.txt").write_text(text)
    return path


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture
def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture(params=["exchange", "fallback"])
def way(request, monkeypatch):
    if request.param == "fallback":
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    return request.param


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "adapter"
    with atomic_folder(path, {"kind": "adapter"}) as folder:
        assert not path.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(b"\0\1")
        (folder / "a.txt").write_text("one")
    assert names(path.parent) == ["adapter"]
    manifest = verify(path)
    assert [entry.file for entry in manifest.files] == ["a.txt", "sub/b.bin"]
    assert manifest.metadata == {"kind": "adapter"}
    assert manifest.total_bytes == 5


def test_a_folder_is_replaced_whole(tmp_path, way):
    path = write(tmp_path / "adapter", "one")
    with atomic_folder(path) as folder:
        (folder / "b.txt").write_text("two")
    assert names(tmp_path) == ["adapter"]
    assert [entry.file for entry in verify(path).files] == ["b.txt"]


def test_there_is_no_moment_without_a_version(tmp_path):
    path = write(tmp_path / "adapter", "0")
    stop, failures, seen = threading.Event(), [], set()

    def read():
        while not stop.is_set():
            try:
                seen.add((path / "a.txt").read_text())
            except OSError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 60):
        write(path, str(number))
    stop.set()
    reader.join()
    assert failures == []
    assert len(seen) > 1


def test_a_body_that_raises_leaves_the_old_version(tmp_path):
    path = write(tmp_path / "adapter", "one")
    for error in (RuntimeError("boom"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_folder(path) as folder:
            (folder / "a.txt").write_text("two")
            raise error
        assert names(tmp_path) == ["adapter"]
        assert (verify(path).folder / "a.txt").read_text() == "one"


def test_an_empty_folder_may_be_taken(tmp_path):
    (tmp_path / "out").mkdir()
    verify(write(tmp_path / "out"))
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write(tmp_path / "disk" / "real")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    write(tmp_path / "out", "two")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / "a.txt").read_text() == "two"
    assert names(tmp_path / "disk") == ["real"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(
            UsageError, match=f"path='.*{name}': it exists and srde did not write it. Name another folder"
        ):
            write(tmp_path / name)
    path = write(tmp_path / "adapter")
    (path / "notes.md").write_text("mine")
    with pytest.raises(
        UsageError, match=r"would remove files that srde did not write: notes.md. Name another folder"
    ):
        write(path, "two")
    assert (path / "notes.md").read_text() == "mine"
    assert names(tmp_path) == ["adapter", "file", "thesis"]


def test_a_damaged_folder_is_mended_by_a_new_save(tmp_path):
    path = write(tmp_path / "adapter")
    (path / MANIFEST_NAME).write_text("{")
    verify(write(path, "two"))


def test_two_saves_of_one_folder_at_once_are_refused(tmp_path):
    path = tmp_path / "adapter"
    with atomic_folder(path) as folder:
        (folder / "a.txt").write_text("outer")
        with pytest.raises(UsageError, match="this process is writing the folder already"):
            write(path, "inner")
        assert sweep(tmp_path) == []
    assert (verify(path).folder / "a.txt").read_text() == "outer"


def test_leftovers_of_dead_processes_go(tmp_path, dead_pid):
    mine, alive = os.getpid(), os.getppid()
    for name in (
        f".tmp-a-{dead_pid}",
        f".tmp-a-b-{dead_pid}",
        f".tmp-a-{mine}",
        f".tmp-a-{alive}",
        ".tmp-a",
        ".old-a-x",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    write(tmp_path / "a")
    assert names(tmp_path) == sorted(["a", f".tmp-a-b-{dead_pid}", f".tmp-a-{alive}", ".tmp-a", ".old-a-x"])
    assert sweep(tmp_path) == [tmp_path / f".tmp-a-b-{dead_pid}"]
    assert sweep(tmp_path / "nowhere") == []


def test_a_version_set_aside_is_read_and_put_back(tmp_path, dead_pid):
    path = write(tmp_path / "adapter")
    aside = tmp_path / f".old-adapter-{dead_pid}"
    path.rename(aside)  # as a writer killed between the two renames leaves it
    (tmp_path / f".tmp-adapter-{dead_pid}").mkdir()
    assert standing(path) == aside
    assert verify(path).folder == aside
    assert len(sweep(tmp_path)) == 2
    assert names(tmp_path) == ["adapter"]
    assert verify(path).folder == path
    path.rename(aside)
    write(path, "two")
    assert names(tmp_path) == ["adapter"]


def test_a_full_disk_is_told_before_writing(tmp_path):
    path = write(tmp_path / "adapter")
    with pytest.raises(
        ArtifactError, match=r"adapter': the disk is too full: 1,152,921,504,606,846,976 bytes are needed and"
    ):
        write(path, "two", expected_bytes=2**60)
    assert (verify(path).folder / "a.txt").read_text() == "one"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_leaves_the_old_version(tmp_path, error):
    path = write(tmp_path / "adapter")
    with pytest.raises(
        ArtifactError, match=r"more than ([\d,]+) bytes are needed and \1 are free. Free some"
    ) as caught:
        with atomic_folder(path, expected_bytes=10) as folder:
            (folder / "a.txt").write_text("two")
            raise error
    assert str(path) in str(caught.value)
    assert caught.value.__cause__ is error
    assert names(tmp_path) == ["adapter"]
    assert (verify(path).folder / "a.txt").read_text() == "one"


@pytest.mark.faults
def test_a_really_full_disk(tmp_path):
    """F9: a tmpfs of 1 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("no right to mount a tmpfs: F9 on a real full disk is NOT tested")
    try:
        path = tmp_path / "adapter"
        with atomic_folder(path) as folder:
            (folder / "a.bin").write_bytes(b"1" * 400_000)
        for expected in (None, 500_000, 2_000_000):
            with pytest.raises(ArtifactError, match=r"bytes are needed and \d{3},\d{3} are free"):
                with atomic_folder(path, expected_bytes=expected) as folder:
                    (folder / "a.bin").write_bytes(b"2" * 2_000_000)
            assert names(tmp_path) == ["adapter"]
            assert verify(path).total_bytes == 400_000
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "adapter"):
        raise PermissionError(errno.EACCES, "no")


def test_exchange_says_where_there_is_none(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (other / "inside").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        disk.exchange(one, tmp_path / "nowhere")
    assert disk.exchange(one, other / "inside") in (True, False)
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *_, **__: object())
    assert not disk.exchange(one, other)


def test_who_is_alive(dead_pid):
    assert disk.is_alive(os.getpid())
    assert disk.is_alive(1)
    assert not disk.is_alive(dead_pid)


def test_the_manifest_of_a_folder_is_readable_without_its_files(tmp_path):
    path = write(tmp_path / "adapter", metadata={"step": 3})
    Path(path, "a.txt").unlink()
    assert read_manifest(path).metadata == {"step": 3}


def test_a_folder_of_another_kind_is_not_replaced(tmp_path):
    with atomic_folder(tmp_path / "a", {"kind": "adapter"}) as folder:
        (folder / "weights").write_text("mine")
    for kind, refused in (("merged", True), ("adapter", False), (None, False)):
        metadata = {} if kind is None else {"kind": kind}
        if refused:
            with pytest.raises(
                UsageError, match="it is of kind adapter, and would be replaced by one of kind merged"
            ):
                with atomic_folder(tmp_path / "a", metadata) as folder:
                    (folder / "x").write_text("x")
            assert (tmp_path / "a/weights").read_text() == "mine"
        else:
            with atomic_folder(tmp_path / "a", metadata) as folder:
                (folder / "weights").write_text("mine")
