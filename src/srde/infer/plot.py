"""An analysis as one picture: the expert of each token in each layer, each layer's experts, and how sure the routers were."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from srde.infer.colors import NONE, expert_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from srde.infer.analysis import Analysis

_LABELLED = 90  # tokens; with more, only every second, third ... has its text below
_WIDEST = 26.0  # inches


def save_plot(analysis: Analysis, path: str | os.PathLike[str], title: str = "") -> Path:
    """Draws an analysis.

    Args:
        analysis: Of one prompt and its answer.
        path: A PNG; its folder is made, and it appears whole.
        title: What stands above.

    Returns:
        The file.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [analysis.prompt, *([analysis.answer] if analysis.answer else [])]
    tokens = sum(len(part.texts) for part in parts)
    layers = len(analysis.layers)
    width, height = min(7.5 + 0.15 * tokens, _WIDEST), min(max(3.6, 1.8 + 0.13 * layers), 12.0)
    with rc_context({"font.size": 9, "text.parse_math": False}), warnings.catch_warnings():
        # tokens may hold letters that the font lacks; the plot shows boxes for them
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        by_token, by_expert, sure = figure.subplots(
            1, 3, sharey=True, width_ratios=[width - 6.3, 0.9 + 0.2 * len(analysis.labels), 1.3]
        )
        _tokens(by_token, analysis)
        _experts(by_expert, analysis)
        _sureness(sure, analysis)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
        _legend(figure, analysis)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(picture.getvalue())
    os.replace(temporary, path)
    return path


def _tokens(axes: Axes, analysis: Analysis) -> None:
    """Layers x tokens in the colours of the experts; the surer the router, the fuller the colour."""
    parts = [analysis.prompt, *([analysis.answer] if analysis.answer else [])]
    rows = [np.array([[_rgb(e) for e in row] for row in part.experts_LT]) for part in parts]
    colors = np.concatenate(rows, axis=1)
    sure = np.concatenate([part.sure_LT.numpy() for part in parts], axis=1)
    slots = len(analysis.labels) + analysis.null
    even = 1 / max(slots, 2)
    strength = 0.3 + 0.7 * np.clip((sure - even) / (1 - even), 0, 1)
    if analysis.forced:
        strength = np.ones_like(strength)
    axes.imshow(
        1 - strength[..., None] * (1 - colors), aspect="auto", interpolation="nearest", origin="upper"
    )
    texts = [text for part in parts for text in part.texts]
    step = -(-len(texts) // _LABELLED)
    axes.set_xticks(
        range(0, len(texts), step), [_tick(text) for text in texts[::step]], rotation=90, fontsize=7
    )
    axes.set_yticks(range(len(analysis.numbers)), analysis.numbers)
    if len(analysis.numbers) > 24:
        axes.set_yticks(range(0, len(analysis.numbers), 2), analysis.numbers[::2])
    axes.set_ylabel("layer")
    border = len(analysis.prompt.texts) - 0.5
    axes.set_title("prompt: the expert of each token", loc="left", fontsize=9)
    if analysis.answer:
        axes.axvline(border, color="black", linewidth=1.6)
        axes.text(
            border + 0.4, 1.012, "answer", transform=axes.get_xaxis_transform(), va="bottom", fontsize=9
        )


def _experts(axes: Axes, analysis: Analysis) -> None:
    """Layers x experts: mean weight."""
    load_LE = analysis.spoken.load_LE.numpy()
    axes.imshow(load_LE, aspect="auto", cmap="Greys", vmin=0, vmax=max(float(load_LE.max()), 1e-6))
    count = len(analysis.labels)
    axes.set_xticks(
        range(count), analysis.labels, rotation=90 if any(" " in n for n in analysis.labels) else 0
    )
    for label, e in zip(axes.get_xticklabels(), range(count), strict=True):
        label.set_color(expert_color(e))
        label.set_fontweight("bold")
    whose = "answer" if analysis.answer else "prompt"
    axes.set_title(f"{whose}: share of each expert", loc="left", fontsize=9)
    axes.set_xlabel(f"white 0 %, black {100 * float(load_LE.max()):.0f} %", fontsize=8)


def _sureness(axes: Axes, analysis: Analysis) -> None:
    """Mean probability of the router's first choice, per layer."""
    sure_L = analysis.spoken.sure_LT.mean(1).numpy()
    axes.barh(range(len(sure_L)), sure_L, color="#6b6b70", height=0.75)
    slots = len(analysis.labels) + analysis.null
    axes.axvline(1 / slots, color="#d55e00", linewidth=1, linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
    axes.set_xlabel("dashed: a guess", fontsize=8)
    axes.set_title("how sure", loc="left", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: object, analysis: Analysis) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=expert_color(e), label=label) for e, label in enumerate(analysis.labels)]
    if analysis.null:
        patches.append(Patch(color=NONE, label="none"))
    figure.legend(  # type: ignore[attr-defined]
        handles=patches, loc="outside lower left", ncols=min(len(patches), 16), frameon=False, fontsize=8,
        title="experts; pale where the router was unsure", title_fontsize=8, alignment="left",
    )  # fmt: skip


def _rgb(expert: int | None) -> tuple[float, ...]:
    color = expert_color(expert)
    return tuple(int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))


def _tick(text: str) -> str:
    """A token's text below the plot: white space made visible, long ones cut."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    shown = shown if shown.strip() else shown.replace(" ", "␣")
    shown = "".join(c if c.isprintable() else "·" for c in shown.strip(" ") or shown)
    return shown if len(shown) <= 14 else f"{shown[:13]}…"
