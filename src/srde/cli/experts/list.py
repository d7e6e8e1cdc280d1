"""`srde experts list`: every expert of an adapter."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Prints a table, or JSON."""
    from srde.cli.experts import flags

    parser = flags("list", "Prints every expert of an adapter.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    import json
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from srde.cli.experts.load import known_load
    from srde.tuner.experts import describe_experts, read_adapter

    adapter = read_adapter(args.adapter)
    experts = describe_experts(adapter)
    load = known_load(Path(args.adapter), adapter.config.num_experts)
    for one in experts:
        one["load"] = None if load is None or one["number"] is None else load[0][one["number"]]
    if args.json:
        print(json.dumps({"experts": experts, "load_from": load and load[1]}, indent=2))
        return 0
    table = Table()
    for column in ("expert", "name", "state", "rewrites", "size", "overlap", *(["load"] if load else [])):
        table.add_column(column, justify="left" if column in ("name", "state") else "right")
    for one in experts:
        number = one["number"]
        cells = ["" if number is None else str(number), "" if one["name"] == str(number) else one["name"]]
        cells += [
            ", ".join(one["state"]),
            f"{one['share']:.2%}",
            f"{one['norm']:.3f}",
            f"{one['overlap']:.0%}",
        ]
        cells += ["" if one["load"] is None else f"{one['load']:.1%}"] if load else []
        table.add_row(*cells)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    config = adapter.config
    console.print(
        f"{len(adapter.layers)} layers, top {config.top_k} of {config.num_experts}, by {config.granularity}; rewrites: "
        "share of the MLPs' weights that it changes; size: norm of the change; overlap: what others rewrite too"
        + (f"; load: from {load[1]}" if load else ""),
        soft_wrap=True,
    )
    return 0
