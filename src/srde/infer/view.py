"""Answers and analyses in a terminal: tokens in their experts' colours, or with marks such as ``[3]`` where there are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from srde.infer.colors import expert_color
from srde.infer.stream import Piece

if TYPE_CHECKING:
    from torch import Tensor

    from srde.infer.analysis import Analysis, Part

NAMED_LAYERS = 3


class Painter:
    """Writes pieces of answers as they come.

    Args:
        console: Where to; plain marks where it has no colours (no terminal, `NO_COLOR`).
        routing: Whether to show the experts at all.
    """

    def __init__(self, console: Console, *, routing: bool) -> None:
        self.console, self.routing = console, routing
        self._marked: int | None = None

    @property
    def colours(self) -> bool:
        """Whether experts are shown by colours."""
        return (
            self.console.is_terminal and not self.console.no_color and self.console.color_system is not None
        )

    def write(self, piece: Piece) -> None:
        """Writes a piece at once."""
        text = piece.text
        style = ""
        if self.routing and piece.gate_E is not None:
            if self.colours:
                style = expert_color(piece.expert)
            elif text.strip():
                text, self._marked = mark(text, piece.expert, self._marked), _number(piece.expert)
        if self.console.is_terminal:  # elsewhere the bytes are the model's own
            text = without_controls(text)
            self.console.print(Text(text, style), end="", soft_wrap=True)
        else:
            self.console.file.write(text)
            self.console.file.flush()

    def end(self) -> None:
        """Ends the line of an answer."""
        self._marked = None
        self.console.file.write("\n")
        self.console.file.flush()

    def legend(self, labels: Sequence[str], seen: Iterable[int | None]) -> None:
        """Says which colour or mark is which expert, for those that were seen."""
        found = set(seen)
        line = Text().append("experts:", style="dim" if self.colours else "")
        for expert in [*sorted(e for e in found if e is not None), *([None] if None in found else [])]:
            label = " none" if expert is None else labels[expert]
            line.append("  ")
            if self.colours:
                line.append(f"■ {label.strip()}", style=expert_color(expert))
            else:
                line.append(f"[{'-' if expert is None else expert}]{label.removeprefix(str(expert))}")
        if found:
            self.console.print(line, soft_wrap=True)


def mark(text: str, expert: int | None, before: int | None) -> str:
    """A text with its expert's mark before its first letter, unless the text before had the same; no expert is ``[-]``."""
    if _number(expert) == before:
        return text
    blank = text[: len(text) - len(text.lstrip())]
    return f"{blank}[{'-' if expert is None else expert}]{text[len(blank) :]}"


def _number(expert: int | None) -> int:
    return -1 if expert is None else expert


def without_controls(text: str) -> str:
    """A model's text without what steers a terminal; line breaks and tabs stay."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or ord(c) > 0x9F else c.encode("unicode_escape").decode()
        for c in text
    )


def summary(load_E: Tensor, num_routed: int, labels: Sequence[str]) -> str:
    """``expert 3 math: 41 %, ...``: the three experts with the largest share of an answer."""
    best = load_E[:num_routed].argsort(descending=True)[:3].tolist()
    return ", ".join(f"expert {labels[e]}: {100 * float(load_E[e]):.0f} %" for e in best)


def expert_table(analysis: Analysis) -> Table:
    """Which experts: their share of the prompt and of the answer, and the layers where the answer used them most."""
    table = Table(title="Experts", title_justify="left")
    table.add_column("expert")
    table.add_column("prompt", justify="right")
    table.add_column("answer", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column(f"layers that used it most (of {len(analysis.layers)})")
    spoken = analysis.spoken
    top = spoken.experts_T
    order = spoken.load_E.argsort(descending=True, stable=True).tolist()
    for e in order:
        load_L = spoken.load_LE[:, e]
        best = [
            n for n in load_L.argsort(descending=True, stable=True)[:NAMED_LAYERS].tolist() if load_L[n] > 0
        ]
        table.add_row(
            Text(f"■ {analysis.labels[e]}", style=expert_color(e)),
            _percent(analysis.prompt.load_E[e]),
            _percent(analysis.answer.load_E[e]) if analysis.answer else "-",
            str(top.count(e)),
            ", ".join(f"{analysis.numbers[n]} ({100 * float(load_L[n]):.0f} %)" for n in best) or "-",
        )
    if analysis.null:
        table.add_row(
            Text("■ none", style=expert_color(None)),
            _percent(1 - analysis.prompt.load_E.sum()),
            _percent(1 - analysis.answer.load_E.sum()) if analysis.answer else "-",
            str(top.count(None)),
            "",
        )
    table.add_section()
    for name, values in (("sureness", "sure_LT"), ("entropy", "entropy_LT")):
        table.add_row(
            name, _number_of(analysis.prompt, values), _number_of(analysis.answer, values), "", _MEANING[name]
        )
    if analysis.forced:
        table.caption = (
            "The experts were given from outside; sureness and entropy are the routers' own opinion."
        )
    return table


_MEANING = {
    "sureness": "mean probability of the routers' first choice",
    "entropy": "0 is sure, 1 is a guess among all",
}


def layer_table(analysis: Analysis) -> Table:
    """Which layers: the expert that each used most, its share, and how sure the router was."""
    spoken = analysis.spoken
    table = Table(title=f"Layers, {'answer' if analysis.answer else 'prompt'}", title_justify="left")
    for column in ("layer", "sureness", "entropy"):
        table.add_column(column, justify="right")
    table.add_column("experts it used")
    for n, number in enumerate(analysis.numbers):
        load_E = spoken.load_LE[n]
        best = [
            e for e in load_E.argsort(descending=True, stable=True)[:NAMED_LAYERS].tolist() if load_E[e] > 0
        ]
        used = Text()
        for e in best:
            used.append(f"{analysis.labels[e]} {100 * float(load_E[e]):.0f} %  ", style=expert_color(e))
        table.add_row(
            number,
            f"{float(spoken.sure_LT[n].mean()):.2f}",
            f"{float(spoken.entropy_LT[n].mean()):.2f}",
            used,
        )
    return table


def _number_of(part: Part | None, values: str) -> str:
    return "-" if part is None else f"{float(getattr(part, values).mean()):.2f}"


def _percent(share: Tensor) -> str:
    return f"{100 * float(share):.0f} %"
