"""An evaluation as one HTML page with interactive plots: works offline, loads nothing, readable in the light and in the dark.

Built like the page of a run (`srde.monitor.report`): plotly.js is in it, and its content security policy lets it run exactly
its two scripts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from srde.eval.drawings import drawings
from srde.eval.plain import finite
from srde.eval.results import Comparison, Difference, Evaluation, Result, compare
from srde.eval.routing import RoutingStatistics
from srde.eval.statistics import Estimate
from srde.eval.table import notes, routing_notes
from srde.monitor.report import SCRIPT, STYLE
from srde.monitor.texts import printable

OWN_STYLE = """
tr.all td { font-weight: 600; } .numbers { font-size: .87rem; }
.numbers th { white-space: normal; vertical-align: bottom; } .numbers td, .numbers th { padding-right: .8rem; }
.numbers td.text, .numbers th.text { text-align: left; } .numbers td.text { min-width: 7rem; }
"""
NAMES = ("domain", "source", "text")  # columns of words among those of figures
HEADING = "Held-out rows, base and srde"


def page(experts: Evaluation, base: Evaluation | None, settings: Mapping[str, Any]) -> str:
    """The page; whatever comes from files is escaped.

    Args:
        experts: The model with its adapter.
        base: The same model without, or None.
        settings: How it was measured.
    """
    from plotly.offline import get_plotlyjs

    paired = compare(experts, base) if base else None
    plots = drawings(experts, base, paired)
    # as browsers read it before they hash it
    library = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    allowed = " ".join(f"'sha256-{_hash(script)}'" for script in (library, SCRIPT))
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    title = f"Evaluation: {printable(settings.get('adapter', 'srde'))}"
    drawn = "".join(
        f"<h2>{_text(name)}</h2>\n<div class=plot id=plot-{place}></div>\n"
        for place, name in enumerate(plots)
    )
    remarks = "".join(f"<p>{_text(note)}</p>\n" for note in notes(experts, base))
    body = (
        f"<h1>{_text(title)}</h1>\n<p>base {_text(settings.get('base', '-'))}; {experts.total.rows:,} held-out rows. "
        f"After ±: half of the 95 % interval. A difference is srde minus base, row by row.</p>\n{_tiles(experts, base, paired)}"
        f"{_domains(experts, base, paired)}{remarks}{_lost(experts, base, paired)}{drawn}{_routing(experts.routing)}"
        f"{_sources(experts, base, paired)}{_settings(settings)}"
    )
    # No `<` can end the block of values, whatever names stand in it.
    values = json.dumps(finite(list(plots.values())), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(title)}</title>\n'
        f"<style>{STYLE}{OWN_STYLE}</style>\n</head>\n<body>\n{body}"
        f'<script type="application/json" id="figures">{values}</script>\n'
        f"<script>{library}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _tiles(experts: Evaluation, base: Evaluation | None, paired: Comparison | None) -> str:
    mine, other = experts.total, base.total if base else None
    tiles = {
        "accuracy, mean of domains": _plain(mine.accuracy_estimate, 100, 1, " %"),
        "loss, mean of domains": _plain(mine.loss_estimate, 1, 3),
    }
    if other and paired:
        tiles |= {
            "accuracy of the base": _plain(other.accuracy_estimate, 100, 1, " %"),
            "loss of the base": _plain(other.loss_estimate, 1, 3),
            "accuracy, difference in points": _change(paired.total.accuracy, 100, 1),
            "loss, difference": _change(paired.total.loss, 1, 3),
        }
        if paired.general is not None:
            tiles["lost on general text, nats per token"] = _change(paired.general, 1, 4)
    if experts.routing is not None:
        tiles["dead experts"] = f"{len(experts.routing.dead):,} of {experts.routing.share_LE.size:,}"
    if experts.tokens_per_second and base and base.tokens_per_second:
        tiles["speed, of the base's"] = f"{experts.tokens_per_second / base.tokens_per_second:.2f}x"
    boxes = (f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in tiles.items())
    return f"<div class=tiles>{''.join(boxes)}</div>\n"


def _columns(paired: Comparison | None, first: Sequence[str]) -> list[str]:
    columns = [*first, "scored"]
    for name in ("accuracy, %", "loss"):
        columns += [f"{name}, base", f"{name}, srde", "difference"] if paired else [name]
    return columns


def _line(mine: Result, other: Result | None, change: Difference | None) -> list[str]:
    cells = [_cell(f"{mine.scored:,}/{mine.rows:,}")]
    for name, factor, digits in (("accuracy", 100, 1), ("loss", 1, 3)):
        if other is not None:
            cells.append(_cell(_plain(getattr(other, f"{name}_estimate"), factor, digits)))
        cells.append(_cell(_plain(getattr(mine, f"{name}_estimate"), factor, digits)))
        if change is not None:
            cells.append(
                _difference(getattr(change, name), factor, digits, better=1 if name == "accuracy" else -1)
            )
    return cells  # fmt: skip


def _domains(experts: Evaluation, base: Evaluation | None, paired: Comparison | None) -> str:
    rows = [
        [_long(domain), *_line(mine, base and base.domains[domain], paired and paired.domains[domain])]
        for domain, mine in experts.domains.items()
    ]
    rows.append(
        [
            _long("all"),
            *_line(experts.total, base and base.total, paired and paired.total),
        ]
    )
    return _table(HEADING if base else "Held-out rows", _columns(paired, ["domain"]), rows, last=True)


def _sources(experts: Evaluation, base: Evaluation | None, paired: Comparison | None) -> str:
    rows = [
        [
            _long(key[0]),
            _long(key[1]),
            *_line(mine, base and base.sources[key], paired and paired.sources[key]),
        ]
        for key, mine in experts.sources.items()
    ]
    return _table("By source", _columns(paired, ["domain", "source"]), rows)


def _lost(experts: Evaluation, base: Evaluation | None, paired: Comparison | None) -> str:
    mine = experts.general_loss
    if mine is None:
        return ""
    cells = [_cell(f"{mine.items:,}"), _cell(f"{sum(one.tokens for one in experts.general):,}")]
    columns = ["text", "paragraphs", "tokens"]
    if base and paired:
        columns += ["loss, base", "loss, srde", "difference"]
        cells += [
            _cell(_plain(base.general_loss, 1, 4)),
            _cell(_plain(mine, 1, 4)),
            _difference(paired.general, 1, 4, better=-1),
        ]
    else:
        columns.append("loss")
        cells.append(_cell(_plain(mine, 1, 4)))
    title = (
        "What was lost: general text that is in no domain" if base else "General text that is in no domain"
    )
    return _table(title, columns, [[_long("general text"), *cells]])  # fmt: skip


def _routing(routing: RoutingStatistics | None) -> str:
    if routing is None:
        return ""
    lines = "".join(f"<p>{_text(line)}</p>\n" for line in routing_notes(routing))
    dead: dict[int, list[str]] = {}
    for layer, expert in routing.dead:
        dead.setdefault(layer, []).append(routing.names[expert])
    rows = [
        [
            _cell(layer),
            _cell(f"{routing.entropy_L[layer]:.3f}"),
            _cell(f"{100 * routing.relative(routing.entropy_L[layer]):.0f} %"),
            _cell(f"{routing.token_entropy_L[layer]:.3f}"),
            _cell(f"{100 * routing.relative(routing.token_entropy_L[layer]):.0f} %"),
            _cell(f"{routing.specialisation.information_L[layer]:.3f}" if routing.specialisation else "-"),
            _long(", ".join(dead.get(layer, [])) or "-"),
        ]
        for layer in range(len(routing.share_LE))
    ]
    columns = (
        "layer",
        "entropy of the load, nats",
        "of even use",
        "of a token's gates, nats",
        "of even use",
        "bits about the domain",
        "dead experts",
    )
    table = _table("", columns, rows).removeprefix("<h2></h2>\n")
    return f"<h2>Routing</h2>\n{lines}<details><summary>By layer</summary>{table}</details>\n"


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [
        [
            _cell(name),
            _long(value if isinstance(value, str | int | float) or value is None else json.dumps(value)),
        ]
        for name, value in settings.items()
    ]
    return _table("Settings", ("what", "value"), rows, kind="facts") if rows else ""


def _plain(estimate: Estimate | None, factor: int, digits: int, unit: str = "") -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return "-"
    width = "" if estimate.half_width is None else f" ± {factor * estimate.half_width:.{digits}f}"
    return f"{factor * estimate.value:.{digits}f}{width}{unit}"


def _change(estimate: Estimate | None, factor: int, digits: int) -> str:
    if estimate is None:
        return "-"
    return ("+" if estimate.value >= 0 else "") + _plain(estimate, factor, digits)


def _difference(estimate: Estimate | None, factor: int, digits: int, *, better: int) -> str:
    """A cell, coloured where the interval leaves zero out; one of width zero, as of rows that are all alike, says nothing."""
    text = _text(_change(estimate, factor, digits))
    if (
        estimate is None
        or estimate.ci95 is None
        or not estimate.half_width
        or estimate.ci95[0] <= 0 <= estimate.ci95[1]
    ):
        return f"<td>{text}</td>"
    return f"<td class={'good' if estimate.value * better > 0 else 'bad'}>{text}</td>"


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, last: bool = False, kind: str = "numbers"
) -> str:  # fmt: skip
    """A table; the cells of its rows are HTML already. `last` makes the last row stand out."""
    rows = list(rows)
    head = "".join(f"<th{' class=text' if name in NAMES else ''}>{_text(name)}</th>" for name in columns)
    lines = "".join(
        f"<tr{' class=all' if last and place == len(rows) - 1 else ''}>{''.join(cells)}</tr>\n"
        for place, cells in enumerate(rows)
    )
    return f"<h2>{_text(title)}</h2>\n<div class=wide><table class={kind}>\n<tr>{head}</tr>\n{lines}</table></div>\n"


def _cell(value: object) -> str:
    return f"<td>{_text(value)}</td>"


def _long(value: object) -> str:
    """A cell that may break its lines."""
    return f"<td class=text>{_text(value)}</td>"


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _text(value: object) -> str:
    return escape(printable(value))
