"""`srde data stats`: counts, lengths, duplicates and leaks of data files or a built set."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Prints tables; writes JSON and an HTML page where asked to."""
    parser = argparse.ArgumentParser(
        prog="srde data stats", allow_abbrev=False,
        description="Prints counts, lengths, duplicates and leaks of data files or a built set, by domain and by source.",
    )  # fmt: skip
    parser.add_argument(
        "path", metavar="PATH", help="a data file, a folder of them, or a built set (a build's work_dir)"
    )
    parser.add_argument(
        "--model_name",
        "--model_name_or_path",
        help="model whose tokens are counted; without it, words of data files",
    )
    parser.add_argument(
        "--eval_file", nargs="+", default=[], help="evaluation rows to look for in data files"
    )
    parser.add_argument("--html", help="file for one page with all tables and plots")
    parser.add_argument("--json", help="file for all figures")
    args, unknown = parser.parse_known_args(argv)

    import json

    from rich.console import Console

    from srde.data.tokenizers import load_tokenizer
    from srde.data.view.page import page
    from srde.data.view.reading import evaluation_index, find_set, write_file
    from srde.data.view.stats import row_stats, set_stats
    from srde.data.view.tables import as_group
    from srde.errors import ConfigError, refuse_unknown

    refuse_unknown(
        "data stats", unknown, [flag for action in parser._actions for flag in action.option_strings]
    )
    console = Console(highlight=False, markup=False, emoji=False)
    if folder := find_set(args.path):
        for flag in ("model_name", "eval_file"):
            if value := getattr(args, flag):
                raise ConfigError.of(
                    flag,
                    value,
                    rule="it is for data files, and this is a built set with figures of its own",
                    fix="leave it out",
                )
        stats = set_stats(folder)
    else:
        tokenizer = None if args.model_name is None else load_tokenizer(args.model_name)
        stats = row_stats(args.path, tokenizer, evaluation_index(args.eval_file))
    console.print(as_group(stats))
    if args.json:
        write_file(args.json, json.dumps(stats, indent=2) + "\n")
        console.print(f"\nAll figures: {args.json}", soft_wrap=True)
    if args.html:
        write_file(args.html, page(stats))
        console.print(f"\nPage: {args.html}", soft_wrap=True)
    return 0
