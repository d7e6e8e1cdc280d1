"""Plots of statistics as SVG for a page: text in the page's own colour, ground transparent, nothing loaded from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from srde.data.view.reading import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito (2008), with those that vanish on white or black made mid-toned.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b8860b", "#a0529a", "#3f9fc9", "#8c6d5a", "#7f7f7f")
MOST_BARS = 60
MOST_PANELS = 60
_INK = "#010203"  # replaced by the page's text colour
_LONGEST_NAME = 28
_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 10.0,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a name such as "$x" is no formula
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def plots(stats: Mapping[str, Any]) -> dict[str, str]:
    """Title -> SVG of each plot that there is something to show in."""
    from matplotlib import rc_context

    unit = stats["unit"]
    color = {name: COLORS[place % len(COLORS)] for place, name in enumerate(stats["domains"])}
    drawn = {}
    with rc_context(_SETTINGS):
        drawn[f"Length in {unit}, by domain"] = _svg(
            _lengths(stats["histograms"], "domains", unit, color), "lengths"
        )
        drawn[f"Rows and {unit} by domain"] = _svg(_shares(stats["domains"], unit, color), "domains")
        by_domain = {
            name: color[entry["domains"][0]] if len(entry["domains"]) == 1 else COLORS[-1]
            for name, entry in stats["sources"].items()
        }
        drawn[f"Length in {unit}, by source, coloured by domain"] = _svg(
            _lengths(stats["histograms"], "sources", unit, by_domain), "source-lengths"
        )
        drawn[f"Rows and {unit} by source, coloured by domain"] = _svg(
            _shares(stats["sources"], unit, by_domain), "sources"
        )
        if reasons := stats["left_out"]["by_reason"]:
            drawn["Rows left out, by reason"] = _svg(_reasons(reasons), "reasons")
    return drawn


def _lengths(histograms: Mapping[str, Any], kind: str, unit: str, color: Mapping[str, str]) -> Figure:
    """A small histogram for each domain or source, all over the same lengths, each with a scale of its own for the rows."""
    from matplotlib.figure import Figure

    bars, edges = histograms[kind], histograms["edges"]
    names = list(bars)[:MOST_PANELS]
    across = min(3 if len(names) <= 9 else 4, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(9, 0.7 + (1.75 if across <= 3 else 1.4) * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.set_visible(False)
            continue
        name = names[place]
        axes.stairs(bars[name], edges, fill=True, color=color[name])
        axes.set_title(_short(name), loc="left", fontsize=11 if across <= 3 else 9)
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(0, 1.05 * max(*bars[name], 1))
        axes.locator_params(axis="y", nbins=4, integer=True)
        axes.locator_params(axis="x", nbins=5 if across <= 3 else 4)
        axes.tick_params(labelbottom=place + across >= len(names))
        _thousands(axes, "both")
    few = f"; the first {len(names)} of {len(bars)} {kind}" if len(names) < len(bars) else ""
    end = " (the last bar holds all longer rows)" if histograms["open_end"] else ""
    figure.supxlabel(f"{unit}{end}{few}", fontsize=10)
    figure.supylabel("rows", fontsize=10)
    return figure


def _shares(entries: Mapping[str, Any], unit: str, color: Mapping[str, str]) -> Figure:
    from matplotlib.figure import Figure

    names = list(entries)[:MOST_BARS]
    colors = [color[name] for name in names]
    labels = [_short(name) for name in names]
    figure = Figure(figsize=(9, 0.8 + 0.28 * len(names)), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
    _bars(grid[0], labels, [entries[name]["rows"] for name in names], colors, faint=False)
    _bars(grid[1], labels, [entries[name]["tokens"] for name in names], colors, faint=True)
    grid[1].barh(
        range(len(names)), [entries[name]["trained_tokens"] for name in names], color=colors, height=0.7
    )
    few = "" if len(names) == len(entries) else f", the first {len(names)} of {len(entries)}"
    grid[0].set_title(f"rows{few}", loc="left")
    grid[1].set_title(f"{unit} (full colour: trained)", loc="left")
    return figure


def _reasons(reasons: Mapping[str, int]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + 0.3 * len(reasons)), layout="constrained")
    labels = [_short(name) for name in reasons]
    _bars(figure.subplots(), labels, list(reasons.values()), [COLORS[0]] * len(reasons), faint=False)
    return figure


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[int], colors: Sequence[str], *, faint: bool
) -> None:
    bars = axes.barh(range(len(labels)), values, color=colors, height=0.7, alpha=0.45 if faint else 1.0)
    axes.bar_label(bars, [f"{value:,}" for value in values], padding=3, fontsize=8.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, max(*values, 1) * 1.22)  # room for the numbers
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="y", length=0)
    _thousands(axes, "x")


def _thousands(axes: Axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter

    for axis in [axes.xaxis, *([axes.yaxis] if which == "both" else [])]:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an element of a page: no header, no metadata, ids that no other figure has."""
    import warnings

    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    with rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        # The page's reader has the letters; only the widths that they are given here are a guess.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        FigureCanvasSVG(figure).print_svg(stream)
    text = stream.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")  # HTML needs neither
    text = re.sub(r'\bid="', f'id="{salt}-', text)
    text = re.sub(r"url\(#", f"url(#{salt}-", text)
    text = re.sub(r'href="#', f'href="#{salt}-', text)
    text = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2)
    return text.replace(_INK, "currentColor")
