"""`srde train`: trains experts on a frozen model."""

from __future__ import annotations

import sys
from typing import Any


def main(argv: list[str]) -> int:
    """Trains and says where the adapter is."""
    from srde.train.arguments import parse
    from srde.train.run import run, trained_parameters

    arguments = parse(argv)
    outcome = run(*arguments)
    if not outcome.is_main:
        return 0
    m = outcome.metrics
    if m["rows_left_out"]:
        print(f"{m['rows_left_out']} rows were longer than --max_length and left out", file=sys.stderr)
    if m["bad_rows"]:
        print(
            f"{m['bad_rows']} rows broke a rule and were left out; `srde data check` names them",
            file=sys.stderr,
        )
    if m.get("domains"):
        print(_held_out(m))
    print(
        f"trained {trained_parameters(outcome.model):,} parameters on {m['rows']:,} rows ({m['trained_tokens']:,} trained "
        f"tokens) in {m['seconds']:.0f} s; loss {m['train_loss']:.3f}\nadapter: {outcome.output_dir}"
    )
    return 0


def _held_out(metrics: dict[str, Any]) -> str:
    """Held-out loss by domain against the base, and how far the experts differ by domain."""
    from srde.monitor.run import specialisation_text

    rows = [
        *metrics["domains"].items(),
        ("all", {"loss": metrics["eval_loss"], "base_loss": metrics["base_eval_loss"]}),
    ]
    width = max(len(name) for name, _ in rows)
    lines = ["held-out loss", f"{'':<{width}}     base     srde"]
    for name, one in rows:
        base = "        -" if one["base_loss"] is None else f"{one['base_loss']:9.3f}"
        lines.append(f"{name:<{width}}{base}{one['loss']:9.3f}")
    differ = specialisation_text(metrics)
    return "\n".join([*lines, f"experts: {differ}"] if differ else lines)
