"""An evaluation as interactive plots: the plain values that plotly.js draws, without colours of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from srde.eval.results import Comparison, Evaluation
from srde.eval.routing import RoutingStatistics
from srde.eval.statistics import Estimate
from srde.monitor.figures import COLORS
from srde.monitor.texts import printable

Figure = dict[str, Any]
GENERAL = "general text"
ALL = "all"


def drawings(experts: Evaluation, base: Evaluation | None, paired: Comparison | None) -> dict[str, Figure]:
    """Title -> `{"data": [...], "layout": {...}}` of each plot that there is something to show in.

    Args:
        experts: The model with its adapter.
        base: The same model without, or None.
        paired: Their differences, where there is a base.
    """
    models = ([("base", base, COLORS[7])] if base else []) + [("srde", experts, COLORS[0])]
    accuracy = {
        name: {domain: one.accuracy_estimate for domain, one in model.domains.items()} | {ALL: model.total.accuracy_estimate}
        for name, model, _ in models
    }  # fmt: skip
    loss = {
        name: {domain: one.loss_estimate for domain, one in model.domains.items()}
        | {ALL: model.total.loss_estimate}
        for name, model, _ in models
    }
    colors = {name: color for name, _, color in models}
    drawn = {
        "Accuracy by domain, with 95 % intervals": _bars(accuracy, colors, "%", 100),
        "Loss by domain, with 95 % intervals": _bars(loss, colors, "nats per token", 1),
    }
    if paired is not None:
        changes = {domain: one.accuracy for domain, one in paired.domains.items()} | {
            ALL: paired.total.accuracy
        }
        drawn["Accuracy, srde minus base on the same rows"] = _differences(changes, "percentage points", 100)
        losses = {domain: one.loss for domain, one in paired.domains.items()} | {ALL: paired.total.loss}
        if paired.general is not None:
            losses[GENERAL] = paired.general
        drawn["Loss, srde minus base on the same rows"] = _differences(losses, "nats per token", 1)
    if experts.routing is not None:
        if experts.routing.domains:
            drawn["Routing: where each domain's tokens went"] = _domain_expert(experts.routing)
        drawn["Routing: load of each expert in each layer"] = _layer_expert(experts.routing)
    return {title: figure for title, figure in drawn.items() if figure["data"]}


def _bars(
    by_model: Mapping[str, Mapping[str, Estimate | None]], colors: Mapping[str, str], unit: str, factor: int
) -> Figure:
    data = []
    for name, found in by_model.items():
        shown = {domain: one for domain, one in found.items() if one is not None and math.isfinite(one.value)}
        if not shown:
            continue
        data.append(
            {
                "type": "bar", "name": name, "x": [_label(domain) for domain in shown],
                "y": [round(factor * one.value, 4) for one in shown.values()], "marker": {"color": colors[name]},
                "error_y": _error(list(shown.values()), factor), "hovertemplate": "%{y:.4~g} ± %{error_y.array:.3~g}",
            }
        )  # fmt: skip
    layout = {
        "barmode": "group", "xaxis": _axis("") | {"type": "category"}, "yaxis": _axis(unit) | {"rangemode": "tozero"},
        "hovermode": "x unified",
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _differences(found: Mapping[str, Estimate | None], unit: str, factor: int) -> Figure:
    shown = {name: one for name, one in found.items() if one is not None and math.isfinite(one.value)}
    if not shown:
        return {"data": [], "layout": {}}
    trace = {
        "type": "scatter", "mode": "markers", "name": "difference", "y": [_label(name) for name in shown],
        "x": [round(factor * one.value, 5) for one in shown.values()],
        "error_x": _error(list(shown.values()), factor) | {"thickness": 2, "color": "#888"},
        "marker": {"size": 9, "color": [COLORS[1] if name in (ALL, GENERAL) else COLORS[0] for name in shown]},
        "hovertemplate": "%{y}: %{x:+.4~g} ± %{error_x.array:.3~g}<extra></extra>", "showlegend": False,
    }  # fmt: skip
    zero = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "xref": "x",
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": "#888", "dash": "dot"},
    }
    layout = {
        "xaxis": _axis(unit) | {"zeroline": False}, "yaxis": _axis("") | {"type": "category", "autorange": "reversed"},
        "shapes": [zero],
    }  # fmt: skip
    return {"data": [trace], "layout": layout}


def _domain_expert(routing: RoutingStatistics) -> Figure:
    per_cent = [[round(100 * share, 2) for share in row] for row in routing.share_DE.tolist()]
    trace = {
        "type": "heatmap", "x": _places(routing), "y": [_label(domain) for domain in routing.domains], "z": per_cent,
        "zmin": 0, "zmax": max(map(max, per_cent)), "colorscale": "Viridis", "texttemplate": "%{z:.0f}",
        "colorbar": _bar("% of the gates"),
        "customdata": [[_label(name) for name in routing.names]] * len(per_cent),
        "hovertemplate": "%{y}<br>expert %{customdata}<br>%{z:.1f} % of the routed gates<extra></extra>",
    }  # fmt: skip
    return {
        "data": [trace],
        "layout": {"xaxis": _experts(routing), "yaxis": _axis("") | {"type": "category", "autorange": "reversed"}},
    }  # fmt: skip


def _layer_expert(routing: RoutingStatistics) -> Figure:
    ratio_LE = routing.share_LE * routing.share_LE.shape[1]
    trace = {
        "type": "heatmap", "x": _places(routing), "z": [[round(value, 4) for value in row] for row in ratio_LE.tolist()],
        "zmin": 0, "zmax": float(ratio_LE.max()), "colorscale": "Viridis", "colorbar": _bar("× even share"),
        "customdata": [[_label(name) for name in routing.names]] * len(ratio_LE),
        "hovertemplate": "layer %{y}<br>expert %{customdata}<br>%{z:.3f} × even share<extra></extra>",
    }  # fmt: skip
    return {
        "data": [trace],
        "layout": {
            "xaxis": _experts(routing),
            "yaxis": _axis("layer") | {"dtick": -(-len(ratio_LE) // 12)},
        },
    }


def _places(routing: RoutingStatistics) -> list[int]:
    return list(range(len(routing.names)))


def _experts(routing: RoutingStatistics) -> dict[str, Any]:
    """The axis of the experts, which are named as long as that can be read."""
    axis = _axis("expert")
    if len(routing.names) <= 32:
        axis |= {
            "tickvals": _places(routing),
            "ticktext": [_label(name) for name in routing.names],
        }
    return axis


def _error(estimates: Sequence[Estimate], factor: int) -> dict[str, Any]:
    return {
        "type": "data",
        "array": [None if one.half_width is None else round(factor * one.half_width, 5) for one in estimates],
    }


def _axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True}


def _bar(title: str) -> dict[str, Any]:
    return {"title": {"text": title, "side": "right"}, "thickness": 12}


def _label(name: str) -> str:
    """A name for plotly.js, which reads its texts as a small kind of HTML."""
    return escape(printable(name), quote=False).replace("%{", "% {").replace("$", "&#36;")
