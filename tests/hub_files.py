"""How a data set's repository on the Hugging Face hub is laid out, and its files as bytes."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

Row = dict[str, Any]
Maker = Callable[[Random], Row]
LETTERS = "A B C D"  # the type of a column of class labels with these names, stored as numbers


@dataclass(frozen=True)
class HubFile:
    """A data file. Types are written as "string", ["string"] for a list and {"name": type} for a struct."""

    path: str  # after a `!`, a member of the zip archive before it
    config: str
    split: str
    make: Maker
    columns: dict[str, Any]
    question: str  # the column that no other split may share
    hidden: Row = field(default_factory=dict)  # what stands where an answer is withheld
    twin: str = ""  # has the same questions as the file of this path
    parts: tuple[str, ...] = ()  # repeats the rows of these files and has none of its own

    def rows(self, count: int, rng: Random) -> list[Row]:
        return [self.make(rng) | self.hidden for _ in range(count)]


@dataclass(frozen=True)
class Repository:
    files: tuple[HubFile, ...]
    license: str | None = None
    revision: str = "main"  # where the files are
    card: bool = True  # has a README.md
    configs: bool = True  # names its files there; if not, splits come from the names of the files
    default: str = ""  # the configuration marked as the default one
    script: str = ""  # a loader, which `datasets` refuses since version 4


def strings(names: str, **others: Any) -> dict[str, Any]:
    """Columns in the order of `names`; those of `others` are not strings."""
    return {name: others.get(name, "string") for name in names.split()}


def parquet(
    config: str,
    splits: str,
    maker: Maker,
    columns: dict[str, Any],
    question: str,
    folder: str = "",
    **more: Any,
) -> tuple[HubFile, ...]:
    """One parquet file per split, in the folder of the configuration or in `data`."""
    folder = folder or ("data" if config == "default" else config)
    return tuple(
        HubFile(f"{folder}/{split}-00000-of-00001.parquet", config, split, maker, columns, question, **more)
        for split in splits.split()
    )


def withheld(files: tuple[HubFile, ...], **hidden: Any) -> tuple[HubFile, ...]:
    """The same files, the `test` ones without their answers."""
    return tuple(replace(file, hidden=hidden) if file.split == "test" else file for file in files)


def arrow_type(written: Any) -> Any:
    import pyarrow as pa

    if isinstance(written, list):
        return pa.list_(arrow_type(written[0]))
    if isinstance(written, dict):
        return pa.struct([(name, arrow_type(inner)) for name, inner in written.items()])
    simple = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "bool": pa.bool_()}
    return (simple | {LETTERS: pa.int64()})[written]


def feature(written: Any) -> Row:
    """A type as `datasets` notes it in a parquet file's metadata."""
    if isinstance(written, list):
        return {"feature": feature(written[0]), "_type": "List"}
    if written == LETTERS:
        return {"names": LETTERS.split(), "_type": "ClassLabel"}
    return {"dtype": written, "_type": "Value"}


def as_parquet(rows: list[Row], columns: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, arrow_type(written)) for name, written in columns.items()])
    if LETTERS in columns.values():
        features = {name: feature(written) for name, written in columns.items()}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), out)
    return out.getvalue()


def as_bytes(path: str, rows: list[Row], columns: dict[str, Any]) -> bytes:
    if path.endswith(".parquet"):
        return as_parquet(rows, columns)
    if path.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    return json.dumps(rows, indent=2).encode()


def as_zip(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # dated 1980, for the same bytes every time
    return out.getvalue()


def card(name: str, repository: Repository) -> bytes:
    lines = ["---", "language:", "- en"]
    if repository.license:
        lines += ["license:", f"- {repository.license}"]
    patterns: dict[str, dict[str, str]] = {}
    for file in repository.files:
        pattern = re.sub(r"-\d{5}-of-\d{5}.*", "-*", file.path)
        patterns.setdefault(file.config, {})[file.split] = pattern
    if repository.configs:
        lines.append("configs:")
        for config, splits in patterns.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split, pattern in splits.items():
                lines += [f"  - split: {split}", f"    path: {pattern}"]
            if config == repository.default:
                lines.append("  default: true")
    return "\n".join([*lines, "---", f"# Dataset Card for {name}", ""]).encode()
