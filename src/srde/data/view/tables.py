"""Statistics as tables: plain cells that the terminal and the HTML page share, and their form for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from srde.data.view.reading import printable

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Sheet:
    """A table: its title, the names of its columns, its rows, sentences below it.

    The first column holds names, the last row may be the total.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    total: bool = False
    notes: tuple[str, ...] = ()


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.001 else f"{100 * share:.3f} %"


def sheets(stats: Mapping[str, Any]) -> Iterator[Sheet]:
    """All tables of `row_stats` or `set_stats`."""
    unit = stats["unit"]
    built = "held_out" in stats["total"]
    for title, names in (("By domain", stats["domains"]), ("By source", stats["sources"])):
        entries = [*names.items(), ("all", stats["total"])]
        columns = (
            title.removeprefix("By "),
            "rows",
            *(["held out"] if built else []),
            unit,
            f"trained {unit}",
            "share",
        )
        yield Sheet(
            title,
            columns,
            tuple(
                (
                    name,
                    f"{entry['rows']:,}",
                    *([f"{entry['held_out']:,}"] if built else []),
                    f"{entry['tokens']:,}",
                    f"{entry['trained_tokens']:,}",
                    percent(entry["share"]),
                )
                for name, entry in entries
            ),
            total=True,
        )
        yield Sheet(
            f"Length in {unit}, {title.lower()}",
            (columns[0], *stats["total"]["lengths"]),
            tuple((name, *(f"{value:,}" for value in entry["lengths"].values())) for name, entry in entries),
            total=True,
        )
    yield Sheet("Duplicates and leaks", ("what", "rows", "of", "rate"), tuple(_findings(stats)))
    for kind in ("domains", "sources"):
        yield _by_name(stats, kind)
    out = stats["left_out"]
    if out["by_reason"]:
        yield Sheet(
            "Left out, and why",
            ("reason", "rows", f"of {out['read']:,} read"),
            tuple(
                (name, f"{count:,}", percent(count / max(out["read"], 1)))
                for name, count in out["by_reason"].items()
            ),
        )
    if any(out["by_entry"].values()):
        yield Sheet(
            "Left out, by entry, before duplicates",
            ("entry", "reason", "rows"),
            tuple(
                (name, reason, f"{count:,}")
                for name, counts in out["by_entry"].items()
                for reason, count in counts.items()
            ),
        )
    if stats["packing"]:
        yield Sheet(
            "Packing",
            ("split", "packed rows", "examples", "tokens", "full"),
            tuple(
                (
                    name,
                    f"{split['rows']:,}",
                    f"{split['examples']:,}",
                    f"{split['tokens']:,}",
                    percent(split["filled"]),
                )
                for name, split in stats["packing"].items()
            ),
        )


def _findings(stats: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for kind in ("exact", "near"):
        found = stats["duplicates"]
        yield f"{kind} duplicates", f"{found[kind]:,}", f"{found['of']:,}", percent(found[f"{kind}_rate"])
    if (leak := stats["contamination"]) is not None:
        yield (
            "hold an evaluation question",
            f"{leak['contaminated']:,}",
            f"{leak['of']:,}",
            percent(leak["contaminated_rate"]),
        )
    else:
        yield "hold an evaluation question", "not compared", "", ""


def _by_name(stats: Mapping[str, Any], kind: str) -> Sheet:
    """The duplicates and leaks of each domain or source; what is not known is an empty cell."""
    one = kind.removesuffix("s")
    found = stats["rates"][kind]
    rows = [_rates(name, entry) for name, entry in found["by_name"].items()]
    return Sheet(
        f"Duplicates and leaks, by {one}",
        (one, "rows", "exact", "rate", "near", "rate", "leaks", "rate"),
        (*rows, _rates("all", stats)),
        total=True,
        notes=tuple(found["notes"]),
    )


def _rates(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    twins, leak = entry["duplicates"], entry["contamination"]
    cells = [name, f"{twins['of']:,}"]
    for kind in ("exact", "near"):
        cells += [f"{twins[kind]:,}", percent(twins[f"{kind}_rate"])]
    known = leak is not None and leak["contaminated"] is not None
    return (
        *cells,
        *((f"{leak['contaminated']:,}", percent(leak["contaminated_rate"])) if known else ("", "")),
    )


def as_group(stats: Mapping[str, Any]) -> Group:
    """All tables for a terminal of 80 columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(f"{printable(stats['path'])} ({stats['kind']})", style="bold"), Text()]
    for sheet in sheets(stats):
        table = Table(
            title=Text(sheet.title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0)
        )
        for place, name in enumerate(sheet.columns):
            # Names may be folded, numbers must not be.
            table.add_column(
                Text(printable(name)),
                justify="right" if place else "left",
                no_wrap=bool(place),
                overflow="fold",
            )
        for place, row in enumerate(sheet.rows, start=1):
            style = "bold" if sheet.total and place == len(sheet.rows) else ""
            table.add_row(*(Text(printable(cell)) for cell in row), style=style)
        parts += [table, *(Text(printable(note), style="dim") for note in sheet.notes), Text()]
    return Group(*parts[:-1])
