"""The experts' load as a strip of shaded characters: layers across, experts down.

Marks say the load as a multiple of an even share; they differ in shape as well as in colour, for terminals without colours.
"""

from __future__ import annotations

import numpy as np
from rich.text import Text

from srde.monitor.history import Floats
from srde.monitor.routing import DEAD_SHARE, Routing

# Below which multiple of an even share; mark; mark in ASCII; colour.
_MARKS = (
    (DEAD_SHARE, "×", "x", "bold red"),
    (0.25, "·", ".", "blue"),
    (0.6, "░", "-", "cyan"),
    (1.6, "▒", "+", "green"),
    (3.0, "▓", "*", "yellow"),
    (np.inf, "█", "#", "bold magenta"),
)
_LABEL = 4
_GROUP_LABEL = 8
_WIDEST_CELL = 3


def strip(routing: Routing, width: int, height: int, *, ascii_only: bool = False) -> list[Text]:
    """Draws the strip.

    Args:
        routing: The shares to draw.
        width: Cells that a line may have; more layers than fit are drawn as means of neighbours.
        height: Lines; more experts than fit are drawn as means of neighbours.
        ascii_only: Only ASCII characters.

    Returns:
        At most `height` lines.
    """
    ratio_EL = routing.share_LE.T * routing.share_LE.shape[1]
    experts, layers = ratio_EL.shape
    down = -(-experts // max(height, 1))
    label = _LABEL if down == 1 else _GROUP_LABEL
    across = -(-layers // max(width - label, 1))
    ratio_EL = _grouped(_grouped(ratio_EL, down).T, across).T
    cell = min(max((width - label) // ratio_EL.shape[1], 1), _WIDEST_CELL)
    lines = []
    for row, ratio_L in enumerate(ratio_EL):
        first, last = row * down, min((row + 1) * down, experts) - 1
        line = Text(f"{f'{first}' if first == last else f'{first}-{last}':>{label - 1}} ", style="dim")
        for ratio in ratio_L:
            mark, style = _mark(ratio, ascii_only)
            line.append(mark * cell, style)
        lines.append(line)
    return lines


def legend(*, ascii_only: bool = False) -> Text:
    """What the marks mean."""
    line = Text("x even share: ", style="dim")
    below = 0.0
    for limit, *marks, style in _MARKS:
        line.append(marks[ascii_only], style)
        line.append(f" <{limit:g}  " if limit < np.inf else f" >{below:g}", "dim")
        below = limit
    return line


def _mark(ratio: float, ascii_only: bool) -> tuple[str, str]:
    if not np.isfinite(ratio):
        return " ", ""
    _, *marks, style = next(one for one in _MARKS if ratio < one[0])
    return marks[ascii_only], style


def _grouped(value_XY: Floats, size: int) -> Floats:
    """Means of each `size` neighbouring rows."""
    if size == 1:
        return value_XY
    parts = [np.mean(value_XY[start : start + size], axis=0) for start in range(0, len(value_XY), size)]
    grouped: Floats = np.stack(parts)
    return grouped
