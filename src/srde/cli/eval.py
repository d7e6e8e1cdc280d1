"""`srde eval`: base and experts on held-out rows."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Prints the table, and writes JSON and the routing heatmap if asked."""
    parser = argparse.ArgumentParser(prog="srde eval", allow_abbrev=False)
    parser.add_argument(
        "--adapter", "--checkpoint", required=True, help="folder that srde train wrote, or hub id"
    )
    parser.add_argument("--eval_file", required=True, help="JSONL with held-out rows")
    parser.add_argument(
        "--compare_baseline", action="store_true", help="measure the base on the same rows too"
    )
    parser.add_argument("--output_dir", help="folder for eval_results.json and plots/routing.png")
    parser.add_argument("--model_name_or_path", help="another place to load the same base from")
    parser.add_argument(
        "--dtype", default="auto", help="type of the base's weights (default: the checkpoint's)"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--max_rows", type=int, help="only the first rows of the file")
    args = parser.parse_args(argv)

    from rich.console import Console

    from srde.data.rows import read_rows
    from srde.eval.evaluate import evaluate
    from srde.eval.report import comparison_table, save_report
    from srde.tuner.loading import load_adapter

    rows = read_rows(args.eval_file)[: args.max_rows]
    model, tokenizer = load_adapter(args.adapter, args.dtype, args.model_name_or_path)
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    base = None
    if args.compare_baseline:
        with model.disable_adapter():
            base = evaluate(model, tokenizer, rows, **options)
    experts = evaluate(model, tokenizer, rows, **options)
    num_routed = model.peft_config["default"].num_experts
    Console().print(comparison_table(experts, base, num_routed))
    if args.output_dir:
        for file in save_report(args.output_dir, experts, base, num_routed):
            print(file)
    return 0
