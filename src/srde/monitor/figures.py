"""A run as interactive plots: the plain values that plotly.js draws (its traces and layouts), without colours of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from srde.monitor.history import Floats, thinned
from srde.monitor.plots import RAW_POINTS, SMOOTH_POINTS, evaluations, top_ratio
from srde.monitor.routing import share_history
from srde.monitor.run import Run
from srde.monitor.texts import printable

# Of Okabe and Ito (2008), with those that vanish on white or black made mid-toned.
COLORS = ("#0f7fc4", "#d9631e", "#009e73", "#b8860b", "#b0609f", "#3f9fc9", "#8c6d5a", "#7f7f7f")
_LOAD = {"title": {"text": "× even share", "side": "right"}, "thickness": 12}

Figure = dict[str, Any]


def figures(run: Run) -> dict[str, Figure]:
    """Title -> `{"data": [...], "layout": {...}}` of each plot that there is something to show in."""
    drawn = {
        "Loss": _loss(run),
        "Held-out loss by domain": _domains(run),
        "Expert load by layer, last windows": _load_by_layer(run),
        "Expert load over the run": _load_over_time(run),
        "Sparsity and learning rate": _two_axes(
            run, ("sparsity", "sparsity, %", 100.0), ("learning_rate", "learning rate", 1.0)
        ),
        "Auxiliary losses": _auxiliary(run),
        "Speed and memory": _two_axes(
            run, ("tokens_per_second", "tokens/s", 1.0), ("memory_mb", "memory, MB", 1.0)
        ),
    }
    return {title: figure for title, figure in drawn.items() if figure is not None and figure["data"]}


def _loss(run: Run) -> Figure:
    step_N, loss_N = run.train["step"], run.train["loss"]
    data = []
    smooth = len(step_N) >= 2 * SMOOTH_POINTS
    if len(step_N):
        name = "training" if not smooth else "training, each"
        line = _line(name, *thinned(step_N, loss_N, RAW_POINTS), COLORS[0], width=1)
        data.append(line | ({"opacity": 0.35} if smooth else {}))
    if smooth:
        data.append(_line("training, median", *thinned(step_N, loss_N, SMOOTH_POINTS), COLORS[0], width=2.5))
    data += _evaluated(run.evals, "held-out", COLORS[1])
    base = run.held_out[-1].base if run.held_out else None
    if base is not None:
        line = _line("held-out, frozen model", [0, max(run.step, 1)], [base, base], COLORS[7], width=2)
        data.append(line | {"line": line["line"] | {"dash": "dash"}})
    return _over_steps(run, data, "nats per token")


def _domains(run: Run) -> Figure:
    data = []
    for place, one in enumerate(run.held_out[:-1]):
        color = COLORS[place % len(COLORS)]
        records = []
        for record in run.evals:
            domains = record.get("domains")
            found = domains.get(one.name) if isinstance(domains, dict) else None
            records.append(
                {"step": record["step"], "loss": found.get("loss")} if isinstance(found, dict) else {}
            )
        data += _evaluated(records, one.name, color)
        if one.base is not None:
            line = _line(
                f"{one.name}, frozen model", [0, max(run.step, 1)], [one.base, one.base], color, width=1.2
            )
            data.append(line | {"line": line["line"] | {"dash": "dot"}, "showlegend": False})
    return _over_steps(run, data, "nats per token")


def _load_by_layer(run: Run) -> Figure | None:
    if run.routing is None:
        return None
    ratio_LE = run.routing.share_LE * run.routing.share_LE.shape[1]
    names = [
        f"{layer} {_label(run.facts.layers[layer])}" if layer < len(run.facts.layers) else f"{layer}"
        for layer in range(len(ratio_LE))
    ]
    trace = {
        "type": "heatmap", "z": _rows(ratio_LE.T), "customdata": [names] * ratio_LE.shape[1], "zmin": 0,
        "zmax": top_ratio(ratio_LE), "colorscale": "Viridis", "colorbar": _LOAD,
        "hovertemplate": "layer %{customdata}<br>expert %{y}<br>%{z:.3f} × even share<extra></extra>",
    }  # fmt: skip
    layout = {"xaxis": _axis("layer"), "yaxis": _axis("expert") | {"dtick": _tick(len(ratio_LE.T))}}
    return {"data": [trace], "layout": layout}


def _load_over_time(run: Run) -> Figure | None:
    if not run.loads.recent:
        return None
    step_T, ratio_TE = share_history(run.loads, run.facts.num_experts)
    if not len(step_T):
        return None
    trace = {
        "type": "heatmap", "x": step_T.tolist(), "z": _rows(ratio_TE.T), "zmin": 0, "zmax": top_ratio(ratio_TE),
        "colorscale": "Viridis", "colorbar": _LOAD,
        "hovertemplate": "step %{x:,}<br>expert %{y}<br>%{z:.3f} × even share<extra></extra>",
    }  # fmt: skip
    layout = {
        "xaxis": _axis("step") | {"tickformat": ","},
        "yaxis": _axis("expert, mean of all layers") | {"dtick": _tick(ratio_TE.shape[1])},
    }
    return {"data": [trace], "layout": layout}


def _auxiliary(run: Run) -> Figure:
    data = []
    for place, name in enumerate(name for name in run.train.names if name.endswith("_loss")):
        points = thinned(run.train["step"], run.train[name], RAW_POINTS)
        data.append(_line(name, *points, COLORS[place % len(COLORS)], width=1.5))
    return _over_steps(run, data, "weighted as logged")


def _two_axes(run: Run, left: tuple[str, str, float], right: tuple[str, str, float]) -> Figure:
    data, layout = [], {}
    for place, (name, title, factor) in enumerate((left, right)):
        step_N, value_N = thinned(run.train["step"], run.train[name] * factor, RAW_POINTS)
        axis = "yaxis2" if place else "yaxis"
        layout[axis] = _axis(title) | {"rangemode": "tozero"}
        if place:
            layout[axis] |= {"overlaying": "y", "side": "right", "showgrid": False, "tickmode": "auto"}
        if len(step_N):
            line = _line(title, step_N, value_N, COLORS[place], width=2)
            data.append(line | ({"yaxis": "y2"} if place else {}))
    figure = _over_steps(run, data, "")
    figure["layout"] |= layout
    return figure


def _over_steps(run: Run, data: list[dict[str, Any]], title: str) -> Figure:
    """Traces over steps, phases shaded behind them as far as the run has come."""
    last = max(run.step, 1)
    shapes, notes = [], []
    for place, phase in enumerate(run.facts.phases):
        end = min(phase.end, last)
        if end <= phase.start:
            continue
        shapes.append(
            {
                "type": "rect", "xref": "x", "yref": "paper", "x0": phase.start, "x1": end, "y0": 0, "y1": 1,
                "layer": "below", "fillcolor": "#808080", "opacity": 0.13 if place % 2 else 0.0, "line": {"width": 0},
            }
        )  # fmt: skip
        if (end - phase.start) / last > 0.012 * len(phase.name):
            notes.append(
                {
                    "text": _label(phase.name), "x": (phase.start + end) / 2, "y": 1, "xref": "x", "yref": "paper",
                    "yanchor": "bottom", "showarrow": False, "font": {"size": 11},
                }
            )  # fmt: skip
    layout = {
        "xaxis": _axis("step") | {"range": [0, last], "tickformat": ","},
        "yaxis": _axis(title),
        "shapes": shapes,
        "annotations": notes,
        "hovermode": "x unified",
    }
    return {"data": data, "layout": layout}


def _evaluated(records: Sequence[Mapping[str, Any]], name: str, color: str) -> list[dict[str, Any]]:
    points = evaluations([dict(one) for one in records])
    if not points:
        return []
    steps, losses = zip(*points, strict=True)
    line = _line(name, steps, losses, color, width=2)
    return [line | {"mode": "lines+markers", "marker": {"size": 5 if len(points) < 80 else 3}}]


def _line(
    name: str, x: Sequence[float] | Floats, y: Sequence[float] | Floats, color: str, *, width: float
) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "name": _label(name), "x": _numbers(x), "y": _numbers(y),
        "line": {"color": color, "width": width}, "hovertemplate": "%{y:.5~g}",
    }  # fmt: skip


def _axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True}


def _tick(count: int) -> int:
    return max(1, count // 16)


def _label(name: str) -> str:
    """A name for plotly.js, which reads its texts as a small kind of HTML."""
    return escape(printable(name), quote=False).replace("%{", "% {").replace("$", "&#36;")


def _numbers(values: Sequence[float] | Floats) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _rows(value_XY: Floats) -> list[list[float | None]]:
    return [[round(value, 5) if np.isfinite(value) else None for value in row] for row in value_XY.tolist()]
