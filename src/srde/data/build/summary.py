"""What a build made, as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group
from rich.table import Table


def summary(report: dict[str, Any]) -> Group:
    """Rows and tokens by domain, what was left out by source, and how full the packed rows are."""
    domains = Table("domain", title="What there is", title_justify="left")
    for name in ("training rows", "held-out rows", "training tokens"):
        domains.add_column(name, justify="right")
    for name, counts in report["domains"].items():
        domains.add_row(
            name, f"{counts['train']:,}", f"{counts['validation']:,}", f"{counts['train_tokens']:,}"
        )

    reasons = Counter[str]()
    for counts in report["entries"].values():
        reasons.update(counts)
    usable = sum(counts["usable"] for counts in report["sources"].values())
    used = sum(split["examples"] for split in report["splits"].values())
    out = Table("left out", title=f"What became of {reasons.pop('read', 0):,} rows", title_justify="left")
    out.add_column("rows", justify="right")
    doubles = {
        f"{kind} duplicate": sum(counts[f"{kind}_duplicates"] for counts in report["sources"].values())
        for kind in ("exact", "near")
    }
    for reason, count in {**dict(sorted(reasons.items())), **doubles}.items():
        out.add_row(reason, f"{count:,}")
    out.add_row("not needed", f"{usable - sum(doubles.values()) - used:,}")
    out.add_row("used", f"{used:,}", style="bold")

    train = report["splits"]["train"]
    packed = (
        f"{train['tokens']:,} training tokens ({train['trained_tokens']:,} of them trained) in {train['rows']:,} packed rows, "
        f"{100 * train['filled']:.1f} % full; compared with {len(report['evaluation'])} evaluation sets"
    )
    return Group(domains, out, packed)
