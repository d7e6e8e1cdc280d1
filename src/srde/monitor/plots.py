"""A run as PNGs: loss, expert load, sparsity and learning rate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srde.monitor.history import Floats, number, thinned
from srde.monitor.routing import share_history
from srde.monitor.run import Run
from srde.monitor.texts import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RAW_POINTS = 2000
SMOOTH_POINTS = 150
_TRAIN, _HELD_OUT, _BASE = "#0072b2", "#d55e00", "#6b6b70"
_SETTINGS: dict[Any, Any] = {
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def save_plots(run: Run, folder: str | os.PathLike[str]) -> list[Path]:
    """Draws what the run has told so far; a plot that there is nothing to show in is left out.

    Args:
        run: The run.
        folder: Where `loss.png`, `experts.png` and `schedule.png` go; it is made. Each file appears whole.

    Returns:
        The files.
    """
    from matplotlib import rc_context

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with rc_context(_SETTINGS), warnings.catch_warnings():
        # Names from a run's files may hold letters that the font lacks; the plot shows boxes for them.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        for name, draw in (("loss", _loss), ("experts", _experts), ("schedule", _schedule)):
            figure = draw(run)
            if figure is not None:
                files.append(_save(figure, folder / f"{name}.png"))
    return files


def _loss(run: Run) -> Figure | None:
    step_N, loss_N = thinned(run.train["step"], run.train["loss"], RAW_POINTS)
    evals = evaluations(run.evals)
    if not len(step_N) and not evals:
        return None
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    smooth = len(step_N) >= 2 * SMOOTH_POINTS
    axes.plot(
        step_N,
        loss_N,
        color=_TRAIN,
        alpha=0.3 if smooth else 1,
        linewidth=0.9,
        label=None if smooth else "training",
    )
    if smooth:
        axes.plot(
            *thinned(step_N, loss_N, SMOOTH_POINTS), color=_TRAIN, linewidth=1.8, label="training (median)"
        )
    if evals:
        axes.plot(
            *zip(*evals, strict=True), "o-", color=_HELD_OUT, markersize=4, linewidth=1.2, label="held-out"
        )
    if run.held_out and run.held_out[-1].base is not None:
        axes.axhline(
            run.held_out[-1].base, color=_BASE, linestyle="--", linewidth=1.2, label="held-out, frozen model"
        )
    shown = [*loss_N.tolist(), *(loss for _, loss in evals)]
    top = float(np.percentile(shown, 99.5)) if len(shown) > 20 else max(shown)
    low = min(*shown, run.held_out[-1].base or np.inf) if run.held_out else min(shown)
    top = max(top, (run.held_out[-1].base or top) if run.held_out else top)
    axes.set_ylim(
        low - 0.05 * (top - low) - 1e-3, top + 0.14 * (top - low) + 1e-3
    )  # room for the phases' names
    axes.set_ylabel("loss, nats per token")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.93), frameon=False)
    _phases(run, axes, named=True)
    return figure


def _experts(run: Run) -> Figure | None:
    step_T, ratio_TE = share_history(run.loads, run.facts.num_experts) if run.loads.recent else (None, None)
    if step_T is None or ratio_TE is None or not len(step_T) or run.routing is None:
        return None
    ratio_LE = run.routing.share_LE * run.routing.share_LE.shape[1]
    figure = _figure(9.5, 4.2)
    over_time, by_layer = figure.subplots(1, 2, width_ratios=[1.5, 1])
    settings: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": top_ratio(ratio_TE, ratio_LE)}
    edges = np.concatenate([step_T, [step_T[-1] + (step_T[-1] - step_T[-2] if len(step_T) > 1 else 1)]])
    over_time.pcolormesh(edges, np.arange(ratio_TE.shape[1] + 1) - 0.5, ratio_TE.T, **settings)
    over_time.set_title("over the run, mean of all layers", loc="left", fontsize=10)
    over_time.set_ylabel("expert")
    _steps(over_time)
    image = by_layer.imshow(ratio_LE, aspect="auto", interpolation="nearest", **settings)
    by_layer.set_title(f"last windows ({run.routing.windows}), by layer", loc="left", fontsize=10)
    by_layer.set_xlabel("expert")
    by_layer.set_ylabel("layer")
    for axis in (over_time.yaxis, by_layer.xaxis, by_layer.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=[over_time, by_layer], label="load, as a multiple of an even share", shrink=0.9)
    return figure


def _schedule(run: Run) -> Figure | None:
    panels = [
        (label, *thinned(run.train["step"], run.train[name] * factor, RAW_POINTS))
        for name, label, factor in (
            ("sparsity", "sparsity, %", 100),
            ("learning_rate", "learning rate", 1),
        )
    ]
    panels = [panel for panel in panels if len(panel[1])]
    if not panels:
        return None
    figure = _figure(7.5, 0.8 + 1.7 * len(panels))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, step_N, value_N) in zip(grid, panels, strict=True):
        axes.plot(step_N, value_N, color=_TRAIN, linewidth=1.5)
        axes.set_ylabel(label)
        axes.set_ylim(0, max(float(value_N.max()) * (1.25 if axes is grid[0] else 1.08), 1e-12))
        _phases(run, axes, named=axes is grid[0])
        if axes is not grid[-1]:
            axes.set_xlabel("")
    return figure


def evaluations(evals: Iterable[dict[str, Any]], name: str = "loss") -> list[tuple[float, float]]:
    """Step and one number of each evaluation that has it."""
    pairs = ((number(one, "step"), number(one, name)) for one in evals)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def top_ratio(*ratios: Floats) -> float:
    """The upper end of a scale of multiples of an even share: 2 at least, so that even loads look even."""
    known = [ratio[np.isfinite(ratio)] for ratio in ratios]
    return max(2.0, *(float(np.percentile(ratio, 99)) for ratio in known if ratio.size))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _phases(run: Run, axes: Axes, *, named: bool) -> None:
    """Shades every other phase as far as the run has come; writes their names where there is room."""
    last = max(run.step, 1)
    axes.set_xlim(0, last)
    for place, phase in enumerate(run.facts.phases):
        end = min(phase.end, last)
        if end <= phase.start:
            continue
        axes.axvspan(phase.start, end, color="black", alpha=0.055 if place % 2 else 0.0, linewidth=0)
        if phase.start:
            axes.axvline(phase.start, color="black", alpha=0.25, linewidth=0.8)
        if named and (end - phase.start) / last > 0.012 * len(phase.name):
            middle = (phase.start + end) / 2
            axes.text(
                middle, 0.985, printable(phase.name), transform=axes.get_xaxis_transform(), ha="center", va="top",
                color=_BASE, fontsize=8.5,
            )  # fmt: skip
    _steps(axes)


def _steps(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step")


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        figure.savefig(temporary, dpi=130, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
