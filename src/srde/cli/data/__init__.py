"""`srde data`: builds data sets and looks at them. One small file per verb."""

from __future__ import annotations

import importlib

from srde.cli import no_such, usage

VERBS = {
    "build": "rows from hub, files and generators to a packed set: cleaned, deduplicated, decontaminated, balanced",
    "merge": "join the parts that several machines have built",
    "sources": "the registered data sets, and those of your YAML files",
    "check": "every defect of data files and built sets, as file:line: field: rule",
    "stats": "counts, lengths, duplicates and leaks, as tables and as an HTML page",
    "preview": "rows as the model sees them, trained tokens marked",
}


def main(argv: list[str]) -> int:
    """Runs one verb of `srde data`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage("srde data", VERBS))
        return 0 if argv else 2
    if argv[0] not in VERBS:
        return no_such("srde data", argv[0], VERBS, usage("srde data", VERBS))
    return importlib.import_module(f"srde.cli.data.{argv[0]}").main(argv[1:])
