"""What a run trains and measures on: rows that it tokenises itself, or a packed set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from srde.data.loader import PackedDataset
from srde.data.pack import PaddedCollator, pack, packed_collator
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
    """

    train: Dataset[Any]
    evaluation: Dataset[Any] | None
    collate: Any
    facts: dict[str, Any]


class Rows(Dataset):  # type: ignore[type-arg]
    """A list as a dataset."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class RowData:
    """Rows of JSONL files.

    Args:
        args: The files.
        need_domains: Refuses files whose rows have none.

    Raises:
        DataError: A row breaks a rule and bad rows are not to be skipped, or there is none.
    """

    def __init__(self, args: DataArguments, *, need_domains: bool) -> None:
        self.args = args
        self.rows, self.bad_rows = _read(args.train_file or "", args)
        self.held_out = _read(args.eval_file, args)[0] if args.eval_file else None
        if need_domains and all(row.domain is None for row in self.rows):
            raise DataError.at(
                args.train_file, None, "domain", "no row has one; --supervised_experts needs them"
            )

    def prepare(self, tokenizer: PreTrainedTokenizerBase, packed: bool) -> TrainingData:
        """Tokenises and packs, or leaves examples single for models whose packing is not exact."""
        length = self.args.max_length
        train, facts = _prepare(tokenizer, self.rows, length, packed)
        domains = [row.domain for row in self.rows]  # held-out rows have the training rows' numbers
        held_out = _prepare(tokenizer, self.held_out, length, packed, domains)[0] if self.held_out else None
        return TrainingData(
            train, held_out, _collator(tokenizer, packed), facts | {"bad_rows": self.bad_rows}
        )


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
            self.train if packed else self.train.examples(), held_out, _collator(tokenizer, packed), facts
        )


def open_data(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, *, need_domains: bool, seed: int
) -> RowData | PackedData:
    """Reads what the run is given, so that a defect shows before the model is loaded."""
    if args.pretokenized_dir:
        return PackedData(args, tokenizer, seed)
    return RowData(args, need_domains=need_domains)


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
) -> tuple[Rows, dict[str, Any]]:
    tokenized = tokenize_rows(tokenizer, rows, max_length=max_length, domains=domains)
    facts = {
        "rows": len(tokenized.examples),
        "rows_left_out": tokenized.dropped,
        "tokens": sum(len(e.input_ids) for e in tokenized.examples),
        "trained_tokens": tokenized.trained_tokens,
        "packed": packed,
    }
    return Rows(pack(tokenized.examples, max_length=max_length) if packed else tokenized.examples), facts


def _collator(tokenizer: PreTrainedTokenizerBase, packed: bool) -> Any:
    return packed_collator if packed else PaddedCollator(tokenizer.pad_token_id)
