"""Fills the pages with what the code says about itself when the site is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the markers with tables of a configuration's own fields: name, default, help."""
    for marker, rows in (
        ("<!-- fields of SrdeConfig -->", _config),
        ("<!-- fields of BuildSettings -->", _settings),
    ):
        if marker in markdown:
            markdown = markdown.replace(marker, _table("Field", rows()))
    for part in ("ModelArguments", "DataArguments", "ExpertArguments", "RunArguments"):
        marker = f"<!-- flags of {part} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, _table("Flag", _flags(part)))
    return markdown


def _table(first: str, rows: Iterator[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | {default} | {text} |" for name, default, text in rows]
    return "\n".join([f"| {first} | Default | Meaning |", "|---|---|---|", *lines])


def _config() -> Iterator[tuple[str, str, str]]:
    from srde.tuner.config import SrdeConfig, config_fields

    default = {field.name: field.default for field in fields(SrdeConfig)}
    for name, text in config_fields().items():
        yield name, f"`{default[name]!r}`", text


def _settings() -> Iterator[tuple[str, str, str]]:
    from srde.data.build.settings import BuildSettings

    for field in fields(BuildSettings):
        default = "required" if field.default is MISSING else f"`{field.default!r}`"
        yield field.name, default, field.metadata["help"]


def _flags(part: str) -> Iterator[tuple[str, str, str]]:
    """The flags of `srde train` in one of its parts that are srde's own."""
    from transformers import TrainingArguments

    from srde.train import arguments

    theirs = {field.name: field for field in fields(TrainingArguments)}
    for field in fields(getattr(arguments, part)):
        if field.init and field is not theirs.get(field.name):
            default = "required" if field.default is MISSING else f"`{field.default!r}`"
            if field.name == "output_dir":
                default = "required"
            also = "".join(f" Also `{alias}`." for alias in field.metadata.get("aliases", ()))
            yield f"--{field.name}", default, field.metadata["help"] + also
