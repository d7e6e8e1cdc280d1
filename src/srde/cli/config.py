"""`srde config`: what a file of settings says, before anything is trained with it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srde.train.phases import Phases


def main(argv: list[str]) -> int:
    """Checks a file, or shows the settings that a run with it would have."""
    parser = argparse.ArgumentParser(
        prog="srde config", allow_abbrev=False,
        description="Checks and shows the settings of `srde train --config FILE [flags]`. Opens neither data nor model.",
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{check,show}")
    check = verbs.add_parser(
        "check", allow_abbrev=False, help="say what is wrong in it, or that nothing is",
        description="Exit status 0 if `srde train` would take the settings, 1 if not; the message says why.",
    )  # fmt: skip
    show = verbs.add_parser(
        "show", allow_abbrev=False, help="print the settings that a run would have, and its phases",
        description="Prints the settings that differ from their defaults, as a file for --config; secrets as ***.",
    )  # fmt: skip
    for verb in (check, show):
        verb.add_argument("file", metavar="FILE", help="YAML file; flags of srde train may follow and win")
    show.add_argument("--all", action="store_true", help="print the settings that have their defaults, too")
    args, flags = parser.parse_known_args(argv)

    from srde.train.resolve import as_yaml, changed, resolve, unchanged

    resolved = resolve(["--config", args.file, *flags])
    if args.verb == "check":
        print(f"{args.file}: srde train takes these settings; {_sentence(resolved.phases)}")
        return 0
    print(as_yaml(changed(resolved)), end="")
    if args.all:
        print("\n# as by default\n" + as_yaml(unchanged(resolved)), end="")
    print(f"\n{_table(resolved.phases)}")
    return 0


def _sentence(phases: Phases | None) -> str:
    if phases is None:
        return "the steps follow from the data"
    return f"{phases.max_steps:,} steps in {len(phases.all)} phase{'' if len(phases.all) == 1 else 's'}"


def _table(phases: Phases | None) -> str:
    """The phases as comments, so that all of the output is YAML."""
    if phases is None:
        return "# The number of steps, and with it the phases, follows from the data (--num_train_epochs)."
    lines = [f"# {'phase':<18}  {'from':>7}  {'to':>7}  {'steps':>7}"]
    lines += [f"# {p.name:<18}  {p.start:>7,}  {p.end:>7,}  {p.end - p.start:>7,}" for p in phases]
    return "\n".join(lines)
