"""One colour per expert, the same in the terminal and in plots, for as many experts as there are."""

from __future__ import annotations

import colorsys

# mid-toned, to be told apart on white and on black
_FIRST = (
    "#3b8fd9", "#e0702a", "#26a269", "#c9a227", "#c061cb", "#e0465e", "#17a7a7", "#9c7a5c",
    "#7f7fe8", "#86a92f", "#d96aa0", "#5fa8c9",
)  # fmt: skip
_GOLDEN = 0.6180339887  # steps round the circle of hues that never come near an earlier one
NONE = "#8a8a8a"  # no expert


def expert_color(expert: int | None) -> str:
    """The colour of an expert, as ``#rrggbb``; grey for none."""
    if expert is None:
        return NONE
    if expert < len(_FIRST):
        return _FIRST[expert]
    parts = colorsys.hls_to_rgb((0.07 + _GOLDEN * expert) % 1, 0.52, 0.5)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)
