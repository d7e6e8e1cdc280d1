"""Reads the token shards of a built set as flat arrays.

B: packed rows, X: examples of all of them, T: tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from srde.artifacts import MANIFEST_NAME, Manifest, read_manifest, verify
from srde.data.build.finish import KIND
from srde.errors import ArtifactError

PER_TOKEN = ("input_ids", "labels", "position_ids", "domain_ids")
PER_EXAMPLE = ("lengths", "domains", "sources")
SUFFIX = ".arrow"


@dataclass(frozen=True)
class Packed:
    """Some packed rows of a shard.

    Attributes:
        numbers_B: The rows' numbers in their shard, counted from 1.
        tokens: Each column of `PER_TOKEN`, [T].
        examples: Each column of `PER_EXAMPLE`, [X].
        tokens_B: Tokens of each row.
        examples_B: Examples of each row.
    """

    numbers_B: np.ndarray
    tokens: Mapping[str, np.ndarray]
    examples: Mapping[str, np.ndarray]
    tokens_B: np.ndarray
    examples_B: np.ndarray

    @property
    def starts_X(self) -> np.ndarray:
        """The place of each example's first token among all T."""
        lengths_X = self.examples["lengths"].astype(np.int64)
        return np.cumsum(lengths_X) - lengths_X

    @property
    def trained_X(self) -> np.ndarray:
        """Labels of each example that count in the loss; every example has a token."""
        counted = np.concatenate([[0], np.cumsum(self.tokens["labels"] >= 0)])
        starts_X = self.starts_X
        return counted[starts_X + self.examples["lengths"]] - counted[starts_X]


def packed(batch: pa.RecordBatch, numbers_B: np.ndarray) -> Packed:
    """The arrays of a batch whose columns hold no null."""

    def flat(name: str) -> np.ndarray:
        return batch.column(name).flatten().to_numpy(zero_copy_only=False)

    def sizes(name: str) -> np.ndarray:
        return pc.list_value_length(batch.column(name)).to_numpy(zero_copy_only=False).astype(np.int64)

    return Packed(
        numbers_B,
        {name: flat(name) for name in PER_TOKEN},
        {name: flat(name) for name in PER_EXAMPLE},
        sizes(PER_TOKEN[0]),
        sizes(PER_EXAMPLE[0]),
    )


def batches(file: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches of a shard, each with the number of its first row, counted from 1."""
    first = 1
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield first, batch
            first += batch.num_rows


def read_shard(file: Path) -> Iterator[Packed]:
    """A shard's rows, some hundred at a time; of a shard whose hash is as the manifest says."""
    for first, batch in batches(file):
        yield packed(batch, first + np.arange(batch.num_rows))


@dataclass(frozen=True)
class BuiltSet:
    """A packed set with its manifest.

    Attributes:
        folder: Where its files are.
        manifest: As read; what it says of the set has been checked.
    """

    folder: Path
    manifest: Manifest

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the build said of the set."""
        return self.manifest.metadata

    def shards(self, split: str) -> list[str]:
        """The names of a split's shards, relative to the folder, in order."""
        return [name for name in shard_names(self.manifest) if name.split("/")[0] == split]


def shard_names(manifest: Manifest) -> list[str]:
    """All shards that a manifest lists, those of `train` first."""
    names = [entry.file for entry in manifest.files if entry.file.endswith(SUFFIX)]
    return sorted(names, key=lambda name: (not name.startswith("train/"), name))


def open_set(folder: Path, *, whole: bool = True) -> BuiltSet:
    """Opens a packed set.

    Args:
        folder: Its folder, with `MANIFEST.json`.
        whole: Compares every file with its hash; else the manifest alone is checked.

    Raises:
        ArtifactError: A file is missing or altered, or the folder is no packed set.
    """
    manifest = verify(folder) if whole else read_manifest(folder)
    for field, rule in metadata_defects(manifest.metadata):
        raise ArtifactError.of(
            f"{folder / MANIFEST_NAME}: {field}", manifest.metadata.get(field.split(".")[0]), rule=rule,
            fix="name a folder that `srde data build` has made",
        )  # fmt: skip
    return BuiltSet(manifest.folder, manifest)


def metadata_defects(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with a manifest's metadata: fields with the rule that each breaks."""
    if metadata.get("kind") != KIND:
        yield "kind", f"must be {KIND!r}, not {metadata.get('kind')!r}"
        return
    length = metadata.get("max_length")
    if type(length) is not int or length < 1:
        yield "max_length", f"must be a number of at least 1, not {length!r}"
    if not isinstance(metadata.get("model"), str):
        yield "model", "must be a string"
    for name in ("domains", "sources"):
        value = metadata.get(name)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            yield name, "must be a list of strings"
    for name, kind in (("tokenizer", str), ("files", str), ("splits", dict)):
        value = metadata.get(name)
        if not isinstance(value, dict) or not all(isinstance(one, kind) for one in value.values()):
            yield name, f"must be an object of {'objects' if kind is dict else 'strings'}"
