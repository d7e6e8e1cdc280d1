"""An evaluation in the terminal: a line per domain, what was lost, and what the routers did; within 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from srde.eval.results import Comparison, Difference, Evaluation, Result, compare
from srde.eval.routing import RoutingStatistics
from srde.eval.statistics import Estimate
from srde.monitor.texts import plural, printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

NAMED = 3
"""Experts named for each domain."""

MOST_DEAD = 8
BY = ("domain", "source")


def summary(experts: Evaluation, base: Evaluation | None = None, *, by: str = "domain") -> Group:
    """The whole report of `srde eval` and `srde quickstart`.

    Args:
        experts: The model with its adapter.
        base: The same model without, on the same rows; None leaves it and the differences out.
        by: "source" adds a line for each source under its domain.
    """
    from rich.console import Group
    from rich.text import Text

    paired = compare(experts, base) if base else None
    parts = [result_table(experts, base, paired, by=by)]
    parts += [Text(note) for note in notes(experts, base)]
    if experts.routing is not None:
        parts += [Text(""), routing_table(experts.routing), *map(Text, routing_notes(experts.routing))]
    return Group(*parts)


def result_table(
    experts: Evaluation, base: Evaluation | None, paired: Comparison | None, *, by: str = "domain"
) -> Table:
    """Accuracy and loss by domain, over all, and on general text."""
    from rich.table import Table
    from rich.text import Text

    title = "Held-out rows: base → srde (difference ± half of its 95 % interval)" if base else "Held-out rows"
    table = Table(title=title)
    shown = [*experts.domains, *(["general text"] if experts.general else [])]
    table.add_column("domain", min_width=min(max(map(len, shown)), 12), overflow="fold")
    for name in ("scored", "accuracy, %", "loss, nats per token"):  # the names give way, the figures do not
        table.add_column(name, justify="right")  # narrow terminals break these, at their spaces

    def add(
        name: str, mine: Result, other: Result | None, change: Difference | None, style: str = ""
    ) -> None:
        accuracy = _cell(
            mine.accuracy_estimate,
            other.accuracy_estimate if other else None,
            change.accuracy if change else None,
            100,
            1,
        )
        loss = _cell(
            mine.loss_estimate, other.loss_estimate if other else None, change.loss if change else None, 1, 3
        )
        cells = (printable(name), f"{mine.scored:,}/{mine.rows:,}", accuracy, loss)
        table.add_row(*(Text(cell) for cell in cells), style=style)

    for domain, mine in experts.domains.items():
        add(domain, mine, base and base.domains[domain], paired and paired.domains[domain])
        for key in (key for key in experts.sources if by == "source" and key[0] == domain):
            add(
                f"  {key[1]}",
                experts.sources[key],
                base and base.sources[key],
                paired and paired.sources[key],
                "dim",
            )
    table.add_section()
    add("all", experts.total, base.total if base else None, paired.total if paired else None, "bold")
    if experts.general_loss is not None:
        table.add_section()
        loss = _cell(
            experts.general_loss,
            base.general_loss if base else None,
            paired.general if paired else None,
            1,
            3,
        )
        table.add_row("general text", f"0/{len(experts.general):,}", "-", loss)
    return table


def notes(experts: Evaluation, base: Evaluation | None) -> list[str]:
    """What the table does not say by itself."""
    found = ["all: the mean over domains, each counting once."]
    if experts.total.not_run:
        found.append(
            f"{plural(experts.total.not_run, 'program')} not run: the rows of kind code have a loss and no score. "
            "--confirm_run_unsafe_code runs what the model writes."
        )
    if experts.total.by_text:
        found.append(
            f"{plural(experts.total.by_text, 'choice row')} scored by the text, as the letters were not found in the prompt."
        )
    if experts.tokens_per_second and base and base.tokens_per_second:
        ratio = experts.tokens_per_second / base.tokens_per_second
        found.append(
            f"generating: base {base.tokens_per_second:.0f} tokens/s, srde {experts.tokens_per_second:.0f} tokens/s "
            f"({ratio:.2f}x)"
        )
    return found


def routing_table(routing: RoutingStatistics) -> Table:
    """The experts that each domain used most."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Routing")
    table.add_column("domain", max_width=24, overflow="fold")
    table.add_column("experts it used most (share of the routed gates)")
    for domain, share_E in zip(routing.domains, routing.share_DE, strict=True):
        used = [(int(e), float(share_E[e])) for e in np.argsort(-share_E, kind="stable")[:NAMED]]
        names = ", ".join(f"{routing.names[e]} ({100 * share:.0f} %)" for e, share in used if share > 0)
        table.add_row(Text(printable(domain)), Text(printable(names)))
    return table


def routing_notes(routing: RoutingStatistics) -> list[str]:
    """Load, entropy, dead experts and the tie between domain and expert, a line each."""
    layers, experts = routing.share_LE.shape
    per_cent = [
        100 * routing.relative(float(values.mean()))
        for values in (routing.entropy_L, routing.token_entropy_L)
    ]
    lines = [
        f"load: {plural(experts, 'expert')} in {plural(layers, 'layer')}, {routing.tokens:,} tokens",
        f"entropy: {routing.entropy_L.mean():.2f} nats of the load ({per_cent[0]:.0f} % of even use), "
        f"{routing.token_entropy_L.mean():.2f} nats of a token's gates ({per_cent[1]:.0f} %)",
        f"dead experts: {len(routing.dead):,} of {layers * len(routing.open_experts):,}{_where(routing)}",
    ]
    if found := routing.specialisation:
        lines.append(
            f"domain and expert: {found.mean:.3f} bits of mutual information ({found.chance:.3f} by chance, "
            f"p = {found.p_value:.3f})"
        )
    return lines


def _where(routing: RoutingStatistics) -> str:
    if not routing.dead:
        return ""
    named = ", ".join(f"{layer}:{expert}" for layer, expert in routing.dead[:MOST_DEAD])
    more = ", ..." if len(routing.dead) > MOST_DEAD else ""
    return f" (layer:expert {named}{more})"


def _cell(
    mine: Estimate | None, other: Estimate | None, change: Estimate | None, factor: int, digits: int
) -> str:
    """`30.2 → 41.1 (+10.9 ± 3.2)`, or `41.1 ± 1.4` without a base; `-` where nothing was scored."""
    if mine is None:
        return "-"
    if other is None or change is None:
        return f"{factor * mine.value:.{digits}f}{_width(mine, factor, digits)}"
    return (
        f"{factor * other.value:.{digits}f} → {factor * mine.value:.{digits}f} "
        f"({factor * change.value:+.{digits}f}{_width(change, factor, digits)})"
    )


def _width(estimate: Estimate, factor: int, digits: int) -> str:
    return "" if estimate.half_width is None else f" ± {factor * estimate.half_width:.{digits}f}"
