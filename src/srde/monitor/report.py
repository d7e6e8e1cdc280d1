"""A run as one HTML page with interactive plots: works offline, loads nothing, readable in the light and in the dark.

The page carries plotly.js whole (about 5 MB). Its content security policy lets it run exactly the two scripts that are written
here, named by their hashes, and load nothing at all: whatever a run's files say stays text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from srde.errors import UsageError
from srde.monitor.alerts import alerts
from srde.monitor.figures import figures
from srde.monitor.history import number, whole
from srde.monitor.run import Run, specialisation_text
from srde.monitor.texts import count, duration, loss, percent, printable, size

MOST_EVENTS = 200

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1d1d1f; --soft: #66666b; --line: #dcdce0; --tile: #f4f4f6;
  --good: #0a7a3c; --bad: #c02a1d; --warn: #96640a; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16171a; --ink: #e8e8ea; --soft: #a0a0a6; --line: #3a3b40; --tile: #222327; --good: #4cc27e; --bad: #ff7a6b;
    --warn: #e0ad4a; }
}
body { background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p { color: var(--soft); margin-top: .3rem; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0; }
.tiles div { background: var(--tile); border-radius: .5rem; padding: .5rem .9rem; }
.tiles b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; } .tiles span { color: var(--soft); }
.alert { border-left: .3rem solid var(--warn); background: var(--tile); padding: .5rem .9rem; margin: .5rem 0;
  overflow-wrap: anywhere; }
.alert.error { border-color: var(--bad); } .alert b { display: block; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .warn { color: var(--warn); font-weight: 600; }
.plot { height: 370px; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); } th, td { white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
.numbers td, .numbers th { text-align: right; } .numbers td:first-child, .numbers th:first-child { text-align: left; }
pre { background: var(--tile); border-radius: .5rem; padding: .7rem; overflow-x: auto; font-size: .85rem; }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const common = {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 62, r: 24, t: 50, b: 44},
    font: {color: color("--ink"), family: "system-ui, sans-serif", size: 12}, legend: {orientation: "h", y: -0.25},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--ink")},
    hoverlabel: {bgcolor: color("--tile"), bordercolor: color("--line"), font: {color: color("--ink")}}};
  const lines = {gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line")};
  figures.forEach((figure, place) => {
    const layout = {...common, ...figure.layout};
    for (const name of ["xaxis", "yaxis", "yaxis2"]) if (layout[name]) layout[name] = {...lines, ...layout[name]};
    Plotly.react("plot-" + place, figure.data, layout, {displaylogo: false, responsive: true,
      modeBarButtonsToRemove: ["select2d", "lasso2d"]});
  });
}
draw();
dark.addEventListener("change", draw);
"""


def write_report(run: Run, path: str | os.PathLike[str]) -> Path:
    """Writes the page of a run; the file appears whole or not at all.

    Returns:
        The file.

    Raises:
        UsageError: It cannot be written there.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(page(run), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError.of(
            "file", str(path), rule=f"it cannot be written ({error.strerror})", fix="Name a file where you may write"
        ) from error  # fmt: skip
    return path


def page(run: Run) -> str:
    """The page; whatever comes from the run's files is escaped."""
    from plotly.offline import get_plotlyjs

    plots = figures(run)
    library = (
        get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    )  # as browsers read it before they hash it
    allowed = " ".join(f"'sha256-{_hash(script)}'" for script in (library, SCRIPT))
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    title = f"Run: {printable(run.folder.resolve().name)}"
    drawn = "".join(
        f"<h2>{_text(name)}</h2>\n<div class=plot id=plot-{place}></div>\n"
        for place, name in enumerate(plots)
    )
    body = (
        f"<h1>{_text(title)}</h1>\n<p>{_text(run.facts.model)} &middot; {_text(run.folder)} &middot; as of {_when(run.now)}</p>\n"
        f"{_tiles(run)}{_alerts(run)}{_held_out(run)}{drawn}{_checkpoints(run)}{_events(run)}{_facts(run)}"
    )
    # No `<` can end the block of values, whatever names stand in it.
    values = json.dumps(list(plots.values()), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}"
        f'<script type="application/json" id="figures">{values}</script>\n'
        f"<script>{library}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _tiles(run: Run) -> str:
    total = f" of {run.max_steps:,}" if run.max_steps else ""
    tiles = {
        "status": run.status,
        "step": f"{run.step:,}{total}",
        "phase": run.phase or "-",
        "left": duration(run.eta_seconds),
        "loss": loss(run.train.last("loss")),
        "held-out loss": loss(run.held_out[-1].loss if run.held_out else None),
        "held-out, frozen model": loss(run.held_out[-1].base if run.held_out else None),
        "tokens/s": count(run.tokens_per_second),
        "tokens": count(run.train.last("tokens")),
        "memory": "-" if run.memory_mb is None else size(run.memory_mb * 1e6),
        "sparsity": percent(run.sparsity),
        "dead experts": "-" if run.routing is None else str(len(run.dead_experts)),
    }
    if run.eta_seconds is None:
        tiles.pop("left")
        tiles["last sign of life"] = f"{duration(run.silent_seconds)} ago"
    boxes = (f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in tiles.items())
    return f"<div class=tiles>{''.join(boxes)}</div>\n"


def _alerts(run: Run) -> str:
    found = alerts(run)
    if not found:
        return "<p>No alerts.</p>\n"
    return "".join(
        f"<div class='alert {alert.severity}'><b>{_text(alert.kind)}</b>{_text(alert.text)}</div>\n"
        for alert in found
    )


def _held_out(run: Run) -> str:
    if not run.held_out:
        return ""
    rows = []
    for one in run.held_out:
        change = one.loss / one.base - 1 if one.loss is not None and one.base else None
        kind = "" if change is None else " class=good" if change < 0 else " class=bad"
        cells = [loss(one.loss), loss(one.best), loss(one.base)]
        shown = "-" if change is None else f"{100 * change:+.1f} %"
        rows.append([_long(one.name), *map(_cell, cells), f"<td{kind}>{shown}</td>"])
    differ = specialisation_text(run.evals[-1]) if run.evals else None
    note = f"<p>Experts and domains: {_text(differ)}.</p>" if differ else ""
    return (
        _table("Held-out loss", ("domain", "last", "best", "frozen model", "change"), rows, "numbers") + note
    )


def _checkpoints(run: Run) -> str:
    rows = []
    for one in run.checkpoints:
        state = {
            True: "<td class=good>verified</td>",
            False: f"<td class='text bad'>damaged: {_text(one.problem)}</td>",
            None: "<td class=warn>not verified</td>",
        }[one.verified]
        rows.append(
            [
                _cell(one.name),
                _cell("-" if one.step is None else f"{one.step:,}"),
                _cell(size(one.bytes)),
                state,
            ]
        )
    if not rows:
        return "<h2>Checkpoints</h2>\n<p>None yet.</p>\n"
    return _table("Checkpoints", ("folder", "step", "size", "state"), rows)


def _events(run: Run) -> str:
    rows = [
        [
            _cell(_when(number(event, "time"))),
            _cell(f"{whole(event, 'step'):,}"),
            _cell(event.get("event", "")),
            _long(event.get("text", "")),
            _cell(f"{event.get('host', '')} {event.get('pid', '')}"),
        ]
        for event in reversed(run.events[-MOST_EVENTS:])
    ]
    few = f", the last {MOST_EVENTS:,} of {len(run.events):,}" if len(run.events) > MOST_EVENTS else ""
    return _table(f"Events{few}", ("time", "step", "event", "what happened", "process"), rows) if rows else ""


def _facts(run: Run) -> str:
    facts = run.facts
    if facts.raw is None:
        return ""
    phases = ", ".join(f"{phase.name} {phase.start:,}-{phase.end:,}" for phase in facts.phases)
    pairs = {
        "model": facts.model,
        "started": _when(facts.started),
        "steps": f"{facts.max_steps:,}",
        "phases": phases or "-",
        "layers with experts": f"{len(facts.layers):,}",
        "routed experts": f"{facts.num_experts}",
        "shared experts": str(facts.raw.get("num_shared_experts", "-")),
        "domains": ", ".join(map(str, facts.raw.get("domains") or [])) or "-",
        "a line of metrics every": f"{facts.logging_steps:,} steps",
        "a heartbeat every": f"{facts.heartbeat_steps:,} steps",
    }
    rows = [[_cell(name), _long(value)] for name, value in pairs.items()]
    identity = json.dumps(facts.raw.get("identity"), indent=2)
    return (
        _table("Facts", ("what", "value"), rows)
        + f"<details><summary>Identity</summary><pre>{escape(identity)}</pre></details>\n"
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "facts") -> str:
    """A table; the cells of its rows are HTML already."""
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    lines = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in rows)
    return f"<h2>{_text(title)}</h2>\n<div class=wide><table class={kind}>\n<tr>{head}</tr>\n{lines}</table></div>\n"


def _cell(value: object) -> str:
    return f"<td>{_text(value)}</td>"


def _long(value: object) -> str:
    """A cell that may break its lines."""
    return f"<td class=text>{_text(value)}</td>"


def _when(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _text(value: object) -> str:
    return escape(printable(value))
