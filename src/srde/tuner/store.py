"""What an adapter folder must hold, and what a base must be, before a single tensor is taken over."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from srde.artifacts import MANIFEST_NAME, verify, write_manifest
from srde.errors import ArtifactError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

SAMPLES = 16
TOLERANCE = 0.02  # a base in bf16 or fp16 is the same base: rounding moves a number by less than 1 %


def seal_adapter(folder: str | os.PathLike[str]) -> None:
    """Writes the manifest of the adapter's two files; called when the last of them is written."""
    if all((Path(folder) / name).is_file() for name in ADAPTER_FILES):
        write_manifest(folder, {"kind": "adapter"}, only=ADAPTER_FILES)


def check_adapter(folder: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Checks a local adapter folder against its manifest, if it has one; hub downloads are checked by the hub's client.

    Raises:
        ArtifactError: A file is missing, truncated or altered since it was saved.
    """
    place = Path(folder) / (subfolder or "")
    if (place / MANIFEST_NAME).is_file():
        verify(place, only=ADAPTER_FILES)


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


def fingerprint(model: nn.Module) -> list[float] | None:
    """A few of the base's numbers that every way of loading it leaves alone: embeddings and norms are never quantised.

    Returns:
        Numbers rounded to four significant digits; None where the weights are not there to read (meta, sharded).
    """
    tensors: list[Tensor] = []
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embeddings is not None and isinstance(getattr(embeddings, "weight", None), Tensor):
        tensors.append(embeddings.weight[:64])
    tensors += [p for n, p in model.named_parameters() if p.ndim == 1 and n.endswith("weight")][-2:]
    picked: list[float] = []
    for tensor in tensors:
        flat = tensor.detach().flatten()
        if tensor.is_meta or flat.numel() == 0 or not flat.is_floating_point():
            return None
        where = torch.linspace(0, flat.numel() - 1, SAMPLES, device=flat.device).long()
        picked += [float(f"{v:.4g}") for v in flat[where].float().tolist()]
    return picked or None


def check_base(saved: Sequence[float] | None, model: nn.Module, base_name: str | None) -> None:
    """Compares the base's numbers with those the adapter was trained on.

    Raises:
        ArtifactError: They differ by more than rounding.
    """
    present = fingerprint(model)
    if saved is None or present is None:
        return
    scale = max(max(map(abs, saved)), 1e-6)
    same = len(saved) == len(present) and all(
        abs(a - b) <= TOLERANCE * max(abs(a), 1e-2 * scale) for a, b in zip(saved, present, strict=True)
    )
    if not same:
        config = getattr(model, "config", None)
        raise ArtifactError.of(
            "base model", getattr(config, "_name_or_path", None) or type(model).__name__,
            rule=f"the adapter was trained on other weights ({base_name or 'base not named'})",
            fix="load that base; to use the adapter on a sibling on purpose, set base_fingerprint to null in "
            "adapter_config.json and remove MANIFEST.json",
        )  # fmt: skip


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
