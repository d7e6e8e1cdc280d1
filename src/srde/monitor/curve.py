"""A curve over steps in braille dots (2 x 4 to a character), or in asterisks where a terminal has no braille."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from srde.monitor.history import Floats

LABEL = 8
"""Cells left of the curve, for the loss."""

HELD_OUT_MARK = {False: "●", True: "o"}
BASE_MARK = {False: "╌", True: "-"}
"""The marks, by whether only ASCII characters are drawn."""

_BITS = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # of U+2800, by column and row of a character's dots
_FEWEST_FOR_CLIPPING = 20

Points = Sequence[tuple[float, float]]


def curve(
    step_N: Floats,
    loss_N: Floats,
    held_out: Points,
    base: float | None,
    width: int,
    height: int,
    *,
    ascii_only: bool = False,
) -> list[Text]:
    """Draws training loss as a curve, held-out loss as circles, the frozen model's held-out loss as a level line.

    Each column shows the median of its steps. Values above all but the highest 3 % of columns are drawn at the top edge.

    Args:
        step_N: Logged steps, ascending.
        loss_N: Their losses; what is not finite is left out.
        held_out: Steps and losses of the evaluations.
        base: The level of the line, or None.
        width: Cells of each line, labels included.
        height: Lines of the curve; one more is below it, with the steps.
        ascii_only: Only ASCII characters.

    Returns:
        `height + 1` lines; one that says so if no loss has been logged.
    """
    columns = max(width - LABEL, 4)
    fine = np.isfinite(loss_N) & np.isfinite(step_N)
    steps = [*step_N[fine].tolist(), *(step for step, _ in held_out)]
    if not steps:
        return [Text(" " * LABEL + "no loss has been logged yet", style="dim")]
    first, last = min(steps), max(steps)
    per_cell, rows = (1, height) if ascii_only else (2, 4 * height)
    medians = _medians(step_N[fine], loss_N[fine], first, last, columns * per_cell)
    low, high = _range(
        [
            *(m for m in medians if m is not None),
            *(loss for _, loss in held_out),
            *([] if base is None else [base]),
        ]
    )

    def row_of(loss: float, count: int) -> int:
        return int(np.clip(round((high - loss) / (high - low) * (count - 1)), 0, count - 1))

    if ascii_only:
        cells = [[" "] * columns for _ in range(height)]
        for column, row in _joined([None if m is None else row_of(m, rows) for m in medians]):
            cells[row][column] = "*"
    else:
        dots = np.zeros((height, columns), dtype=int)
        for column, row in _joined([None if m is None else row_of(m, rows) for m in medians]):
            dots[row // 4, column // 2] |= _BITS[column % 2][row % 4]
        cells = [[chr(0x2800 + dot) if dot else " " for dot in line] for line in dots.tolist()]
    styles = [["cyan"] * columns for _ in range(height)]
    if base is not None:
        row = row_of(base, height)
        for column in range(columns):
            if cells[row][column] == " ":
                cells[row][column], styles[row][column] = BASE_MARK[ascii_only], "dim"
    for step, loss in held_out:
        column = round((step - first) / max(last - first, 1) * (columns - 1))
        row = row_of(loss, height)
        cells[row][column], styles[row][column] = HELD_OUT_MARK[ascii_only], "bold yellow"
    labels = {0: high, height // 2: high - (high - low) * (height // 2) / max(height - 1, 1), height - 1: low}
    lines = []
    for row in range(height):
        line = Text(f"{labels[row]:>{LABEL - 2}.2f}  " if row in labels else " " * LABEL, style="dim")
        for cell, style in zip(cells[row], styles[row], strict=True):
            line.append(cell, style)
        lines.append(line)
    left, right = f"step {first:,.0f}", f"{last:,.0f}"
    lines.append(Text(" " * LABEL + left + right.rjust(columns - len(left)), style="dim"))
    return lines


def _medians(step_N: Floats, loss_N: Floats, first: float, last: float, columns: int) -> list[float | None]:
    """The median loss of each column's steps; None where it has none."""
    place_N = ((step_N - first) / max(last - first, 1) * (columns - 1)).round().astype(int)
    found: list[float | None] = [None] * columns
    bounds = np.searchsorted(place_N, np.arange(columns + 1))
    for column in range(columns):
        if bounds[column] < bounds[column + 1]:
            found[column] = float(np.median(loss_N[bounds[column] : bounds[column + 1]]))
    return found


def _range(losses: list[float]) -> tuple[float, float]:
    low, high = min(losses), max(losses)
    if len(losses) >= _FEWEST_FOR_CLIPPING:
        high = max(float(np.percentile(losses, 97)), low)
    room = max((high - low) * 0.04, 1e-3)
    return low - room, high + room


def _joined(row_C: Sequence[int | None]) -> set[tuple[int, int]]:
    """The dots of a line through the rows of all columns that have one."""
    dots = set()
    before: tuple[int, int] | None = None
    for column, row in enumerate(row_C):
        if row is None:
            continue
        dots.add((column, row))
        if before is not None:
            for between in range(before[0], column + 1):
                share = (between - before[0]) / (column - before[0])
                dots.add((between, round(before[1] + share * (row - before[1]))))
            step = 1 if row >= before[1] else -1
            dots.update(
                (column, between) for between in range(before[1], row, step) if column - before[0] == 1
            )
        before = (column, row)
    return dots
