"""Fills the pages with what the code says about itself when the site is built."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

FIELDS = "<!-- fields of SrdeConfig -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the marker with a table of the configuration's own fields: name, default, help."""
    if FIELDS not in markdown:
        return markdown
    from srde.tuner.config import SrdeConfig, config_fields

    default = {field.name: field.default for field in fields(SrdeConfig)}
    rows = [f"| `{name}` | `{default[name]!r}` | {text} |" for name, text in config_fields().items()]
    return markdown.replace(FIELDS, "\n".join(["| Field | Default | Meaning |", "|---|---|---|", *rows]))
