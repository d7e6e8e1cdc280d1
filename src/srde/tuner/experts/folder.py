"""An adapter folder as configuration and tensors: read verified, written whole or not at all.

Letters: M matrices of an MLP, E experts (routed, then shared), R neurons rewritten per expert, N entries rewritten per matrix and
expert, D model width, S slots (routed experts, then the null slot).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from srde.artifacts import MANIFEST_NAME, atomic_folder, read_manifest, write_manifest
from srde.errors import ArtifactError, UsageError
from srde.tuner.config import SrdeConfig
from srde.tuner.store import ADAPTER_FILES, NEXT, SEAL, check_adapter, roll_forward

CONFIG_FILE, TENSORS_FILE = ADAPTER_FILES
VALUES, INDEX, WEIGHT = ".srde_experts.values", ".srde_experts.index", ".srde_router.weight"
NOT_CARRIED = (
    *ADAPTER_FILES, MANIFEST_NAME, "run.json", "run.lock", "metrics.jsonl", "events.jsonl", "heartbeat.json",
    "train_results.json", "eval_results.json", "bad_batches.jsonl", "trainer_state.json", "run_state.json",
    "run_state.safetensors", "optimizer.pt", "scheduler.pt",
)  # fmt: skip
"""Files that tell of the run that made an adapter, or of how it did: they are not true of what is made from it."""


@dataclass(frozen=True)
class LayerTensors:
    """The experts of one MLP.

    Attributes:
        values: [M, E, R, D], or [M, E, N] for single entries.
        index: [E, R], or [M, E, N].
        weight: The router's, [S, D].
    """

    values: Tensor
    index: Tensor
    weight: Tensor

    @property
    def by_neuron(self) -> bool:
        """Whether whole neurons are rewritten."""
        return self.values.ndim == 4

    @property
    def index_by_expert(self) -> Tensor:
        """`index` with the experts first: [E, 1, R], or [E, M, N]."""
        return self.index.unsqueeze(1) if self.by_neuron else self.index.transpose(0, 1)


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        folder: Where it was read.
        config: Its settings.
        layers: Its experts by the name of the MLP in the saved file.
        others: The tensors of `modules_to_save`.
    """

    folder: Path
    config: SrdeConfig
    layers: Mapping[str, LayerTensors]
    others: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in the file."""
        own = {
            layer + end: tensor
            for layer, one in self.layers.items()
            for end, tensor in ((VALUES, one.values), (INDEX, one.index), (WEIGHT, one.weight))
        }
        return {**self.others, **own}


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Reads a local adapter folder, once it has been checked against its manifest.

    Raises:
        ArtifactError: There is none, a file is damaged, it is no srde adapter, or its tensors are not those of its configuration.
    """
    from peft import PeftConfig

    from srde.tuner.register import register_srde

    register_srde()
    folder = Path(folder)
    check_adapter(folder)
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ArtifactError.of(
                "adapter", str(folder), rule=f"it must be a local folder with an {name}",
                fix="name the --output_dir of srde train",
            )  # fmt: skip
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / TENSORS_FILE)
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ArtifactError.of(
            "adapter", str(folder), rule=f"it cannot be read ({str(error).splitlines()[0][:200]})", fix="restore it from a copy"
        ) from error  # fmt: skip
    if not isinstance(config, SrdeConfig):
        raise ArtifactError.of(
            "adapter", str(folder), rule=f"it is a {config.peft_type} adapter, not one of srde", fix="name one of srde train"
        )  # fmt: skip
    names = [name.removesuffix(VALUES) for name in tensors if name.endswith(VALUES)]
    ends = (VALUES, INDEX, WEIGHT)
    layers = {}
    for name in sorted(names, key=_natural):
        missing = [name + end for end in ends if name + end not in tensors]
        if missing:
            raise _not_as_told(folder, missing[0], "missing", "each layer has values, index and router")
        layers[name] = LayerTensors(*(tensors.pop(name + end) for end in ends))
        _check_shapes(folder, name, layers[name], config)
    if not layers:
        raise _not_as_told(
            folder, TENSORS_FILE, sorted(tensors)[:3], "it holds the experts of one layer at least"
        )
    if stray := [name for name in tensors if ".srde_" in name]:
        raise _not_as_told(folder, stray[0], "left over", "each layer has values, index and router")
    return Adapter(folder, config, layers, tensors)


def write_adapter(adapter: Adapter, output_dir: str | os.PathLike[str]) -> None:
    """Writes an adapter: into a new folder, with the other files of the folder that it was read from (tokenizer, card), or over
    itself, where a kill at any moment leaves the old adapter or the new one, and all other files stay.

    Raises:
        UsageError: The folder is another one and not empty, or a run's checkpoint.
        ArtifactError: The disk is full; nothing has changed then.
    """
    source, final = Path(os.path.realpath(adapter.folder)), Path(os.path.realpath(output_dir))
    size = sum(tensor.nbytes for tensor in adapter.tensors().values()) + 2**20
    if final == source:
        roll_forward(final)
        if (final / MANIFEST_NAME).is_file() and read_manifest(final).metadata.get("kind") == "checkpoint":
            raise UsageError.of(
                "adapter", str(adapter.folder), rule="it is a checkpoint that its run may go on from, and stays as it is",
                fix="name a new folder with --output_dir",
            )  # fmt: skip
        with atomic_folder(final / NEXT, {"kind": "adapter"}, expected_bytes=size) as staged:
            _write(adapter, staged)
            write_manifest(staged, {"kind": "adapter"}, only=ADAPTER_FILES)
            (staged / MANIFEST_NAME).rename(staged / SEAL)
        roll_forward(final)
        return
    require_new(final)
    with atomic_folder(final, {"kind": "adapter"}, expected_bytes=size) as staged:
        _write(adapter, staged)
        for file in sorted(source.iterdir()):
            if (
                file.is_file()
                and file.name not in NOT_CARRIED
                and not file.name.startswith((".", "rng_state"))
            ):
                shutil.copyfile(file, staged / file.name)


def require_new(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that holds something: what was saved there would be gone.

    Raises:
        UsageError: It is not empty, or no folder.
    """
    place = Path(folder)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UsageError.of(
            "output_dir", str(folder), rule="it exists, and nothing that was saved is overwritten",
            fix="name a new folder, or the adapter's own to change it in place",
        )  # fmt: skip


def _write(adapter: Adapter, folder: Path) -> None:
    adapter.config.save_pretrained(str(folder))
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors().items()}
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})


def with_layers(adapter: Adapter, layers: Mapping[str, LayerTensors], **changes: object) -> Adapter:
    """The adapter with other experts, and with other settings where they are named; the settings are checked.

    Raises:
        ConfigError: Settings break a rule.
    """
    return replace(adapter, layers=layers, config=replace(adapter.config, **changes))  # type: ignore[arg-type]


def _check_shapes(folder: Path, name: str, layer: LayerTensors, config: SrdeConfig) -> None:
    slots = config.num_experts + config.null_expert
    values = layer.values
    by_neuron = config.granularity == "neuron"
    want = tuple(values.shape[1:3]) if by_neuron else tuple(values.shape)
    fits = values.ndim == (4 if by_neuron else 3) and values.shape[1] == config.experts_in_all
    if not fits or tuple(layer.index.shape) != want or layer.weight.shape[0] != slots:
        shapes = [tuple(tensor.shape) for tensor in (values, layer.index, layer.weight)]
        experts = f"{config.num_experts} routed and {config.num_shared_experts} shared experts"
        rule = f"{experts} by {config.granularity} have other shapes"
        raise _not_as_told(folder, f"shapes of {name}", shapes, rule)


def _not_as_told(folder: Path, thing: str, value: object, rule: str) -> ArtifactError:
    error = ArtifactError.of(f"{folder}: {thing}", value, rule=rule, fix="restore the adapter from a copy")
    assert isinstance(error, ArtifactError)
    return error


def _natural(name: str) -> list[tuple[int, str]]:
    """Layers in their own order: 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
