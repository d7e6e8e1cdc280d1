"""`srde data sources`: what there is to build from."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Prints a table of the sources, or one entry whole."""
    parser = argparse.ArgumentParser(prog="srde data sources", allow_abbrev=False)
    parser.add_argument(
        "names", nargs="*", help="registered names or YAML files; all registered ones if none is given"
    )
    parser.add_argument("--domains", nargs="+", help="only these domains")
    args = parser.parse_args(argv)

    from rich.console import Console
    from rich.table import Table

    from srde.data.sources.registry import choose_sources, registered

    chosen = choose_sources(args.names) if args.names else list(registered().values())
    table = Table(
        "source", "domain", "from", "train", "evaluation", "licence", box=None, padding=(0, 2, 0, 0)
    )
    for source in chosen:
        if args.domains and source.domain not in args.domains:
            continue
        table.add_row(
            source.name,
            source.domain or "by row",
            source.place,
            f"{source.rows:,}" if source.rows and source.train else "all" if source.train else "never",
            ", ".join(source.evaluation),
            source.license or "by row",
        )
    Console(markup=False).print(table)
    return 0
