"""One HTML page with all statistics: no script, nothing loaded from outside, readable in the light and in the dark."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from srde.data.view.plots import plots
from srde.data.view.reading import printable
from srde.data.view.tables import Sheet, percent, sheets

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1d1d1f; --soft: #6b6b70; --line: #dcdce0; --tile: #f4f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16171a; --ink: #e8e8ea; --soft: #a0a0a6; --line: #3a3b40; --tile: #222327; }
}
body { background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { color: var(--soft); margin-top: .3rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.tiles div { background: var(--tile); border-radius: .5rem; padding: .6rem 1rem; }
.tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; } .tiles span { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } tr.all td { font-weight: 600; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
svg { width: 100%; height: auto; color: var(--ink); }
"""


def page(stats: Mapping[str, Any]) -> str:
    """The page for `row_stats` or `set_stats`; whatever comes from the data is escaped."""
    title = f"Data: {printable(stats['path'])}"
    figures = "".join(
        f"<h2>{_text(name)}</h2>\n<div class=wide>{svg}</div>\n" for name, svg in plots(stats).items()
    )
    tables = "".join(_table(sheet) for sheet in sheets(stats))
    return document(
        title,
        f"<h1>{_text(title)}</h1>\n<p>{_text(_subtitle(stats))}</p>\n{_tiles(stats)}{figures}{tables}",
    )


def document(title: str, body: str, style: str = "") -> str:
    """A whole page around a body that is HTML already."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(title)}</title>\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _subtitle(stats: Mapping[str, Any]) -> str:
    if stats["kind"] == "built set":
        return "A built set. Figures are of the training rows, as packed; what was left out is from the build's report."
    return f"Data files. Lengths are {stats['unit']}; rows that cannot be used count as left out and nowhere else."


def _tiles(stats: Mapping[str, Any]) -> str:
    total, twins, leak = stats["total"], stats["duplicates"], stats["contamination"]
    tiles = {
        "rows": f"{total['rows']:,}",
        stats["unit"]: f"{total['tokens']:,}",
        f"trained {stats['unit']}": f"{total['trained_tokens']:,}",
        "exact duplicates": percent(twins["exact_rate"]),
        "near duplicates": percent(twins["near_rate"]),
        "hold an evaluation question": "not compared" if leak is None else percent(leak["contaminated_rate"]),
    }
    for name, split in stats["packing"].items():
        tiles[f"{name}: packed rows are full"] = percent(split["filled"])
    boxes = (f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in tiles.items())
    return f"<div class=tiles>{''.join(boxes)}</div>\n"


def _table(sheet: Sheet) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in sheet.columns)
    last = len(sheet.rows) if sheet.total else 0
    rows = "".join(
        f"<tr{' class=all' if place == last else ''}>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>\n"
        for place, row in enumerate(sheet.rows, start=1)
    )
    notes = "".join(f"<p>{_text(note)}</p>\n" for note in sheet.notes)
    return f"<h2>{_text(sheet.title)}</h2>\n<div class=wide><table>\n<tr>{head}</tr>\n{rows}</table></div>\n{notes}"


def _text(value: str) -> str:
    return escape(printable(value))
