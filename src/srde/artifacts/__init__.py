"""The one way to write and verify folders.

Whatever srde saves (adapters, checkpoints, data, traces) is a folder that appears under its final name in one
step and carries a `MANIFEST.json` with the size and the sha256 of every file in it:

    with atomic_folder("out/adapter", metadata={"kind": "adapter"}) as folder:
        save_file(tensors, folder / "adapter_model.safetensors")

    manifest = verify("out/adapter")        # ArtifactError, naming the file, when a bit is off
    load_file(manifest.folder / "adapter_model.safetensors")

Covered: a process killed at any moment, an exception or a full disk while writing, truncated, altered and missing
files, names that lead out of the folder. Not covered: power loss on hardware that lies about fsync, network file
systems, several machines (or several process-id namespaces) writing into one folder at once.
"""

from srde.artifacts.folder import atomic_folder, require_replaceable
from srde.artifacts.leftovers import standing, sweep
from srde.artifacts.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    read_manifest,
    verify,
    write_manifest,
)

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "FileEntry",
    "Manifest",
    "atomic_folder",
    "read_manifest",
    "require_replaceable",
    "standing",
    "sweep",
    "verify",
    "write_manifest",
]
