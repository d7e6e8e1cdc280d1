"""The tensors of a SaRDinE folder: which they are, and whether they are what its configuration tells of."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

from srde.core.delta import count_rewritten
from srde.core.layout import MlpLayout
from srde.errors import ArtifactError
from srde.hub.configuration_sardine import SaRDinEConfig

ADAPTER = "default"


def is_expert(name: str) -> bool:
    """Whether a tensor of the model is an expert's or a router's, by its name."""
    return ".srde_experts." in name or ".srde_router." in name


def require_complete(missing: list[str], extra: list[str]) -> None:
    """Refuses files that lack tensors, or hold unknown ones.

    Raises:
        ArtifactError: They do.
    """
    for kind, names in (("missing", missing), ("unknown", extra)):
        if names:
            raise ArtifactError.of(
                f"{kind} tensors", names[:3], rule=f"the files must hold exactly the model's; {len(names)} are {kind}",
                fix="export the model again, or download it again",
            )  # fmt: skip


def require_fitting(
    config: SaRDinEConfig, sites: Mapping[str, MlpLayout], tensors: Mapping[str, Tensor]
) -> None:
    """Compares names, shapes and kinds of tensors with what the configuration tells, before any is made.

    Raises:
        ArtifactError: One differs.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    experts = config.num_experts + config.num_shared_experts
    for name, layout in sites.items():
        if config.granularity == "neuron":
            count = count_rewritten(config.sparsity, layout.intermediate_size)
            values = (layout.num_matrices, experts, count, layout.hidden_size)
            index: tuple[int, ...] = (experts, count)
        else:
            count = count_rewritten(config.sparsity, layout.intermediate_size * layout.hidden_size)
            values = index = (layout.num_matrices, experts, count)
        own = f"base.{name}.{layout.ups[0]}" if layout.loose else f"base.{name}"
        shapes[f"{own}.srde_experts.{ADAPTER}.values"] = values
        shapes[f"{own}.srde_experts.{ADAPTER}.index"] = index
        slots = config.num_experts + config.null_expert
        shapes[f"{own}.srde_router.{ADAPTER}.weight"] = (slots, layout.hidden_size)
    require_complete(sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys()))
    for name, shape in shapes.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.is_floating_point() == name.endswith(".index"):
            raise ArtifactError.of(
                f"shape of {name}", f"{tuple(found.shape)} {found.dtype}", rule=f"the configuration says {shape}",
                fix="export the model again, or download it again",
            )  # fmt: skip


def weight_files(name: Any, variant: str | None, hub: dict[str, Any]) -> list[str]:
    """The files of tensors of a folder or repository, by name.

    Args:
        name: The folder, or the hub id.
        variant: As in Transformers' `from_pretrained`.
        hub: Options for the hub, such as `revision`.

    Raises:
        ArtifactError: The index cannot be read, or names files elsewhere.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": True}
    middle = f".{variant}" if variant else ""
    index = cached_file(name, f"model.safetensors.index{middle}.json", **hub, **optional)
    if index is None:
        return [f"model{middle}.safetensors"]
    try:
        found = json.loads(pathlib.Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({*found})
        outside = [
            file for file in files if pathlib.Path(file).name != file or not file.endswith(".safetensors")
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError.of(
            "index", str(index), rule=f"it must map names of tensors to files ({type(error).__name__})",
            fix="export the model again, or download it again",
        ) from error  # fmt: skip
    if outside:
        raise ArtifactError.of(
            "weight_map", outside[0], rule="it names safetensors files of the same folder, and nothing else",
            fix="export the model again, or download it again",
        )  # fmt: skip
    return files


def read_tensors(name: Any, files: list[str], hub: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of these files of a folder or repository.

    Raises:
        ArtifactError: A file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        place = cached_file(name, file, **hub)
        try:
            tensors |= load_file(place)
        except SafetensorError as error:
            raise ArtifactError.of(
                "file",
                str(place),
                rule=f"it is damaged ({error})",
                fix="export the model again, or download it again",
            ) from error
    return tensors
