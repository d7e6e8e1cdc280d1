"""What killed writers leave beside a folder, how a reader sees through it and who clears it away.

`.tmp-<name>-<pid>/` is a version in the making (or an old one about to go), `.old-<name>-<pid>/` an old version set
aside. The process id tells whose it is: when that process is dead, the folder is a leftover.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from srde.artifacts import disk

_NAME = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>.+)-(?P<pid>\d{1,9})")

being_written: set[Path] = set()
"""The temporary folders this process has open. After a restart in a container the same id may be ours again, so the
id alone does not make a folder ours."""


def temporary_name(final: Path) -> Path:
    """Where this process writes the next version of `final`."""
    return final.parent / f".tmp-{final.name}-{os.getpid()}"


def aside_name(final: Path) -> Path:
    """Where this process sets the old version of `final` aside."""
    return final.parent / f".old-{final.name}-{os.getpid()}"


def standing(path: str | os.PathLike[str]) -> Path:
    """Where the current version of a folder is to be read: at `path`, or where a killed writer set it aside."""
    path = Path(path)
    if path.exists():
        return path
    aside = [place for place, match in _find(path.parent, path.name) if match["kind"] == "old"]
    return aside[0] if aside else path


def sweep(parent: str | os.PathLike[str], *, name: str | None = None) -> list[Path]:
    """Removes what killed writers left in a folder, and puts back what they had set aside.

    Call it at the start of a run on folders whose content is srde's alone: whatever is named like a leftover and
    whose process is dead goes.

    Args:
        parent: The folder to look in; not searched deeper. One that does not exist has no leftovers.
        name: Only leftovers of this final name.

    Returns:
        The leftovers that are gone.
    """
    gone = []
    for place, match in _find(Path(parent), name):
        pid = int(match["pid"])
        if place in being_written or (pid != os.getpid() and disk.is_alive(pid)):
            continue
        final = place.parent / match["name"]
        if match["kind"] == "old" and not final.exists():
            os.rename(place, final)
            disk.flush(place.parent)
        else:
            shutil.rmtree(place, ignore_errors=True)  # another process may be sweeping too
        gone.append(place)
    return gone


def _find(parent: Path, name: str | None) -> list[tuple[Path, re.Match[str]]]:
    if not parent.is_dir():
        return []
    matches = ((place, _NAME.fullmatch(place.name)) for place in sorted(parent.iterdir()) if place.is_dir())
    return [(place, match) for place, match in matches if match and name in (None, match["name"])]
