"""Finds every defect of data files and built sets, one line each: ``file:line: field: rule``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srde.artifacts import MANIFEST_NAME, Manifest, read_manifest, verify
from srde.data.build.finish import digest
from srde.data.build.row_prints import text_print
from srde.data.rows import Row
from srde.data.tokenize import Encoded
from srde.data.tokenizers import tokenizer_fingerprints
from srde.data.view.check_shards import check_shard
from srde.data.view.reading import (
    UNREADABLE,
    batched,
    each_row,
    encoded,
    find_set,
    leaks,
    printable,
)
from srde.data.view.shards import SUFFIX, metadata_defects, shard_names
from srde.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from srde.data.build.contamination import EvaluationIndex


def check_rows(
    path: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    *,
    evaluation: EvaluationIndex | None = None,
) -> Iterator[str]:
    """Every defect of data files: ``file:line: field: rule``, in the files' order.

    A defect is a row that cannot be read or, with a tokenizer, be tokenised; an id that its source has used before; a text that
    repeats an earlier row's, blanks aside; a missing domain; more than `max_length` tokens; an evaluation question.

    Args:
        path: A data file, a folder of them, or several of either; ids and texts are compared over all.
        tokenizer: Of the model that is to be trained.
        max_length: Tokens that a row may have; needs the tokenizer.
        evaluation: The questions that no row may hold; see `srde.data.view.reading.evaluation_index`.
    """
    ids: dict[tuple[str | None, str], str] = {}
    texts: dict[int, str] = {}
    for one in [path] if isinstance(path, str | Path) else path:
        for batch in batched(each_row(one)):
            rows = [row for row in batch if isinstance(row, Row)]
            more = zip(encoded(tokenizer, rows), leaks(evaluation, rows), strict=True)
            for row in batch:
                if isinstance(row, DataError):
                    yield printable(str(row))
                    continue
                place = f"{row.file}:{row.line}"
                yield from map(printable, _repeats(row, place, ids, texts))
                yield from map(printable, _beyond(row, place, *next(more), max_length))


def _repeats(
    row: Row, place: str, ids: dict[tuple[str | None, str], str], texts: dict[int, str]
) -> Iterator[str]:
    if row.id is not None and (first := ids.setdefault((row.source, row.id), place)) != place:
        yield f"{place}: id: {row.id!r} is that of {first} already; give each row of a source an id of its own"
    if (first := texts.setdefault(text_print(row), place)) != place:
        yield f"{place}: row: repeats {first}; leave one of them out"
    if row.domain is None:
        yield f"{place}: domain: is missing; a build takes it from the row or from the source's entry"


def _beyond(
    row: Row, place: str, tokens: Encoded | DataError | None, leak: str | None, max_length: int | None
) -> Iterator[str]:
    if isinstance(tokens, DataError):
        yield str(tokens)
    elif tokens is not None and max_length is not None and len(tokens.input_ids) > max_length:
        field = "row" if row.prompt else "text"
        yield (
            f"{place}: {field}: has {len(tokens.input_ids)} tokens, more than max_length={max_length}; it would be left out"
        )
    if leak is not None:
        yield f"{place}: row: holds the evaluation question at {leak}; do not train on it"


def check_set(folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    """Every defect of a built set: ``file:row: column: rule``, files relative to the set's folder.

    Rows and examples are counted from 1, tokens within a row from 0.

    Args:
        folder: A build's work folder, or the `tokenized` folder in it.
        tokenizer: Of the model that is to be trained; ids and fingerprints are compared with it.
    """
    place = find_set(folder)
    if place is None:
        yield printable(f"{folder}: file: holds no built set; name a work folder of `srde data build`")
        return
    for defect in _check_set(place, place != Path(folder), tokenizer):
        yield printable(defect)


def _check_set(place: Path, in_work_dir: bool, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    manifest: Manifest | None = None
    metadata: Mapping[str, Any] = {}
    try:
        manifest = read_manifest(place)
    except ArtifactError as error:
        yield f"{MANIFEST_NAME}: file: {error}"
    except UNREADABLE as error:
        yield f"{MANIFEST_NAME}: file: cannot be read ({error})"
    if manifest is None:
        names = sorted(file.relative_to(place).as_posix() for file in place.glob(f"*/data-*{SUFFIX}"))
    else:
        place, names = manifest.folder, shard_names(manifest)
        yield from _check_files(manifest)
        wrong = dict(metadata_defects(manifest.metadata))
        yield from (f"{MANIFEST_NAME}: metadata.{field}: {rule}" for field, rule in wrong.items())
        metadata = {name: value for name, value in manifest.metadata.items() if name not in wrong}
        yield from _check_readable(place, metadata.get("files", {}), in_work_dir)
        yield from _check_tokenizer(metadata.get("tokenizer", {}), tokenizer)
    found: dict[str, dict[str, int]] = {}
    for name in names:
        file = place / name
        if file.is_file() and not file.is_symlink():  # else said already
            counts = yield from check_shard(
                file, name, metadata, None if tokenizer is None else len(tokenizer)
            )
            split = found.setdefault(name.split("/")[0], dict.fromkeys(counts, 0))
            for key, count in counts.items():
                split[key] += count
    for split, expected in metadata.get("splits", {}).items():
        for key, count in found.get(split, {"rows": 0}).items():
            if expected.get(key) != count:
                yield (
                    f"{split}: {key}: is {count} in the shards together, and {expected.get(key)!r} in {MANIFEST_NAME}"
                )


def _check_files(manifest: Manifest) -> Iterator[str]:
    """Each listed file that is not as it was written: `verify` alone would end at the first."""
    for entry in manifest.files:
        try:
            verify(manifest.folder, only=[entry.file])
        except ArtifactError as error:
            yield f"{entry.file}: file: {str(error).removeprefix(f'{manifest.folder / entry.file}: ')}"
        except UNREADABLE as error:
            yield f"{entry.file}: file: cannot be read ({error})"


def _check_readable(place: Path, files: Mapping[str, str], in_work_dir: bool) -> Iterator[str]:
    """The readable files of the build lie beside the set; a set that was moved away from them is whole without."""
    beside = {name: place.parent / name for name in files if Path(name).name == name}
    if not in_work_dir and not any(file.is_file() for file in beside.values()):
        return
    for name, file in beside.items():
        try:
            if not file.is_file():
                yield f"{name}: file: is missing; restore it from a copy or build again"
            elif (found := digest(file)) != files[name]:
                yield f"{name}: file: has the sha256 {found}, and the build wrote {files[name]}; it was altered"
        except UNREADABLE as error:
            yield f"{name}: file: cannot be read ({error})"


def _check_tokenizer(expected: Mapping[str, str], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    if tokenizer is None or not expected:
        return
    for name, own in tokenizer_fingerprints(tokenizer).items():
        if expected.get(name) != own:
            yield (
                f"{MANIFEST_NAME}: metadata.tokenizer.{name}: is not that of {tokenizer.name_or_path or 'the model'}; "
                "build the set for this model, or name the model that it was built for"
            )
