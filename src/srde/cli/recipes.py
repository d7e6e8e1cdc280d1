"""`srde recipes`: files of settings that come with srde."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Lists the recipes, or copies one."""
    parser = argparse.ArgumentParser(
        prog="srde recipes", allow_abbrev=False,
        description="Files of settings that come with srde: for `srde train --config`, and for `accelerate launch`.",
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{ls,cp}")
    verbs.add_parser("ls", help="list the recipes")
    cp = verbs.add_parser("cp", help="copy one, to be changed and run")
    cp.add_argument("name", metavar="NAME", help="as `srde recipes ls` lists it")
    cp.add_argument(
        "dest", metavar="DEST", nargs="?", default=".", help="a new file, or a folder (default: this one)"
    )
    args = parser.parse_args(argv)

    from srde.recipes import copy_recipe, first_comment, recipes

    if args.verb == "ls":
        known = recipes()
        width = max(map(len, known))
        for name, text in known.items():
            print(f"{name:<{width}}  {first_comment(text)}".rstrip())
        return 0
    path = copy_recipe(args.name, args.dest)
    print(path)
    if "/" not in args.name:  # those of folders are for other programs
        print(f"Change model and data in it, then:\n  srde config check {path}\n  srde train --config {path}")
    return 0
