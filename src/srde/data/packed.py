"""The form of a built data set on disk.

    <work_dir>/
      data.jsonl          the training rows, readable
      validation.jsonl    the held-out rows
      README.md           the data set's card
      tokenized/          the packed set: `MANIFEST.json`, `report.json`, `dropped.jsonl`, and
        train/            Arrow streams of packed rows, with what `datasets.load_from_disk` wants beside them
        validation/

The manifest's metadata have `kind`, `model`, `tokenizer` (fingerprints), `max_length`, `domains` and `sources` (names by number),
`splits` (counts), and `files`: the sha256 of the files around the folder.
"""

from __future__ import annotations

from pathlib import Path

KIND = "pretokenized"
OUTPUT = "tokenized"
REPORT_FILE = "report.json"
DROPPED_FILE = "dropped.jsonl"
TRAIN_FILE, VALIDATION_FILE, CARD_FILE = "data.jsonl", "validation.jsonl", "README.md"

SHARD_ROWS = 2048
"""Packed rows per file, at most."""

COLUMNS = {
    "input_ids": "int32",
    "labels": "int32",
    "position_ids": "int32",
    "domain_ids": "int8",
    "lengths": "int32",
    "domains": "int8",
    "sources": "int32",
}
"""All lists: four with an entry per token, then three with an entry per example: its tokens, its domain, its source.

`labels` are `srde.data.tokenize.IGNORE` on prompts and on the first token of each example; `position_ids` restart at 0 there."""


def packed_folder(folder: str | Path) -> Path:
    """The folder of the packed set, given itself or the work folder around it."""
    return Path(folder) / OUTPUT if (Path(folder) / OUTPUT).is_dir() else Path(folder)
