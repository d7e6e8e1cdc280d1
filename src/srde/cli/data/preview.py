"""`srde data preview`: rows as the model sees them."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Prints rows with what is trained marked, and writes them as an HTML page where asked to."""
    parser = argparse.ArgumentParser(
        prog="srde data preview", allow_abbrev=False,
        description="Prints rows as the model sees them, special tokens included, with what is trained marked.",
    )  # fmt: skip
    parser.add_argument(
        "path", metavar="PATH", help="a data file, a folder of them, or a built set (a build's work_dir)"
    )
    parser.add_argument(
        "--row", type=int, help="line of the data file, or packed row, to begin with; counted from 1"
    )
    parser.add_argument("--count", type=int, default=1, help="how many rows (default: 1)")
    parser.add_argument("--domain", help="only rows of this domain; of packed rows, only its examples")
    parser.add_argument(
        "--model_name",
        "--model_name_or_path",
        help="model whose tokenizer is used; a built set may name its own",
    )
    parser.add_argument("--html", help="file for a page with the rows")
    args, unknown = parser.parse_known_args(argv)

    from pathlib import Path

    from rich.console import Console

    from srde.data.tokenizers import load_tokenizer
    from srde.data.view.preview import as_page, as_text, preview_rows, preview_set
    from srde.data.view.reading import find_set, write_file
    from srde.data.view.shards import open_set
    from srde.errors import ConfigError, refuse_unknown

    refuse_unknown(
        "data preview", unknown, [flag for action in parser._actions for flag in action.option_strings]
    )
    for flag in ("row", "count"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise ConfigError.of(flag, value, rule="it is counted from 1", fix="use 1 or more")
    folder, model = find_set(args.path), args.model_name
    if model is None and folder is None:
        raise ConfigError.of(
            "model_name",
            None,
            rule="rows are shown as a model's tokenizer splits them",
            fix="name the model with --model_name",
        )
    if model is None:
        model = open_set(folder, whole=False).metadata["model"]
        if "/" not in model and not Path(model).is_dir():
            raise ConfigError.of(
                "model_name", None, rule=f"the set was made for a model in a folder {model!r}, which is not here",
                fix="name the model with --model_name",
            )  # fmt: skip
    tokenizer = load_tokenizer(model)
    chosen = {"row": args.row, "count": args.count, "domain": args.domain}
    rows = (
        preview_rows(args.path, tokenizer, **chosen)
        if folder is None
        else preview_set(folder, tokenizer, **chosen)
    )
    console = Console(highlight=False, markup=False, emoji=False)
    color = console.color_system is not None and not console.no_color
    shown = []
    for row in rows:
        shown.append(row)
        console.print(as_text(row, color=color), soft_wrap=True)
    if args.html:
        write_file(args.html, as_page(shown, f"Rows of {args.path}"))
        console.print(f"Page: {args.html}", soft_wrap=True)
    return 0
