"""The files of an evaluation: all figures as JSON, every answer as JSONL, the routing as PNG, and one page."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from srde import __version__
from srde.data.view.reading import write_file
from srde.errors import UsageError
from srde.eval.page import page
from srde.eval.plain import answers, as_json
from srde.eval.results import Evaluation
from srde.eval.routing import RoutingStatistics
from srde.monitor.texts import printable

NAME = 24  # characters of a domain's name in a plot
PACKAGES = ("torch", "transformers", "peft")


def used_experts(load_LE: Tensor, num_routed: int) -> list[tuple[int, float]]:
    """Routed experts with their share of the routed gates over all layers, largest first."""
    load_E = load_LE[:, :num_routed].mean(0)
    share_E = load_E / load_E.sum()
    return [(int(e), float(share_E[e])) for e in share_E.argsort(descending=True)]


def save_report(
    folder: str | Path, experts: Evaluation, base: Evaluation | None, settings: Mapping[str, Any]
) -> list[Path]:
    """Writes `eval_results.json`, `answers.jsonl`, `report.html` and, for a model with experts, `plots/routing.png`.

    Args:
        folder: Made where it does not exist; other files in it stay.
        experts: The model with its adapter.
        base: The same model without, or None.
        settings: How it was measured, as plain values; goes into the JSON and onto the page.

    Returns:
        The files.

    Raises:
        UsageError: They cannot be written there.
    """
    folder = Path(folder)
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError.of(
            "output_dir", str(folder), rule=f"it cannot be written ({error.strerror})", fix="name a folder of yours"
        ) from error  # fmt: skip
    results = as_json(experts, base, settings)
    texts = {
        "eval_results.json": json.dumps(results, indent=2, allow_nan=False) + "\n",
        "answers.jsonl": "".join(
            json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in answers(experts, base)
        ),
        "report.html": page(experts, base, settings),
    }
    files = []
    for name, text in texts.items():
        write_file(folder / name, text)
        files.append(folder / name)
    if experts.routing is not None and experts.routing.domains:
        files.append(routing_heatmap(folder / "plots" / "routing.png", experts.routing))
    return files


def environment() -> dict[str, str]:
    """The versions of Python and of the packages that determine the numbers."""
    own = {"python": platform.python_version(), "srde": __version__}
    return own | {name: version(name) for name in PACKAGES}


def file_hash(path: str | Path) -> str:
    """The sha256 of a file."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def routing_heatmap(path: Path, routing: RoutingStatistics) -> Path:
    """Draws how each domain's tokens were spread: domains x experts over all layers, and layer by layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    share_DLE, mean_DE = routing.share_DLE, routing.share_DE
    count, layers, experts = share_DLE.shape
    shown = [printable(name) for name in routing.domains]
    domains = [(name if len(name) <= NAME else f"{name[: NAME - 1]}…").replace("$", r"\$") for name in shown]
    width = 0.42 * experts
    figure = Figure(figsize=(2 + width + 1.5 * count, max(4.6, 0.4 * count)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, count + 1, width_ratios=[max(2.4, width / 1.5), *[1] * count], squeeze=False)[0]
    top = float(share_DLE.max())
    grid[0].imshow(mean_DE, cmap="viridis", vmin=0, vmax=float(mean_DE.max()), aspect="auto")
    grid[0].set_yticks(range(count), domains)
    grid[0].set_xticks(range(experts))
    grid[0].set_xlabel("expert")
    grid[0].set_title("all layers")
    for d in range(count):
        for e in range(experts):
            color = "white" if mean_DE[d, e] < 0.6 * float(mean_DE.max()) else "black"
            grid[0].text(
                e, d, f"{100 * mean_DE[d, e]:.0f}", ha="center", va="center", color=color, fontsize=8
            )
    for axis, domain, share_LE in zip(grid[1:], domains, share_DLE, strict=True):
        image = axis.imshow(
            share_LE, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="nearest"
        )
        axis.set_title(domain)
        axis.set_xlabel("expert")
        axis.set_xticks(range(0, experts, max(1, experts // 4)))
        axis.set_yticks([0, layers - 1] if axis is grid[1] else [])
    grid[1].set_ylabel("layer")
    figure.colorbar(image, ax=list(grid[1:]), label="share of the routed gates", shrink=0.85)
    figure.suptitle("Where each domain's tokens went (left: per cent of the gates)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
