"""`srde import`: the prototype's `srde_weights.pt` as an adapter."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Reads the file, saves the adapter and says what it holds."""
    parser = argparse.ArgumentParser(prog="srde import", allow_abbrev=False)
    parser.add_argument(
        "--srde_weights",
        required=True,
        help="srde_weights.pt of the first prototype; read without running it",
    )
    parser.add_argument("--model_name_or_path", required=True, help="the base that it was trained on")
    parser.add_argument("--output_dir", required=True, help="folder of the adapter")
    parser.add_argument(
        "--dtype", default="auto", help="type of the base's weights (default: the checkpoint's)"
    )
    args = parser.parse_args(argv)

    from srde.hub.legacy import import_weights

    got = import_weights(args.srde_weights, args.model_name_or_path, args.output_dir, dtype=args.dtype)
    print(
        f"{got.experts} experts in {got.layers} layers, {got.values:,} changed weights each\n"
        "The prototype multiplied each MLP's output by the mean of these changes; srde computes with the changes themselves, so "
        "the answers are not the prototype's.\n"
        f"adapter: {args.output_dir}"
    )
    return 0
