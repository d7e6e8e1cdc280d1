"""`srde data check`: every defect of data files and built sets."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Prints the defects, one a line, and their number to stderr; 1 if there is any."""
    parser = argparse.ArgumentParser(
        prog="srde data check", allow_abbrev=False,
        description="Prints every defect, one a line: file:line: field: rule. Exit status 1 if there is any.",
    )  # fmt: skip
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="data files, folders of them, or built sets (a build's work_dir)",
    )
    parser.add_argument(
        "--model_name",
        "--model_name_or_path",
        help="model whose tokenizer and chat template the rows must fit",
    )
    parser.add_argument(
        "--max_length", type=int, help="tokens that a row of a data file may have; needs --model_name"
    )
    parser.add_argument(
        "--eval_file",
        nargs="+",
        default=[],
        help="evaluation rows, none of which a row of a data file may hold",
    )
    args, unknown = parser.parse_known_args(argv)

    import sys
    from pathlib import Path

    from srde.data.tokenizers import load_tokenizer
    from srde.data.view.check import check_rows, check_set
    from srde.data.view.reading import evaluation_index, find_set
    from srde.errors import ConfigError, refuse_unknown

    refuse_unknown(
        "data check", unknown, [flag for action in parser._actions for flag in action.option_strings]
    )
    sets = {path: place for path in args.paths if (place := find_set(path))}
    files = [path for path in args.paths if path not in sets]
    if args.max_length is not None:
        if args.max_length < 1:
            raise ConfigError.of("max_length", args.max_length, rule="it must be at least 1", fix="use 2048")
        if args.model_name is None:
            raise ConfigError.of(
                "max_length", args.max_length, rule="tokens are those of a model", fix="add --model_name"
            )
    for flag, value in (("max_length", args.max_length), ("eval_file", args.eval_file or None)):
        if value is not None and not files:
            raise ConfigError.of(
                flag, value, rule="it is for data files, and only built sets are named", fix="leave it out or name data files"
            )  # fmt: skip
    tokenizer = None if args.model_name is None else load_tokenizer(args.model_name)
    evaluation = evaluation_index(args.eval_file)

    defects = 0
    for path, place in sets.items():
        # Names are relative to the set; with several paths they say to which.
        prefix = f"{place}/" if len(args.paths) > 1 else ""
        for defect in check_set(Path(path), tokenizer):
            defects += 1
            print(f"{prefix}{defect}")
    if files:
        for defect in check_rows(files, tokenizer, args.max_length, evaluation=evaluation):
            defects += 1
            print(defect)
    print(f"{defects:,} defect{'' if defects == 1 else 's'}", file=sys.stderr)
    return 1 if defects else 0
