"""What a run trains and measures on: rows that it tokenises itself, or a packed set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from srde.data.loader import PackedDataset
from srde.data.pack import PaddedCollator, concatenate, pack_places, packed_collator
from srde.data.rows import Row, scan_rows
from srde.data.tokenize import tokenize_rows
from srde.errors import DataError
from srde.train.arguments import DataArguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """Ready for a trainer.

    Attributes:
        train: Packed rows or single examples.
        evaluation: The same of held-out rows, if there are any.
        collate: Makes a batch of either.
        facts: Counts: rows, rows left out, tokens, trained tokens.
        domains: The domains by their numbers.
        fingerprint: Of what is trained on.
        held_out_fingerprint: Of `--eval_file`, if there is one.
    """

    train: Numbered
    evaluation: Dataset[Any] | None
    collate: Any
    facts: dict[str, Any]
    domains: list[str]
    fingerprint: str
    held_out_fingerprint: str | None = None

    def first_batches(self, size: int, tokens: int) -> list[dict[str, Any]]:
        """The first batches of the first epoch, of `size` rows each, until they have so many tokens; the same in every
        process."""
        batches: list[dict[str, Any]] = []
        order = self.train.epoch(0).tolist()
        seen = 0
        for first in range(0, len(order), size):
            batch = self.collate([self.train[place] for place in order[first : first + size]])
            batch.pop("row_ids")
            batches.append(batch)
            seen += batch["input_ids"].numel()
            if seen >= tokens:
                break
        return batches


class Rows(Dataset):  # type: ignore[type-arg]
    """A list as a dataset, shuffled anew in every epoch.

    Args:
        rows: Examples, or packed rows.
        names: What to call each row in a message.
        seed: Of the order.
    """

    def __init__(self, rows: Sequence[Any], names: Sequence[str], seed: int = 0) -> None:
        self.rows, self.names, self.seed = rows, names, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def epoch(self, number: int) -> np.ndarray:
        """The rows of an epoch in order."""
        return np.random.default_rng([self.seed, number]).permutation(len(self.rows))

    def name(self, index: int) -> str:
        """What to call a row in a message."""
        return self.names[index]


class Numbered(Dataset):  # type: ignore[type-arg]
    """A dataset whose items know their number, so that a batch can say which rows it holds."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def epoch(self, number: int) -> np.ndarray:
        """The rows of an epoch in order."""
        order: np.ndarray = self.dataset.epoch(number)
        return order

    def name(self, index: int) -> str:
        """What to call a row in a message."""
        return str(self.dataset.name(index)) if hasattr(self.dataset, "name") else f"row {index}"


@dataclass(frozen=True)
class NumberedCollator:
    """Collates numbered rows, with their numbers as `row_ids`; or plain ones, without.

    Attributes:
        collate: Makes a batch of rows.
    """

    collate: Any

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The batch."""
        if not isinstance(rows[0], tuple):
            return dict(self.collate(rows))
        batch = dict(self.collate([row for _, row in rows]))
        return batch | {"row_ids": torch.tensor([number for number, _ in rows])}


class RowData:
    """Rows of JSONL files.

    Args:
        args: The files.
        need_domains: Refuses files whose rows have none.

    Raises:
        DataError: A row breaks a rule and bad rows are not to be skipped, or there is none.
    """

    def __init__(self, args: DataArguments, seed: int, *, need_domains: bool) -> None:
        self.args, self.seed = args, seed
        self.rows, self.bad_rows = _read(args.train_file or "", args)
        self.held_out = _read(args.eval_file, args)[0] if args.eval_file else None
        if need_domains and all(row.domain is None for row in self.rows):
            raise DataError.at(
                args.train_file, None, "domain", "no row has one; --supervised_experts needs them"
            )

    def prepare(self, tokenizer: PreTrainedTokenizerBase, packed: bool) -> TrainingData:
        """Tokenises and packs, or leaves examples single for models whose packing is not exact."""
        length = self.args.max_length
        train, facts, domains = _prepare(tokenizer, self.rows, length, packed, seed=self.seed)
        # held-out rows have the training rows' numbers
        held_out = _prepare(tokenizer, self.held_out, length, packed, domains)[0] if self.held_out else None
        return TrainingData(
            Numbered(train), held_out, _collator(tokenizer, packed), facts | {"bad_rows": self.bad_rows}, domains,
            _fingerprint(self.args.train_file) or "", _fingerprint(self.args.eval_file),
        )  # fmt: skip


class PackedData:
    """A packed set of `srde data build`.

    Raises:
        ArtifactError: It is not as it was written.
        ConfigError: It was made for another tokenizer.
    """

    def __init__(self, args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.args = args
        self.train = PackedDataset(args.pretokenized_dir or "", "train", args.data_order, seed)
        self.train.require_tokenizer(tokenizer)
        self.held_out = _read(args.eval_file, args)[0] if args.eval_file else None

    def prepare(self, tokenizer: PreTrainedTokenizerBase, packed: bool) -> TrainingData:
        """The set as it is, or its examples one by one for models whose packing is not exact."""
        counts = self.train.metadata["splits"]["train"]
        facts = {
            "rows": counts["examples"], "rows_left_out": 0, "bad_rows": 0, "tokens": counts["tokens"],
            "trained_tokens": counts["trained_tokens"], "packed": packed,
        }  # fmt: skip
        held_out: Dataset[Any] | None = None
        if self.held_out:
            names = self.train.domain_names
            held_out = _prepare(tokenizer, self.held_out, self.train.max_length, packed, names)[0]
        elif self.train.metadata["splits"]["validation"]["rows"]:
            split = PackedDataset(self.train.folder, "validation", check=False)
            held_out = split if packed else split.examples()
        return TrainingData(
            Numbered(self.train if packed else self.train.examples()), held_out, _collator(tokenizer, packed), facts,
            self.train.domain_names, self.train.fingerprint, _fingerprint(self.args.eval_file),
        )  # fmt: skip


def open_data(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, *, need_domains: bool, seed: int
) -> RowData | PackedData:
    """Reads what the run is given, so that a defect shows before the model is loaded."""
    if args.pretokenized_dir:
        return PackedData(args, tokenizer, seed)
    return RowData(args, seed, need_domains=need_domains)


def _read(path: str, args: DataArguments) -> tuple[list[Row], int]:
    """The rows of a file, and how many were left out."""
    rows, bad = [], 0
    for row in scan_rows(path):
        if isinstance(row, Row):
            rows.append(row)
        elif args.on_bad_row == "error":
            raise row
        else:
            bad += 1
    if not rows:
        raise DataError.at(path, None, "file", f"has no row that could be used; {bad} break a rule")
    return rows, bad


def _prepare(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    packed: bool,
    domains: Sequence[str | None] = (),
    seed: int = 0,
) -> tuple[Rows, dict[str, Any], list[str]]:
    tokenized = tokenize_rows(tokenizer, rows, max_length=max_length, domains=domains)
    examples = tokenized.examples
    facts = {
        "rows": len(examples),
        "rows_left_out": tokenized.dropped,
        "tokens": sum(len(e.input_ids) for e in examples),
        "trained_tokens": tokenized.trained_tokens,
        "packed": packed,
    }
    names = [f"{row.file}:{row.line}" for row in tokenized.rows]
    if not packed:
        return Rows(examples, names, seed), facts, tokenized.domains
    places = pack_places([len(example.input_ids) for example in examples], max_length=max_length)
    whole = [concatenate([examples[place] for place in row]) for row in places]
    joined = [" + ".join(names[place] for place in row) for row in places]
    return Rows(whole, joined, seed), facts, tokenized.domains


def _collator(tokenizer: PreTrainedTokenizerBase, packed: bool) -> NumberedCollator:
    return NumberedCollator(packed_collator if packed else PaddedCollator(tokenizer.pad_token_id))


def _fingerprint(file: str | None) -> str | None:
    if file is None:
        return None
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
