"""`srde experts`: the life of the experts in a saved adapter. One small file per verb."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from srde.cli import no_such, usage

if TYPE_CHECKING:
    from srde.tuner.experts import Adapter

VERBS = {
    "list": "every expert: its name and state, how much it changes, what it shares with others, its load",
    "show": "one expert, layer by layer",
    "add": "one more expert, switched off until it is trained",
    "freeze": "experts that are used and never trained",
    "disable": "experts that are never chosen and never trained",
    "name": "give experts names",
    "replace": "put an expert of another adapter of the same base in an expert's place",
    "diff": "what differs between two adapters, expert by expert, to the bit",
}


def main(argv: list[str]) -> int:
    """Runs one verb of `srde experts`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage("srde experts", VERBS))
        return 0 if argv else 2
    if argv[0] not in VERBS:
        return no_such("srde experts", argv[0], VERBS, usage("srde experts", VERBS))
    return importlib.import_module(f"srde.cli.experts.{argv[0]}").main(argv[1:])


def flags(
    verb: str, description: str, *, writes: bool = False, in_place: bool = True
) -> argparse.ArgumentParser:
    """The flags that a verb on one adapter has.

    Args:
        verb: The verb.
        description: What it does.
        writes: Whether it makes an adapter.
        in_place: Whether it changes the adapter in place, if nothing else is said.
    """
    parser = argparse.ArgumentParser(prog=f"srde experts {verb}", allow_abbrev=False, description=description)
    parser.add_argument("--adapter", required=True, help="folder that srde train wrote")
    if writes:
        where = "the adapter's own, if not given" if in_place else "the adapter's own changes it in place"
        parser.add_argument("--output_dir", required=not in_place, help=f"new folder for the result; {where}")
    return parser


def save(adapter: Adapter, output_dir: str | None, said: Sequence[str]) -> int:
    """Writes an adapter, and says what was done and where it is."""
    from srde.tuner.experts import write_adapter

    place = output_dir or str(adapter.folder)
    write_adapter(adapter, place)
    print("\n".join([*said, f"adapter: {place}"]))
    return 0


def titles(adapter: Adapter, experts: Sequence[int]) -> str:
    """Experts with their numbers and names."""
    named = adapter.config.expert_names
    return ", ".join(f"{e} ({named[e]})" if named else str(e) for e in sorted(experts))
