"""Whether a base model is the one that an adapter was made for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srde.errors import ArtifactError

SAMPLES = 16
TOLERANCE = 0.02  # a base in bf16 or fp16 is the same base: rounding moves a number by less than 1 %


def fingerprint(model: nn.Module) -> list[float] | None:
    """A few of the base's numbers that every way of loading it leaves alone: embeddings and norms are never quantised.

    Returns:
        Numbers rounded to four significant digits; None where the weights are not there to read (meta, sharded).
    """
    tensors: list[Tensor] = []
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    embeddings = getattr(
        embeddings, "original_module", embeddings
    )  # under `modules_to_save`: not the trained copy
    if embeddings is not None and isinstance(getattr(embeddings, "weight", None), Tensor):
        tensors.append(embeddings.weight[:64])
    norms = [n for n, p in model.named_parameters() if p.ndim == 1 and n.endswith("weight")]
    tensors += [model.get_parameter(n) for n in norms if ".modules_to_save." not in n][-2:]
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
    if not same_base(saved, present):
        config = getattr(model, "config", None)
        raise ArtifactError.of(
            "base model", getattr(config, "_name_or_path", None) or type(model).__name__,
            rule=f"the adapter was trained on other weights ({base_name or 'base not named'})",
            fix="load that base; to use the adapter on a sibling on purpose, set base_fingerprint to null in "
            "adapter_config.json and remove MANIFEST.json",
        )  # fmt: skip


def same_base(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints differ by no more than rounding."""
    scale = max(max(map(abs, one)), 1e-6)
    return len(one) == len(other) and all(
        abs(a - b) <= TOLERANCE * max(abs(a), 1e-2 * scale) for a, b in zip(one, other, strict=True)
    )
