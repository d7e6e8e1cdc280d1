"""A run in a terminal, drawn anew as it goes on. Every line fits the width; the loss curve takes the lines that are left."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.text import Text

from srde.monitor.alerts import ERROR, alerts
from srde.monitor.curve import BASE_MARK, HELD_OUT_MARK, curve
from srde.monitor.history import number, whole
from srde.monitor.run import Run, RunReader
from srde.monitor.status import ENDED
from srde.monitor.strip import legend, strip
from srde.monitor.texts import count, duration, loss, percent, plural, printable, size

VERIFY_SECONDS = 0.5
"""How long one refresh of a live view may hash checkpoints."""

_STYLES = {
    "starting": "bold blue",
    "running": "bold green",
    "completed": "bold green",
    "stopped": "bold yellow",
    "stalled": "bold red",
    "died": "bold red",
    "failed": "bold red",
}
_BAR = 16
_HELD_OUT = 34  # cells of the table of held-out losses
_FOLDER = 24  # cells that the folder's name has beside a long name of the model
_NARROW = 66  # below it the table stands under the strip


@dataclass(frozen=True)
class _Room:
    """How much of each part is drawn; the curve gets what is left, if that is `curve` lines at least."""

    curve: int
    experts: int
    domains: int
    events: int
    alert_lines: int
    alerts: int
    losses: bool


# From roomy to tight; the last is drawn in any case, and cut at the bottom.
_ROOMY = _Room(curve=12, experts=16, domains=24, events=6, alert_lines=6, alerts=20, losses=True)
_ROOMS = (
    _ROOMY,
    _Room(curve=9, experts=8, domains=10, events=4, alert_lines=3, alerts=4, losses=True),
    _Room(curve=7, experts=8, domains=8, events=2, alert_lines=2, alerts=3, losses=False),
    _Room(curve=5, experts=8, domains=8, events=1, alert_lines=2, alerts=2, losses=False),
    _Room(curve=4, experts=4, domains=6, events=1, alert_lines=1, alerts=2, losses=False),
    _Room(curve=2, experts=2, domains=2, events=0, alert_lines=1, alerts=1, losses=False),
)


def frame(run: Run, width: int, height: int | None = None, *, ascii_only: bool = False) -> list[Text]:
    """One frame.

    Args:
        run: The run.
        width: Cells that no line exceeds.
        height: Lines that there are at most; None draws everything at its natural height.
        ascii_only: Only ASCII characters.
    """
    if height is None:
        above, below = _around(run, width, _ROOMY, ascii_only)
        rows = _ROOMY.curve
    else:
        for room in _ROOMS:
            above, below = _around(run, width, room, ascii_only)
            rows = height - len(above) - len(below) - 1
            if rows >= room.curve:
                break
    evals = [(step, value) for step, value in _held_out_points(run)]
    base = run.held_out[-1].base if run.held_out else None
    middle = curve(
        run.train["step"], run.train["loss"], evals, base, width, max(rows, 2), ascii_only=ascii_only
    )
    return [_fitted(line, width, ascii_only) for line in [*above, *middle, *below][:height]]


def show(console: Console, run: Run) -> None:
    """Prints one frame at its natural height."""
    for line in frame(run, console.width, ascii_only=_ascii_only(console)):
        console.print(line, no_wrap=True, overflow="crop", crop=True)


def watch(console: Console, reader: RunReader, interval: float) -> int:
    """Draws the run until it ends or somebody presses Ctrl-C; the last frame stays.

    Where the output is no terminal that can be drawn on, each new step gives a line, and the end a frame.

    Args:
        console: Where to.
        reader: The run.
        interval: Seconds between two looks.

    Returns:
        The exit status: 1 if the run failed or died, else 0.
    """
    try:
        run = _drawn(console, reader, interval) if _can_draw(console) else _told(console, reader, interval)
    except KeyboardInterrupt:
        show(console, reader.read(verify_seconds=0))
        return 0
    show(console, run)
    return 1 if run.status in ("failed", "died") else 0


def _drawn(console: Console, reader: RunReader, interval: float) -> Run:
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            run = reader.read(verify_seconds=VERIFY_SECONDS)
            lines = frame(run, console.width, console.height, ascii_only=_ascii_only(console))
            live.update(_as_group(lines), refresh=True)
            if run.status in ENDED:
                return run
            time.sleep(interval)


def _told(console: Console, reader: RunReader, interval: float) -> Run:
    told = None
    while True:
        run = reader.read(verify_seconds=VERIFY_SECONDS)
        if run.status in ENDED:
            return run
        if (run.status, run.step) != told:
            told = (run.status, run.step)
            line = f"{run.status}  step {run.step:,}/{run.max_steps:,}  {printable(run.phase)}"
            line += f"  loss {loss(run.train.last('loss'))}  ETA {duration(run.eta_seconds)}"
            console.print(Text(line), soft_wrap=True)
        time.sleep(interval)


def _can_draw(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _ascii_only(console: Console) -> bool:
    return console.is_dumb_terminal or console.options.ascii_only


def _as_group(lines: Sequence[Text]) -> ConsoleRenderable:
    return Group(*lines)


def _around(run: Run, width: int, room: _Room, ascii_only: bool) -> tuple[list[Text], list[Text]]:
    """What stands above and below the curve."""
    return (
        [*_header(run, width, ascii_only), *_alerts(run, width, room)],
        [
            *_figures(run, room, ascii_only),
            *_experts(run, width, room, ascii_only),
            *_saved(run),
            *_events(run, room),
        ],
    )


def _header(run: Run, width: int, ascii_only: bool) -> list[Text]:
    first = Text("srde monitor  ", style="dim")
    room = width - cell_len(first.plain)
    folder, model = printable(run.folder), printable(run.facts.model)
    model = _end(model, max(room - min(cell_len(folder), _FOLDER) - 2, 8))
    first.append(_end(folder, max(room - cell_len(model) - 2, 8)), "bold")
    first.append(f"  {model}", "default")
    second = Text(f"{run.status:<9} ", style=_STYLES[run.status])
    share = min(run.step / run.max_steps, 1.0) if run.max_steps else 0.0
    full = round(share * _BAR)
    marks = "#." if ascii_only else "█░"
    second.append(marks[0] * full + marks[1] * (_BAR - full), "green")
    total = f"/{run.max_steps:,}" if run.max_steps else ""
    second.append(f" {run.step:,}{total} {100 * share:.0f} %", "bold")
    if run.phase:
        second.append(f"  {printable(run.phase)}", "default")
    if run.eta_seconds is not None:
        second.append(f"  ETA {duration(run.eta_seconds)}", "default")
    elif run.silent_seconds is not None:
        second.append(f"  last sign {duration(run.silent_seconds)} ago", "default")
    return [first, second]


def _end(name: str, cells: int) -> str:
    """The end of a path or name that is too long: it says most."""
    if cell_len(name) <= cells:
        return name
    while cell_len(name) > cells - 3:
        name = name[1:]
    return f"...{name}"


def _alerts(run: Run, width: int, room: _Room) -> list[Text]:
    lines = []
    found = alerts(run)
    for alert in found[: room.alerts]:
        style = "bold red" if alert.severity == ERROR else "yellow"
        text = textwrap.wrap(f"! {alert.kind}: {printable(alert.text)}", width - 2, subsequent_indent="  ")
        lines += [Text(line, style=style) for line in text[: room.alert_lines]]
    if len(found) > room.alerts:
        lines.append(Text(f"! and {plural(len(found) - room.alerts, 'more alert')}", style="yellow"))
    return lines


def _figures(run: Run, room: _Room, ascii_only: bool) -> list[Text]:
    train = run.train
    first = [("loss", loss(train.last("loss")))]
    if run.held_out:
        first.append((f"{HELD_OUT_MARK[ascii_only]} held-out", loss(run.held_out[-1].loss)))
        first.append((f"{BASE_MARK[ascii_only]} base", loss(run.held_out[-1].base)))
    first += [("lr", _short(train.last("learning_rate"))), ("grad norm", _short(train.last("grad_norm")))]
    second = [("tokens/s", count(run.tokens_per_second)), ("s/step", _short(run.step_seconds))]
    if run.memory_mb is not None:
        second.append(("memory", size(run.memory_mb * 1e6)))
    second += [("sparsity", percent(run.sparsity)), ("tokens", count(train.last("tokens")))]
    lines = [_pairs(first), _pairs(second)]
    names = [name for name in train.names if name == "router_temperature" or name.endswith("_loss")]
    extra = [
        (name.removesuffix("_loss"), _short(train.last(name)))
        for name in names
        if train.last(name) is not None
    ]
    if room.losses and extra:
        lines.append(_pairs(extra))
    return lines


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _pairs(pairs: Sequence[tuple[str, str]]) -> Text:
    line = Text()
    for name, value in pairs:
        line.append(f"{name} ", "dim")
        line.append(f"{value}  ", "bold")
    return line


def _experts(run: Run, width: int, room: _Room, ascii_only: bool) -> list[Text]:
    """The strip of the experts' load, and the held-out losses beside it."""
    routing = run.routing
    table = _held_out(run, room)
    if routing is None:
        return table
    layers, experts = routing.share_LE.shape
    state = "forced by labels" if routing.forced else f"{len(run.dead_experts)} dead"
    title = f"load: {experts} experts x {layers} layers, {state}"
    beside = bool(table) and width >= _NARROW
    left = width - _HELD_OUT - 1 if beside else width
    drawn = [Text(title, style="dim"), *strip(routing, left, room.experts, ascii_only=ascii_only)]
    if room.losses:
        drawn.append(legend(ascii_only=ascii_only))
    if not beside:
        return [*drawn, *table]
    lines = []
    for row in range(max(len(drawn), len(table))):
        line = drawn[row].copy() if row < len(drawn) else Text()
        if row < len(table):
            line.truncate(left, pad=True)
            line.append(" ")
            line.append_text(table[row])
        lines.append(line)
    return lines


def _held_out(run: Run, room: _Room) -> list[Text]:
    if not run.held_out:
        return []
    name_cells = _HELD_OUT - 3 * 8
    lines = [Text(f"{'held-out':<{name_cells}}{'loss':>8}{'base':>8}{'change':>8}", style="dim")]
    rows = run.held_out[:-1] or run.held_out
    for one in rows[: room.domains]:
        line = Text(printable(one.name))
        line.truncate(name_cells - 1, pad=True)
        line.append(f" {loss(one.loss):>8}", "bold")
        line.append(f"{loss(one.base):>8}")
        if one.loss is not None and one.base:
            change = one.loss / one.base - 1
            line.append(f"{100 * change:>+6.0f} %", "green" if change < 0 else "red")
        lines.append(line)
    if len(rows) > room.domains:
        lines.append(Text(f"and {len(rows) - room.domains} more", style="dim"))
    return lines


def _saved(run: Run) -> list[Text]:
    if not run.checkpoints:
        return [Text("no checkpoint yet", style="dim")]
    line = Text("saved ", style="dim")
    shown = run.newest_checkpoint or run.checkpoints[-1]
    others = len(run.checkpoints) - 1
    for one in [shown]:
        line.append(f"{one.name}, {size(one.bytes)}, ", "default")
        text = {True: "verified", False: "DAMAGED", None: "not verified yet"}[one.verified]
        line.append(text, {True: "green", False: "bold red", None: "default"}[one.verified])
    bad = sum(one.verified is False for one in run.checkpoints if one is not shown)
    if others:
        line.append(f"; {others} more" + (f", {bad} of them damaged" if bad else ""), "default")
    return [line]


def _events(run: Run, room: _Room) -> list[Text]:
    lines = []
    for event in run.events[len(run.events) - min(room.events, len(run.events)) :]:
        when = number(event, "time")
        clock = time.strftime("%H:%M:%S", time.localtime(when)) if when is not None else "-"
        line = Text(f"{clock} step {whole(event, 'step'):,} ", style="dim")
        line.append(f"{printable(event.get('event', ''))}: {printable(event.get('text', ''))}", "default")
        lines.append(line)
    return lines


def _held_out_points(run: Run) -> list[tuple[float, float]]:
    pairs = ((number(one, "step"), number(one, "loss")) for one in run.evals)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _fitted(line: Text, width: int, ascii_only: bool) -> Text:
    if cell_len(line.plain) > width:
        line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    if ascii_only:
        line.plain = line.plain.encode("ascii", "replace").decode()
    line.no_wrap = True
    return line
