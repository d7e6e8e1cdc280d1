"""Folders that appear whole or not at all.

    .tmp-<name>-<pid>/   write the files, flush each
                         write MANIFEST.json last, flush it
    rename to <name>     one step; flush the parent
    remove the old one

When `<name>` exists already, the rename is an exchange of the two names (`renameat2`, Linux), so that at every moment
one complete version stands under `<name>`. Where the file system has no exchange, the old version is renamed to
`.old-<name>-<pid>` first. A process killed between these two renames leaves no `<name>`; therefore readers ask
`standing(path)` (`read_manifest` and `verify` do), which then answers with the set-aside version, and the next save or
`sweep` puts it back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srde.artifacts import disk
from srde.artifacts.leftovers import aside_name, being_written, sweep, temporary_name
from srde.artifacts.manifest import MANIFEST_NAME, read_manifest, write_manifest
from srde.errors import ArtifactError, UsageError


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    *,
    expected_bytes: int | None = None,
) -> Iterator[Path]:
    """Yields an empty folder to write into; on leaving, it becomes `path`, complete and with its manifest.

    When the body raises, nothing of it remains and the old version, if any, stands untouched.

    Args:
        path: The final name. A folder of the same kind that srde wrote before is replaced whole; parents are made.
        metadata: JSON values for the manifest; `kind` says what the folder is.
        expected_bytes: About how many bytes will be written, if known; a disk too full for them is then told before
            anything is written.

    Raises:
        UsageError: `path` holds something that srde did not write, or this process is writing it already.
        ArtifactError: The disk is full (the message has the path, the bytes needed and the bytes free), or the body
            left something other than plain files.
    """
    final = Path(os.path.realpath(path))
    require_replaceable(final, (metadata or {}).get("kind"))
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(final)
    if temporary in being_written:
        raise UsageError.of(
            "path",
            str(final),
            rule="this process is writing the folder already",
            fix="Finish the first save before the next",
        )
    sweep(final.parent, name=final.name)
    if expected_bytes is not None and expected_bytes > _free_bytes(final):
        raise disk_full(final, expected_bytes)
    being_written.add(temporary)
    try:
        temporary.mkdir()
        yield temporary
        write_manifest(temporary, metadata)
        _put_in_place(temporary, final)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if disk.means_disk_full(error):
            raise disk_full(final, expected_bytes) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        being_written.discard(temporary)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Renames; afterwards the old version, if there was one, has the temporary name."""
    if not final.exists():
        os.rename(temporary, final)
    elif not disk.exchange(temporary, final):
        aside = aside_name(final)
        os.rename(final, aside)
        os.rename(temporary, final)
        os.rename(aside, temporary)
    disk.flush(final.parent)


def require_replaceable(path: str | os.PathLike[str], kind: str | None = None) -> None:
    """Refuses to remove what srde did not write: no folder goes with somebody's own files in it; nor one of another kind.

    Args:
        path: What would be replaced.
        kind: What it would be replaced by, as the manifest's metadata say; None where they do not.

    Raises:
        UsageError: It must not be replaced.
    """
    final = Path(os.path.realpath(path))
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    fix = "Name another folder, or remove this one yourself"
    if not (final / MANIFEST_NAME).is_file():
        raise UsageError.of("path", str(final), rule="it exists and srde did not write it", fix=fix)
    try:
        manifest = read_manifest(final)
    except ArtifactError:
        return  # a damaged folder of ours: a new save is how it is mended
    listed = {entry.file for entry in manifest.files}
    found = {file.relative_to(final).as_posix() for file in final.rglob("*") if not file.is_dir()}
    if foreign := sorted(found - listed - {MANIFEST_NAME}):
        rule = f"replacing it would remove files that srde did not write: {', '.join(foreign[:3])}"
        raise UsageError.of("path", str(final), rule=rule, fix=fix)
    there = manifest.metadata.get("kind")
    if kind is not None and there is not None and there != kind:
        rule = f"it is of kind {there}, and would be replaced by one of kind {kind}"
        raise UsageError.of("path", str(final), rule=rule, fix=fix)


def _free_bytes(final: Path) -> int:
    return shutil.disk_usage(final.parent).free


def disk_full(final: Path, expected_bytes: int | None = None) -> ArtifactError:
    """The error for a path that there is no room for, with the bytes that are needed and free."""
    free = _free_bytes(final)
    needed = (
        f"{expected_bytes:,}"
        if expected_bytes is not None and expected_bytes > free
        else f"more than {free:,}"
    )
    rule = f"the disk is too full: {needed} bytes are needed and {free:,} are free"
    return ArtifactError(f"path={str(final)!r}: {rule}. Free some space or name another disk.")
