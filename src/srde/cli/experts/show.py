"""`srde experts show`: one expert, layer by layer."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Prints a table, or JSON."""
    from srde.cli.experts import flags

    parser = flags("show", "Prints one expert layer by layer.")
    parser.add_argument("expert", metavar="E", help="name or number")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    import json

    from rich.console import Console
    from rich.table import Table

    from srde.cli.experts import titles
    from srde.tuner.experts import describe_expert, one_expert, read_adapter

    adapter = read_adapter(args.adapter)
    expert = one_expert(adapter.config, args.expert)
    rows = describe_expert(adapter, expert)
    if args.json:
        print(
            json.dumps({"expert": expert, "name": adapter.config.name_of(expert), "layers": rows}, indent=2)
        )
        return 0
    unit = "neurons" if adapter.config.granularity == "neuron" else "entries"
    table = Table(title=f"expert {titles(adapter, [expert])}", title_justify="left")
    for column in ("layer", unit, "changed", "size", "router row", "largest overlaps"):
        words = column in ("layer", "largest overlaps")
        table.add_column(column, justify="left" if words else "right", no_wrap=column == "layer")
    for one in rows:
        overlaps = ", ".join(f"{name} {share:.0%}" for name, share in one["overlaps"])
        numbers = [
            f"{one['rewritten']:,}",
            f"{one['changed']:,}",
            f"{one['norm']:.3f}",
            f"{one['router_norm']:.3f}",
        ]
        table.add_row(one["layer"], *numbers, overlaps)
    Console(highlight=False, markup=False, emoji=False).print(table)
    return 0
