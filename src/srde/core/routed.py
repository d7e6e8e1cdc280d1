"""The routed MLP: the base's own matrices and activation, with the experts' deltas mixed in per token.

Letters: T tokens, D model width, F hidden neurons, E experts, R things rewritten per expert, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srde.core.delta import Delta, Path
from srde.core.element import ElementDelta
from srde.core.layout import MlpLayout
from srde.core.router import Route

# Measured by benchmarks/overhead.py on CPU: sorting tokens by expert and moving their rows about costs as much as this
# many rewritten neurons per token in one product of all experts.
GROUPING_COST = 384


def choose_path(delta: Delta, route: Route, path: Path | None = None) -> Path:
    """The cheaper of the two ways to the same result, unless one is asked for.

    masked computes all E experts for every token: per token E*R rows, static shapes, no look at values on the host.
    grouped computes the K chosen ones: K*R rows and a fixed cost for sorting, gathering and scattering rows. So grouped
    pays when ``(E - K) * R > GROUPING_COST``, with enough tokens that each expert has a group. Single entries have no
    small dense product: there, masked costs E times the base, and is only for code that must be compiled.
    """
    if path is not None:
        return path
    if torch.compiler.is_compiling() or route.gate_TE.is_meta:
        return "masked"
    if isinstance(delta, ElementDelta):
        return "grouped"
    tokens, experts = route.gate_TE.shape
    chosen = route.slot_TK.shape[1] + route.num_shared
    saved = (experts - chosen) * delta.index.shape[-1]
    return "grouped" if saved > GROUPING_COST and tokens >= 8 * experts else "masked"


def expand(
    pre: list[Tensor], x: Tensor, experts: Sequence[tuple[Delta, Route]], path: Path | None = None
) -> list[Tensor]:
    """Adds the deltas of every adapter to the pre-activations; shapes as in `Delta.expand`, leading axes kept."""
    x_TD = x.reshape(-1, x.shape[-1])
    flat = [a.reshape(-1, a.shape[-1]) for a in pre]
    for delta, route in experts:
        flat = delta.expand(flat, x_TD, route, choose_path(delta, route, path))
    return [a_TF.view(a.shape) for a_TF, a in zip(flat, pre, strict=True)]


def contract(
    y: Tensor, h: Tensor, experts: Sequence[tuple[Delta, Route]], path: Path | None = None
) -> Tensor:
    """Adds the deltas of every adapter to the MLP's output; shapes as in `Delta.contract`, leading axes kept."""
    h_TF, y_TD = h.reshape(-1, h.shape[-1]), y.reshape(-1, y.shape[-1])
    for delta, route in experts:
        y_TD = delta.contract(y_TD, h_TF, route, choose_path(delta, route, path))
    return y_TD.view(y.shape)


def routed_mlp(
    block: nn.Module,
    layout: MlpLayout,
    x: Tensor,
    experts: Sequence[tuple[Delta, Route]],
    path: Path | None = None,
) -> Tensor:
    """One MLP with experts: token t uses the weights ``W + sum_e g_te * Delta_e`` in all of its matrices.

    Args:
        block: The frozen base MLP.
        layout: How it computes.
        x: Hidden states [..., D].
        experts: The active adapters' deltas with the routes of these tokens; their changes add up.
        path: Forces one of the two compute paths; None lets `choose_path` decide.

    Returns:
        [..., D], in the base's dtype. With zero deltas, the base's very bits.
    """
    pre = expand(layout.expand(block, x), x, experts, path)
    if layout.fused:
        # halves of one tensor again, as in the base: an activation's last bits depend on how its input lies in memory
        pre = list(torch.cat(pre, dim=-1).chunk(2, dim=-1))
    h = layout.activate(block, pre)
    y = contract(getattr(block, layout.down)(h), h, experts, path)
    return layout.finish(block, y)
