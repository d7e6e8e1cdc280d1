"""`srde data merge`: one data set from the parts of several machines."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Merges, uploads where asked to, and says what there is."""
    parser = argparse.ArgumentParser(prog="srde data merge", allow_abbrev=False)
    parser.add_argument(
        "--parts", nargs="+", required=True, help="the parts' work folders, each shard index once"
    )
    parser.add_argument("--work_dir", required=True, help="folder for the result")
    parser.add_argument("--model_name", help="where the model is here, if rows of a source are read again")
    parser.add_argument(
        "--num_proc", type=int, help="processes, if rows of a source are read again (default: cores)"
    )
    parser.add_argument("--upload_repo", help="data set on the hub, owner/name, that the result is pushed to")
    parser.add_argument("--private", action="store_true", help="make that data set private if it is new")
    args = parser.parse_args(argv)

    from rich.console import Console

    from srde.data.build.build import merge
    from srde.data.build.summary import summary
    from srde.data.build.upload import require_name, upload

    if args.upload_repo:
        require_name(args.upload_repo)
    console = Console(highlight=False, markup=False)
    built = merge(args.parts, args.work_dir, console, num_proc=args.num_proc, model_name=args.model_name)
    console.print(summary(built.report))
    console.print(f"train on it: srde train --pretokenized_dir {built.folder} ...", soft_wrap=True)
    if args.upload_repo:
        console.print(upload(args.work_dir, args.upload_repo, private=args.private))
    return 0
