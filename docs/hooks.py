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
            table = [f"| `{name}` | {default} | {text} |" for name, default, text in rows()]
            markdown = markdown.replace(
                marker, "\n".join(["| Field | Default | Meaning |", "|---|---|---|", *table])
            )
    return markdown


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
