"""What an evaluation looks like: a table for the terminal, JSON for programs, a heatmap of the routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srde.eval.evaluate import DomainResult, Evaluation

if TYPE_CHECKING:
    from rich.table import Table

NAMED = 2  # experts named per domain


def comparison_table(experts: Evaluation, base: Evaluation | None, num_routed: int) -> Table:
    """The table that `srde eval` and `srde quickstart` print: a line per domain, then all of them together.

    Args:
        experts: The model with its adapter.
        base: The same model without; None leaves its columns out.
        num_routed: Routed experts; shared ones are on for every token and not named.
    """
    from rich.table import Table

    table = Table(title="Held-out rows: base and srde" if base else "Held-out rows")
    table.add_column("domain")
    table.add_column("rows", justify="right")
    for name in ("accuracy", "loss"):
        if base:
            table.add_column(f"{name}\nbase", justify="right")
        table.add_column(f"{name}\nsrde", justify="right", style="bold")
    table.add_column("experts it used (share of gate)")
    for domain, result in experts.domains.items():
        table.add_row(*_line(domain, result, base.domains[domain] if base else None, num_routed))
    table.add_section()
    table.add_row(*_line("all", total(experts), total(base) if base else None, None))
    if experts.tokens_per_second and base and base.tokens_per_second:
        ratio = experts.tokens_per_second / base.tokens_per_second
        table.caption = (
            f"generating: base {base.tokens_per_second:.0f} tokens/s, srde {experts.tokens_per_second:.0f} tokens/s "
            f"({ratio:.2f}x)"
        )
    return table


def total(evaluation: Evaluation) -> DomainResult:
    """The mean over domains, each counting once."""
    results = list(evaluation.domains.values())
    scored = [r.accuracy for r in results if r.accuracy is not None]
    return DomainResult(
        rows=sum(r.rows for r in results),
        loss=sum(r.loss for r in results) / len(results),
        scored=sum(r.scored for r in results),
        accuracy=sum(scored) / len(scored) if scored else None,
        load_LE=None,
    )


def used_experts(load_LE: Tensor, num_routed: int) -> list[tuple[int, float]]:
    """Routed experts with their share of the routed gates over all layers, largest first."""
    load_E = load_LE[:, :num_routed].mean(0)
    share_E = load_E / load_E.sum()
    return [(int(e), float(share_E[e])) for e in share_E.argsort(descending=True)]


def as_json(experts: Evaluation, base: Evaluation | None) -> dict[str, Any]:
    """The same as plain JSON values."""
    out: dict[str, Any] = {"srde": _plain(experts)}
    if base:
        out["base"] = _plain(base)
    return out


def save_report(
    folder: str | Path, experts: Evaluation, base: Evaluation | None, num_routed: int
) -> list[Path]:
    """Writes `eval_results.json` and, for a model with experts, `plots/routing.png`.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "eval_results.json"]
    files[0].write_text(json.dumps(as_json(experts, base), indent=2) + "\n")
    if all(r.load_LE is not None for r in experts.domains.values()):
        files.append(routing_heatmap(folder / "plots" / "routing.png", experts, num_routed))
    return files


def routing_heatmap(path: Path, experts: Evaluation, num_routed: int) -> Path:
    """Draws how each domain's tokens were spread: domains x experts over all layers, and layer by layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains = list(experts.domains)
    loads = [experts.domains[d].load_LE for d in domains]
    share_DLE = torch.stack([load[:, :num_routed] for load in loads if load is not None])
    share_DLE = share_DLE / share_DLE.sum(-1, keepdim=True).clamp(min=1e-9)
    count, layers = len(domains), share_DLE.shape[1]
    figure = Figure(figsize=(4.2 + 1.5 * count, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, count + 1, width_ratios=[2.4, *[1] * count], squeeze=False)[0]
    top = float(share_DLE.max())
    mean_DE = share_DLE.mean(1).numpy()
    grid[0].imshow(mean_DE, cmap="viridis", vmin=0, vmax=float(mean_DE.max()), aspect="auto")
    grid[0].set_yticks(range(count), domains)
    grid[0].set_xticks(range(num_routed))
    grid[0].set_xlabel("expert")
    grid[0].set_title("all layers")
    for d in range(count):
        for e in range(num_routed):
            share = float(mean_DE[d, e])
            color = "white" if share < 0.6 * float(mean_DE.max()) else "black"
            grid[0].text(e, d, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)
    for axis, domain, share_LE in zip(grid[1:], domains, share_DLE.numpy(), strict=True):
        image = axis.imshow(
            share_LE, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="nearest"
        )
        axis.set_title(domain)
        axis.set_xlabel("expert")
        axis.set_xticks(range(0, num_routed, max(1, num_routed // 4)))
        axis.set_yticks([0, layers - 1] if axis is grid[1] else [])
    grid[1].set_ylabel("layer")
    figure.colorbar(image, ax=list(grid[1:]), label="share of the routed gates", shrink=0.85)
    figure.suptitle("Where each domain's tokens went (left: per cent of the gates)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _line(name: str, mine: DomainResult, base: DomainResult | None, num_routed: int | None) -> list[str]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    cells = [name, str(mine.rows)]
    cells += [percent(r.accuracy) for r in (base, mine) if r is not None]
    cells += [f"{r.loss:.3f}" for r in (base, mine) if r is not None]
    if mine.load_LE is None or num_routed is None:
        return [*cells, ""]
    used = used_experts(mine.load_LE, num_routed)[:NAMED]
    return [*cells, ", ".join(f"{expert} ({100 * share:.0f} %)" for expert, share in used)]


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "domains": {
            domain: {
                "rows": r.rows,
                "loss": r.loss,
                "scored": r.scored,
                "accuracy": r.accuracy,
                "expert_load": None if r.load_LE is None else r.load_LE.tolist(),
            }
            for domain, r in evaluation.domains.items()
        },
        "tokens_per_second": evaluation.tokens_per_second,
    }
