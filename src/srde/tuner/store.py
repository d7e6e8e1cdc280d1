"""What an adapter folder must hold before a single tensor is taken over, and how one is saved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from srde.artifacts import MANIFEST_NAME, atomic_folder, read_manifest, sweep, verify, write_manifest
from srde.errors import ArtifactError, UsageError
from srde.tuner.control import no_adapter

if TYPE_CHECKING:
    from peft import PeftModel

EXPORTED = ("sardine", "merged")
NEXT, SEAL = ".adapter-next", "seal.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_adapter(
    model: PeftModel,
    folder: str | os.PathLike[str],
    adapter: str = "default",
    *,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Saves one adapter into a folder that may hold other things too (checkpoints, metrics), so that a kill at any moment
    leaves the old adapter or the new one.

    `model.save_pretrained(folder)` also works; killed half-way over an older adapter, it leaves a folder that is refused.

    Args:
        model: The model.
        folder: Where to.
        adapter: The adapter's name.
        tensors: The model's tensors by name, where the model itself holds only a part of each (FSDP, ZeRO-3).

    Raises:
        ArtifactError: The disk is full; the old adapter stands.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    roll_forward(folder)
    with atomic_folder(folder / NEXT, {"kind": "adapter"}) as staged:
        model.save_pretrained(str(staged), selected_adapters=[adapter], state_dict=tensors)
        nested = staged / adapter
        if nested.is_dir():  # PEFT puts every adapter but "default" one folder deeper
            for file in nested.iterdir():
                file.rename(staged / file.name)
            nested.rmdir()
        write_manifest(staged, {"kind": "adapter"}, only=ADAPTER_FILES)
        (staged / MANIFEST_NAME).rename(staged / SEAL)
    roll_forward(folder)


def roll_forward(folder: str | os.PathLike[str]) -> None:
    """Finishes a save that was killed after the new adapter was complete and before it had moved into place."""
    staged = Path(folder) / NEXT
    sweep(folder, name=NEXT)
    if not staged.is_dir():
        return
    files = sorted(
        staged.iterdir(), key=lambda file: file.name == SEAL
    )  # the seal last: until then readers come here
    for file in files:
        if file.name != MANIFEST_NAME:
            with suppress(FileNotFoundError):  # another process is at the same work
                file.replace(staged.parent / (MANIFEST_NAME if file.name == SEAL else file.name))
    shutil.rmtree(staged, ignore_errors=True)


def seal_adapter(folder: str | os.PathLike[str]) -> None:
    """Writes the manifest of the adapter's two files; called when the last of them is written.

    Raises:
        UsageError: There is a pickle beside them: loaders would not know which of the two tensor files is meant.
    """
    if (pickled := Path(folder) / "adapter_model.bin").is_file():
        raise UsageError.of(
            "adapter file", str(pickled), rule="srde adapters hold no pickle",
            fix="save with safe_serialization=True, and remove this file",
        )  # fmt: skip
    if all((Path(folder) / name).is_file() for name in ADAPTER_FILES):
        write_manifest(folder, {"kind": "adapter"}, only=ADAPTER_FILES)


def unseal_adapter(folder: str | os.PathLike[str]) -> None:
    """Removes the manifest, before a file that it lists is written anew by somebody who will not seal the folder."""
    (Path(folder) / MANIFEST_NAME).unlink(missing_ok=True)


def check_adapter(folder: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Checks a local adapter folder against its manifest, if it has one; hub downloads are checked by the hub's client.

    Raises:
        ArtifactError: A file is missing, truncated or altered since it was saved.
    """
    place = Path(folder) / (subfolder or "")
    roll_forward(place)
    if (place / MANIFEST_NAME).is_file():
        kind = read_manifest(place).metadata.get("kind")
        if kind in EXPORTED:
            raise ArtifactError.of(
                "adapter", str(folder), rule=f"it is a {kind} model that srde export wrote, not an adapter",
                fix="name the adapter that it was made from",
            )  # fmt: skip
        verify(place, only=ADAPTER_FILES)


def resize_adapter(model: nn.Module, sparsity: float, adapter: str = "default") -> None:
    """Gives an adapter's deltas the shapes of a sparsity, zero and without masks, to load saved ones into.

    Raises:
        UsageError: The model has no such adapter.
    """
    layers = [layer for layer in model.srde.layers.values() if adapter in layer.srde_experts]
    if not layers:
        raise no_adapter(model.srde.layers.values(), adapter)
    model.peft_config[adapter].sparsity = sparsity
    for layer in layers:
        layer.srde_experts[adapter].resize(sparsity)


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compares the names and shapes in a file with those the model has room for.

    Raises:
        ArtifactError: A tensor is missing, unknown, or of another shape; nothing has been loaded then.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    rule = "the file must hold exactly the adapter's tensors"
    for kind, names in (("missing", missing), ("unknown", extra)):
        if names:
            raise ArtifactError.of(
                f"{kind} tensors", names[:3], rule=f"{rule}, and {len(names)} {_are(names)} {kind}",
                fix="load the adapter with the configuration and the base model that it was saved with",
            )  # fmt: skip
    for name, want in expected.items():
        if tuple(found[name].shape) != tuple(want.shape):
            raise ArtifactError.of(
                f"shape of {name}", tuple(found[name].shape), rule=f"this model and configuration need {tuple(want.shape)}",
                fix="load the adapter on the base model that it was made for",
            )  # fmt: skip


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
