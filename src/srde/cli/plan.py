"""`srde plan`: what a model with experts will need, before a weight is loaded."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Prints the plan, and writes it as JSON where asked to."""
    import json
    from pathlib import Path

    from rich.console import Console

    from srde.plan import make_plan
    from srde.plan.arguments import parse
    from srde.plan.table import NOTES, as_table, headline

    arguments, request = parse(argv)
    with Console(stderr=True).status("") as status:
        plan = make_plan(request, lambda what: status.update(f"planning: {what}"))
    console = Console(highlight=False, markup=False)
    console.print(headline(plan))
    console.print(as_table(plan, arguments.gradient_checkpointing))
    console.print(NOTES)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(plan.to_dict(), indent=2) + "\n", encoding="utf-8")
        console.print(f"All figures: {arguments.json}")
    return 0
