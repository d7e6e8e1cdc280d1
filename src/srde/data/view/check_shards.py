"""Checks the packed rows of a shard, some hundred at once.

B: packed rows, X: examples of all of them, T: tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from srde.data.build.write import COLUMNS
from srde.data.tokenize import IGNORE
from srde.data.view.reading import UNREADABLE
from srde.data.view.shards import PER_EXAMPLE, PER_TOKEN, Packed, batches, packed

_Found = list[tuple[int, str, str]]  # (row, column, rule)


def check_shard(
    file: Path, name: str, metadata: Mapping[str, Any], vocabulary: int | None
) -> Generator[str, None, dict[str, int]]:
    """Every defect of a shard's rows: ``name:row: column: rule``.

    Args:
        file: The shard.
        name: Its name in the messages.
        metadata: The manifest's, as far as it is sound.
        vocabulary: How many ids the tokenizer has, if that is known.

    Returns:
        Packed rows, examples, tokens and trained tokens; of rows that cannot be read, nothing but their number.
    """
    counts = {"rows": 0, "examples": 0, "tokens": 0, "trained_tokens": 0}
    try:
        for first, batch in batches(file):
            if defects := list(_schema(batch.schema)):
                yield from (
                    f"{name}: {column}: {rule}; its rows were not looked at" for column, rule in defects
                )
                break
            batch.validate(full=True)  # before numpy follows an offset that leads out of the file
            found: _Found = []
            rows = packed(*_sound(batch, first, found))
            _content(rows, metadata, vocabulary, found)
            for row, column, rule in sorted(found, key=lambda defect: defect[0]):
                yield f"{name}:{row}: {column}: {rule}"
            counts["rows"] += batch.num_rows
            counts["examples"] += len(rows.examples["lengths"])
            counts["tokens"] += len(rows.tokens["input_ids"])
            counts["trained_tokens"] += int((rows.tokens["labels"] >= 0).sum())
    except UNREADABLE as error:
        yield f"{name}: file: is not an Arrow stream that can be read beyond row {counts['rows']} ({error})"
    return counts


def _schema(schema: pa.Schema) -> Generator[tuple[str, str], None, None]:
    for name, kind in COLUMNS.items():
        place = schema.get_field_index(name)
        if place < 0:
            yield name, "the column is missing, or there are several of that name"
        elif not pa.types.is_list(schema.field(place).type) or schema.field(place).type.value_type != kind:
            yield name, f"must be of type list<{kind}>, not {schema.field(place).type}"


def _sound(batch: pa.RecordBatch, first: int, found: _Found) -> tuple[pa.RecordBatch, np.ndarray]:
    """The rows whose lists fit together, with their numbers; of the others, what does not fit."""
    numbers_B = first + np.arange(batch.num_rows)
    sound_B = np.ones(batch.num_rows, dtype=bool)

    def refuse(bad_B: np.ndarray, column: str, rule: Callable[[int], str]) -> None:
        bad_B = bad_B & sound_B
        found.extend((int(numbers_B[row]), column, rule(row)) for row in np.flatnonzero(bad_B))
        sound_B[bad_B] = False

    sizes = {}
    for name in COLUMNS:
        column = batch.column(name)
        null_B = column.is_null().to_numpy(zero_copy_only=False).copy()
        size_B = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        items = column.flatten()
        if items.null_count:
            holes = np.flatnonzero(items.is_null().to_numpy(zero_copy_only=False))
            null_B[np.searchsorted(np.cumsum(size_B), holes, side="right")] = True
        sizes[name] = size_B
        refuse(null_B, name, lambda _: "is null or holds a null")
    for names in (PER_TOKEN, PER_EXAMPLE):
        for name in names[1:]:
            one, other = sizes[name], sizes[names[0]]
            refuse(
                one != other,
                name,
                lambda row, a=one, b=other, to=names[0]: f"has {a[row]} entries, and {to} has {b[row]}",
            )
    refuse(sizes["lengths"] == 0, "lengths", lambda _: "holds no example")

    lengths_X = (
        pc.fill_null(batch.column("lengths").flatten(), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    ends_B = np.cumsum(sizes["lengths"])
    starts_B = ends_B - sizes["lengths"]
    low = np.concatenate([[0], np.cumsum(lengths_X < 1)])
    refuse(low[ends_B] > low[starts_B], "lengths", lambda _: "must all be at least 1")
    sums = np.concatenate([[0], np.cumsum(lengths_X)])
    sums_B = sums[ends_B] - sums[starts_B]
    tokens_B = sizes["input_ids"]
    refuse(
        sums_B != tokens_B,
        "lengths",
        lambda row: f"add up to {sums_B[row]}, and input_ids has {tokens_B[row]}",
    )
    if not sound_B.all():
        batch, numbers_B = batch.filter(pa.array(sound_B)), numbers_B[sound_B]
    return batch, numbers_B


def _content(rows: Packed, metadata: Mapping[str, Any], vocabulary: int | None, found: _Found) -> None:
    """What the numbers of rows say that they must not."""
    ids_T, labels_T = rows.tokens["input_ids"], rows.tokens["labels"]
    lengths_X, starts_X = rows.examples["lengths"], rows.starts_X
    row_ends = np.cumsum(rows.tokens_B)
    row_of_X = np.repeat(np.arange(len(rows.numbers_B)), rows.examples_B)
    first_X = np.cumsum(rows.examples_B) - rows.examples_B

    def tokens(bad_T: np.ndarray, column: str, rule: Callable[[int], str]) -> None:
        """One line for each row with such tokens: the first of them, and how many there are."""
        places = np.flatnonzero(bad_T)
        of_row, at, counts = np.unique(
            np.searchsorted(row_ends, places, side="right"), return_index=True, return_counts=True
        )
        for row, place, count in zip(of_row, places[at], counts, strict=True):
            within = place - (row_ends[row] - rows.tokens_B[row])
            more = f" ({count - 1} more like it)" if count > 1 else ""
            found.append((int(rows.numbers_B[row]), column, f"token {within} {rule(int(place))}{more}"))

    def examples(bad_X: np.ndarray, column: str, rule: Callable[[int], str]) -> None:
        for example in np.flatnonzero(bad_X):
            row = row_of_X[example]
            which = example - first_X[row] + 1
            found.append((int(rows.numbers_B[row]), column, f"example {which} {rule(int(example))}"))

    if "max_length" in metadata:
        longest = metadata["max_length"]
        for row in np.flatnonzero(rows.tokens_B > longest):
            size = rows.tokens_B[row]
            found.append(
                (int(rows.numbers_B[row]), "input_ids", f"has {size} tokens, more than max_length={longest}")
            )
    outside_T = ids_T < 0 if vocabulary is None else (ids_T < 0) | (ids_T >= vocabulary)
    tokens(outside_T, "input_ids", lambda place: f"is {ids_T[place]}, {_outside(vocabulary)}")

    expected_T = np.arange(len(ids_T)) - np.repeat(starts_X, lengths_X)
    positions_T = rows.tokens["position_ids"]
    tokens(
        positions_T != expected_T, "position_ids",
        lambda place: f"is {positions_T[place]}, not {expected_T[place]}: positions restart at each example",
    )  # fmt: skip
    begins_X = labels_T[starts_X]
    examples(
        begins_X != IGNORE,
        "labels",
        lambda one: f"begins with {begins_X[one]}; nothing stands before it, so it must be {IGNORE}",
    )
    examples(rows.trained_X == 0, "labels", lambda _: "has no trained token")
    tokens(
        (labels_T != IGNORE) & (labels_T != ids_T), "labels",
        lambda place: f"is {labels_T[place]}; a label is {IGNORE} or the id at its place, here {ids_T[place]}",
    )  # fmt: skip

    domain_X, domain_T = rows.examples["domains"], rows.tokens["domain_ids"]
    wanted_T = np.repeat(domain_X, lengths_X)
    tokens(
        domain_T != wanted_T,
        "domain_ids",
        lambda place: f"is {domain_T[place]}, and its example's domain is {wanted_T[place]}",
    )
    for column in ("domains", "sources"):
        if column in metadata:
            last, value_X = len(metadata[column]) - 1, rows.examples[column]
            examples(
                (value_X < 0) | (value_X > last), column,
                lambda one, value=value_X, last=last: f"has the number {value[one]}; the manifest names 0 to {last}",
            )  # fmt: skip


def _outside(vocabulary: int | None) -> str:
    return "which is no id" if vocabulary is None else f"outside the vocabulary of {vocabulary} ids"
