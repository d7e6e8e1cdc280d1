"""`srde train`: trains experts on a frozen model."""

from __future__ import annotations

import sys


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
    print(
        f"trained {trained_parameters(outcome.model):,} parameters on {m['rows']:,} rows ({m['trained_tokens']:,} trained "
        f"tokens) in {m['seconds']:.0f} s; loss {m['train_loss']:.3f}\nadapter: {outcome.output_dir}"
    )
    return 0
