"""Reads a packed set for training: memory-mapped, in a deterministic order, resumable at any batch.

    dataset = PackedDataset("data/tokenized", order="balanced", seed=0)
    loader = PackedLoader(dataset, batch_size=2, num_workers=4)
    for batch in loader:
        ...
        torch.save(loader.state_dict(), "loader.pt")      # and later: loader.load_state_dict(...)

Which rows an epoch has, and in which order, is a pure function of the set, the order, the seed and the epoch. The number of
workers never changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from srde.artifacts import verify
from srde.data.pack import PackedRow, pack_lengths, packed_collator
from srde.data.packed import KIND, REPORT_FILE, packed_folder
from srde.data.tokenize import IGNORE, Example
from srde.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Order = Literal["shuffled", "balanced", "curriculum"]
ORDERS: tuple[Order, ...] = get_args(Order)

_OPEN_ROWS = 64  # rows that stay open while examples are packed in a given order
_TOKENS = ("input_ids", "labels", "position_ids", "domain_ids")


@dataclass(frozen=True)
class Piece:
    """An example in a stored row: its tokens from `start` to `end`."""

    row: int
    start: int
    end: int


class PackedDataset(Dataset):  # type: ignore[type-arg]
    """The packed rows of one split.

    Args:
        folder: What `srde data build` wrote: its `tokenized` folder, or the work folder around it.
        split: "train" or "validation".
        order: "shuffled" takes the rows as they were packed. "balanced" packs the examples anew, so that at every moment each
            domain has had as many trained tokens; domains with fewer examples repeat theirs until the largest is through.
            "curriculum" packs each domain's examples from short responses to long ones, all domains side by side.
        seed: Order of the examples for "balanced", and of the rows in every epoch.
        check: Compares every file with its hash first; about a second per gigabyte.

    Raises:
        ArtifactError: The folder is no packed set, or not as it was written.
        ConfigError: There is no such split or order.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        order: Order = "shuffled",
        seed: int = 0,
        *,
        check: bool = True,
    ) -> None:
        import datasets

        if order not in ORDERS:
            raise ConfigError.of(
                "order", order, rule=f"it must be one of {', '.join(ORDERS)}", fix="pick one of them"
            )
        self.folder = packed_folder(folder)
        manifest = verify(self.folder, only=None if check else [REPORT_FILE])
        self.metadata = dict(manifest.metadata)
        if self.metadata.get("kind") != KIND:
            raise ArtifactError.of(
                "pretokenized_dir", str(folder), rule="it is not a packed set", fix="name a folder that `srde data build` wrote"
            )  # fmt: skip
        if split not in self.metadata["splits"]:
            raise ConfigError.of(
                "split", split, rule="the set has train and validation", fix="name one of them"
            )
        self.split, self.order, self.seed = split, order, seed
        own = [
            f"{entry.file} {entry.sha256}" for entry in manifest.files if entry.file.startswith(f"{split}/")
        ]
        self.fingerprint = hashlib.sha256("\n".join(own).encode()).hexdigest()
        self._rows = datasets.load_from_disk(str(manifest.folder / split)).with_format("numpy")
        self._recipes = None if order == "shuffled" else self._pack_anew()

    @property
    def domain_names(self) -> list[str]:
        """The domains by their numbers."""
        return list(self.metadata["domains"])

    @property
    def max_length(self) -> int:
        """Tokens that a row may have."""
        return int(self.metadata["max_length"])

    def __len__(self) -> int:
        return len(self._rows) if self._recipes is None else len(self._recipes)

    def __getitem__(self, index: int) -> PackedRow:
        if self._recipes is None:
            stored = self._rows[int(index)]
            return PackedRow(*(stored[name] for name in _TOKENS))
        pieces = self._recipes[int(index)]
        parts = [self._piece(piece) for piece in pieces]
        return PackedRow(*(np.concatenate([part[name] for part in parts]) for name in _TOKENS))

    def _piece(self, piece: Piece) -> dict[str, np.ndarray]:
        stored = self._rows[piece.row]
        return {name: stored[name][piece.start : piece.end] for name in _TOKENS}

    def epoch(self, number: int) -> np.ndarray:
        """The rows of an epoch in order."""
        return _epoch(len(self), self.order, self.seed, number)

    def examples(self) -> Examples:
        """The examples one by one, for models that cannot keep packed ones apart."""
        return Examples(self)

    def pieces(self) -> tuple[list[Piece], np.ndarray, np.ndarray]:
        """All examples as stored, with the domain of each and how many of its tokens are trained."""
        columns = self._rows.with_format("arrow")[:]
        lengths, domains = columns["lengths"], columns["domains"]
        found: list[Piece] = []
        for row, own in enumerate(lengths.to_pylist()):
            ends = np.cumsum(own).tolist()
            found += [Piece(row, end - length, end) for end, length in zip(ends, own, strict=True)]
        numbers = np.concatenate([np.asarray(chunk.flatten()) for chunk in domains.chunks])
        trained = []
        for chunk in columns["labels"].chunks:
            trained.append(np.asarray(chunk.flatten()) != IGNORE)
        counts = np.add.reduceat(
            np.concatenate(trained).astype(np.int64), np.cumsum([0, *(p.end - p.start for p in found)])[:-1]
        )
        return found, numbers, counts

    def _pack_anew(self) -> list[list[Piece]]:
        pieces, domains, trained = self.pieces()
        sequence = (
            balanced(domains, trained, self.seed)
            if self.order == "balanced"
            else curriculum(domains, trained)
        )
        ordered = [pieces[place] for place in sequence]
        rows = pack_lengths(
            [piece.end - piece.start for piece in ordered], max_length=self.max_length, window=_OPEN_ROWS
        )
        return [[ordered[place] for place in row] for row in rows]

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a tokenizer whose ids mean other texts.

        Raises:
            ConfigError: Its vocabulary is not the one that the set was made with.
        """
        from srde.data.tokenizers import tokenizer_fingerprints

        expected = self.metadata["tokenizer"]["vocabulary"]
        if (found := tokenizer_fingerprints(tokenizer)["vocabulary"]) != expected:
            raise ConfigError.of(
                "pretokenized_dir",
                str(self.folder),
                rule=f"it was made for {self.metadata['model']} (vocabulary {expected[:12]}); this model has another one "
                f"({found[:12]})",
                fix="build the set with `srde data build --model_name` for this model",
            )


class Examples(Dataset):  # type: ignore[type-arg]
    """The examples of a packed set one by one, in its order."""

    def __init__(self, packed: PackedDataset) -> None:
        self._packed = packed
        self.order, self.seed = packed.order, packed.seed
        recipes = packed._recipes
        self._pieces = packed.pieces()[0] if recipes is None else [piece for row in recipes for piece in row]

    def __len__(self) -> int:
        return len(self._pieces)

    def epoch(self, number: int) -> np.ndarray:
        """The examples of an epoch in order."""
        return _epoch(len(self), self.order, self.seed, number)

    def __getitem__(self, index: int) -> Example:
        part = self._packed._piece(self._pieces[index])
        return Example(part["input_ids"].tolist(), part["labels"].tolist(), int(part["domain_ids"][0]))


def _epoch(length: int, order: Order, seed: int, number: int) -> np.ndarray:
    if order == "curriculum":
        return np.arange(length)
    return np.random.default_rng([seed, number]).permutation(length)


def balanced(domains: np.ndarray, trained: np.ndarray, seed: int) -> list[int]:
    """Examples in turn from the domain with the fewest trained tokens so far, until the largest domain is through.

    Args:
        domains: Domain of each example.
        trained: Trained tokens of each.
        seed: Order of a domain's examples, another one each time that it begins again.
    """
    rng = np.random.default_rng([seed, 1])
    own = {int(domain): np.flatnonzero(domains == domain) for domain in np.unique(domains)}
    if not own:
        return []
    totals = {domain: int(trained[places].sum()) for domain, places in own.items()}
    longest = max(totals, key=lambda domain: totals[domain])
    queues: dict[int, list[int]] = {domain: [] for domain in own}
    given = dict.fromkeys(own, 0)
    sequence: list[int] = []
    while given[longest] < totals[longest]:
        domain = min(given, key=lambda one: (given[one], one))
        if not queues[domain]:
            queues[domain] = rng.permutation(own[domain]).tolist()
        place = queues[domain].pop()
        given[domain] += int(trained[place])
        sequence.append(place)
    return sequence


def curriculum(domains: np.ndarray, trained: np.ndarray) -> list[int]:
    """Examples by their rank in their own domain, from the fewest trained tokens to the most."""
    rank = np.zeros(len(domains))
    for domain in np.unique(domains):
        own = np.flatnonzero(domains == domain)
        rank[own[np.argsort(trained[own], kind="stable")]] = np.arange(len(own)) / len(own)
    return np.argsort(rank, kind="stable").tolist()


class RowOrder(Sampler):  # type: ignore[type-arg]
    """The rows of a packed set, or its examples, in the order of an epoch: for any `DataLoader`, and Transformers' trainer."""

    def __init__(self, dataset: PackedDataset | Examples) -> None:
        self.dataset = dataset
        self.number = 0

    def set_epoch(self, number: int) -> None:
        """Chooses the epoch, counted from 0."""
        self.number = number

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        yield from self.dataset.epoch(self.number).tolist()


class PackedLoader:
    """Batches of packed rows; where it stands is a few numbers.

    Iterating goes on from where the loader stands to the end of the epoch, and the next iteration begins the next epoch.

    Args:
        dataset: The rows.
        batch_size: Rows per batch.
        num_workers: Processes that read ahead.
        rank: This process among `world_size`; each gets every `world_size`-th batch. The first batches are repeated at the end of
            an epoch where they do not divide evenly, as in PyTorch's `DistributedSampler`.
        world_size: Processes that train together.
        collate: Makes a batch of rows.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        batch_size: int = 1,
        num_workers: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        collate: Callable[[Sequence[PackedRow]], Any] = packed_collator,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ConfigError.of(
                "batch_size, rank, world_size",
                (batch_size, rank, world_size),
                rule="a batch has at least one row, and ranks count from 0 to world_size - 1",
                fix="correct them",
            )
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.rank, self.world_size, self.collate = rank, world_size, collate
        self.epoch = 0
        self.batch = 0

    def __len__(self) -> int:
        """Batches of an epoch for this rank."""
        return -(-len(self.dataset) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Any]:
        batches = self._batches()[self.batch :]
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )
        for batch in loader:
            self.batch += 1
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def _batches(self) -> list[list[int]]:
        rows = self.dataset.epoch(self.epoch).tolist()
        every = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        wanted = len(self) * self.world_size
        every += [every[place % len(every)] for place in range(wanted - len(every))]
        return every[self.rank :: self.world_size]

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self.dataset.fingerprint,
            "order": self.dataset.order,
            "seed": self.dataset.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: after the last batch that it gave."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state. The number of workers may be another one.

        Raises:
            ConfigError: It is the state of another set, order, seed, batch size or world size.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ConfigError.of(
                    name, value, rule=f"the saved state has {state.get(name)!r}; the order of the rows would be another",
                    fix="set it as it was, or begin anew without the state",
                )  # fmt: skip
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
