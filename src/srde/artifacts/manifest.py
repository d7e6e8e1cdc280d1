"""`MANIFEST.json`: what a folder holds, so that a reader can tell whether it holds it still.

    {
      "files": [{"bytes": 36, "file": "adapter_config.json", "sha256": "..."}],
      "format": "srde-folder",
      "format_version": 1,
      "metadata": {"base": "..."},
      "sha256": "..."
    }

The last `sha256` is that of the manifest itself (its JSON without that key, keys sorted, no spaces), so a changed
bit in the metadata is found as surely as one in a tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from srde.artifacts.disk import flush
from srde.artifacts.leftovers import standing
from srde.errors import ArtifactError

MANIFEST_NAME = "MANIFEST.json"
FORMAT = "srde-folder"
FORMAT_VERSION = 1

_LARGEST_MANIFEST = 16 * 2**20  # bytes; about a hundred thousand files
_RESTORE = "Restore the folder from a copy or write it again"


@dataclass(frozen=True)
class FileEntry:
    """One file of a folder: its name relative to the folder with `/` between parts, its size, its sha256 in hex."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A folder's manifest as read.

    Attributes:
        folder: Where the files are to be read. It is the path that was asked for, except after a writer died between
            the two renames of `atomic_folder`'s second way; then it is the set-aside old version.
        files: What the folder holds, sorted by name; `MANIFEST.json` itself is not in it.
        metadata: What the writer added; plain JSON values.
    """

    folder: Path
    files: tuple[FileEntry, ...]
    metadata: Mapping[str, Any]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together, without the manifest."""
        return sum(entry.bytes for entry in self.files)


def write_manifest(
    folder: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    *,
    only: Collection[str] | None = None,
) -> Manifest:
    """Flushes every file of a finished folder, then writes its manifest and flushes that.

    Args:
        folder: A folder that nobody writes to any more.
        metadata: JSON values to keep with it, such as the fingerprint of the base model.
        only: The files to list, where the folder also holds others that may change.

    Raises:
        ArtifactError: The folder holds a symbolic link or something else that is not a plain file, or lacks a file.
        TypeError, ValueError: The metadata is not JSON (NaN and infinities are not).
    """
    folder = Path(folder)
    files = []
    for path in _plain_files(folder) if only is None else [_require_plain(folder, name) for name in only]:
        flush(path)
        files.append(FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path)))
    files.sort(key=lambda entry: entry.file)
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "files": [asdict(entry) for entry in files],
        "metadata": dict(metadata or {}),
    }
    content["sha256"] = _digest(content)
    target = folder / MANIFEST_NAME
    with open(target, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    flush(folder)
    return Manifest(folder, tuple(files), content["metadata"])


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads and checks the manifest alone; the files that it lists are not opened.

    Raises:
        ArtifactError: There is no manifest, it is not whole, of a format version this srde does not know, or lists a
            name that leads out of the folder.
    """
    place = standing(folder)
    path = place / MANIFEST_NAME
    if not place.is_dir():
        raise ArtifactError.of("folder", str(folder), rule="there is no such folder", fix="Check the path")
    if not path.exists():
        rule = f"a complete folder holds a {MANIFEST_NAME}, and this one has none"
        raise ArtifactError.of("folder", str(folder), rule=rule, fix=_RESTORE)
    _require_plain(place, MANIFEST_NAME)
    content = _load(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError.of(
            f"{path}: format_version",
            version,
            rule=f"this srde reads version {FORMAT_VERSION}",
            fix="Use the srde release that wrote the folder, or write it again with this one",
        )
    found = content.pop("sha256", None)
    if found != (expected := _digest(content)):
        rule = f"the manifest's own content has sha256 {expected}"
        raise ArtifactError.of(f"{path}: sha256", found, rule=rule, fix=_RESTORE)
    files, metadata = content.get("files"), content.get("metadata")
    if not (isinstance(files, list) and all(map(_is_entry, files)) and isinstance(metadata, dict)):
        rule = "must hold a list `files` of {file, bytes, sha256} and an object `metadata`"
        raise ArtifactError.of("manifest", str(path), rule=rule, fix=_RESTORE)
    for entry in files:
        _require_inside(path, entry["file"])
    return Manifest(place, tuple(FileEntry(**entry) for entry in files), metadata)


def verify(folder: str | os.PathLike[str], *, only: Collection[str] | None = None) -> Manifest:
    """Checks every file that the manifest lists: first all sizes, then all hashes.

    Files that the manifest does not list are no concern of it: read only what it lists.

    Args:
        folder: The folder as it was written.
        only: Checks just those of the listed files that are named here.

    Returns:
        The manifest; read the files below its `folder`.

    Raises:
        ArtifactError: As `read_manifest`; or a file is missing, a symbolic link, or differs in size or sha256.
            The message has the file, what was expected and what was found.
    """
    manifest = read_manifest(folder)
    listed = {entry.file for entry in manifest.files}
    for name in sorted(set(only or ()) - listed):
        rule = f"{MANIFEST_NAME} does not list it, so it was not saved with the rest"
        raise ArtifactError.of("file", str(manifest.folder / name), rule=rule, fix=_RESTORE)
    entries = [entry for entry in manifest.files if only is None or entry.file in only]
    for entry in entries:
        path = _require_plain(manifest.folder, entry.file)
        if (size := path.stat().st_size) != entry.bytes:
            rule = f"{MANIFEST_NAME} expects {entry.bytes}"
            raise ArtifactError.of(f"{path}: bytes", size, rule=rule, fix=_RESTORE)
    for entry in entries:
        path = manifest.folder / entry.file
        if (found := _sha256(path)) != entry.sha256:
            rule = f"{MANIFEST_NAME} expects {entry.sha256}"
            raise ArtifactError.of(f"{path}: sha256", found, rule=rule, fix=_RESTORE)
    return manifest


def _load(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > _LARGEST_MANIFEST:
        raise ArtifactError.of(
            f"{path}: bytes", size, rule=f"a manifest has at most {_LARGEST_MANIFEST}", fix=_RESTORE
        )
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError.of(
            "manifest", str(path), rule=f"must be JSON in UTF-8: {error}", fix=_RESTORE
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError.of(
            "manifest", str(path), rule=f'must be an object with "format": "{FORMAT}"', fix=_RESTORE
        )
    return content


def _finite(number: str) -> float:
    if math.isinf(float(number)):
        raise ValueError(f"{number} is too large")
    return float(number)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_entry(entry: object) -> bool:
    kinds = {"file": str, "bytes": int, "sha256": str}
    return isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == kinds


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain_files(folder: Path) -> Iterator[Path]:
    """All files below a folder but its manifest; every folder on the way is flushed after its files' names."""
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ArtifactError.of(
                    "file",
                    str(path),
                    rule="a saved folder holds plain files only",
                    fix="Write a copy of the file itself",
                )
        yield from (Path(root, name) for name in names if Path(root, name) != folder / MANIFEST_NAME)
        flush(Path(root))


def _require_inside(manifest: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or "\\" in name or ":" in name or name.startswith("/") or ".." in parts:
        raise ArtifactError.of(
            f"{manifest}: file",
            name,
            rule="a listed name must stay inside the folder",
            fix="Do not use this folder",
        )


def _require_plain(folder: Path, name: str) -> Path:
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink() and not _is_hub_blob(folder, path):
            raise ArtifactError.of(
                "file",
                str(path),
                rule="a listed file must not be a symbolic link",
                fix="Copy the file itself here",
            )
    if not path.is_file():
        raise ArtifactError.of(
            "file", str(path), rule="the folder should hold it, and there is no such plain file", fix=_RESTORE
        )
    return path


def _is_hub_blob(folder: Path, link: Path) -> bool:
    """Whether a link is how the hub's cache lays out a download: `snapshots/<commit>/<file>` -> `blobs/<hash>`.

    The one kind of link that is followed; it leads nowhere but to the `blobs` of the same repository.
    """
    snapshots = folder.absolute().parent
    return snapshots.name == "snapshots" and link.resolve().parent == (snapshots.parent / "blobs").resolve()
