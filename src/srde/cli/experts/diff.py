"""`srde experts diff`: what differs between two adapters."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Prints a table, or JSON; the exit status is 0 if nothing differs, and 1 if something does."""
    parser = argparse.ArgumentParser(
        prog="srde experts diff", allow_abbrev=False,
        description="Compares two adapters expert by expert, to the bit. Exit status: 0 nothing differs, 1 something does.",
    )  # fmt: skip
    parser.add_argument("one", metavar="A", help="folder of an adapter")
    parser.add_argument("two", metavar="B", help="folder of another")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from srde.tuner.experts import compare_adapters, read_adapter

    found = compare_adapters(read_adapter(args.one), read_adapter(args.two))
    status = 0 if found.identical else 1
    if args.json:
        print(json.dumps({"identical": found.identical, **asdict(found)}, indent=2))
        return status
    table = Table()
    for column in ("expert", "name", "", "places", "values", "change", "router row"):
        table.add_column(column, justify="left" if column in ("name", "") else "right")
    for one in found.experts:
        head = ["" if one["number"] is None else str(one["number"])]
        head.append("" if one["name"] == head[0] else one["name"])
        if one["identical"]:
            table.add_row(*head, "identical")
        elif "only_in" in one:
            table.add_row(*head, f"only in {one['only_in']}")
        else:
            values = "" if one["values"] is None else f"{one['values']:,} differ"
            numbers = [_percent(one[name]) for name in ("values_change", "router")]
            table.add_row(*head, "differs", f"{one['masks']:.0%} differ", values, *numbers)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    for name, (before, now) in found.settings.items():
        console.print(f"{name}: {before!r} in {args.one}, {now!r} in {args.two}", soft_wrap=True)
    for name in found.tensors:
        console.print(f"differs: {name}", soft_wrap=True)
    return status


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
