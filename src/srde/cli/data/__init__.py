"""`srde data`: builds data sets and looks at them. One small file per verb."""

from __future__ import annotations

import difflib
import importlib
import sys

VERBS = {
    "build": "rows from hub, files and generators to a packed set: cleaned, deduplicated, decontaminated, balanced",
    "merge": "join the parts that several machines have built",
    "sources": "the registered data sets, and those of your YAML files",
    "check": "every defect of data files and built sets, as file:line: field: rule",
    "stats": "counts, lengths, duplicates and leaks, as tables and as an HTML page",
    "preview": "rows as the model sees them, trained tokens marked",
}


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return f"usage: srde data <verb> [options]\n\n{verbs}\n\nsrde data <verb> --help shows a verb's options."


def main(argv: list[str]) -> int:
    """Runs one verb of `srde data`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    verb = argv[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"srde data: there is no verb {verb!r}.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(f"srde.cli.data.{verb}").main(argv[1:])
