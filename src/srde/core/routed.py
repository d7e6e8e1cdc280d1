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
from srde.core.neuron import NeuronDelta
from srde.core.router import Route

DELTAS: dict[str, type[NeuronDelta] | type[ElementDelta]] = {"neuron": NeuronDelta, "element": ElementDelta}
"""Granularity -> what holds its deltas."""

# Measured by benchmarks/overhead.py on CPU (SmolLM2, 4 %: 366 saved rows per token): sorting tokens by expert and moving
# their rows about costs as much as this many rewritten neurons per token in one product of all experts; with gradients,
# where each move is made again backwards, about three times that.
GROUPING_COST = 384
GROUPING_COST_WITH_GRADIENTS = 1152


def choose_path(delta: Delta, route: Route, path: Path | None = None) -> Path:
    """The cheaper of the two ways to the same result, unless one is asked for.

    masked computes all E experts for every token: per token E*R rows, static shapes, no look at values on the host.
    grouped computes the K chosen ones: K*R rows and a fixed cost for sorting, gathering and scattering rows. So grouped
    pays when ``(E - K) * R`` exceeds that cost, `GROUPING_COST` rows or, where gradients are recorded,
    `GROUPING_COST_WITH_GRADIENTS`, with enough tokens that each expert has a group. Single entries have no small dense
    product: there, masked costs E times the base, and is only for code that must be compiled.
    """
    if path is not None:
        return path
    if torch.compiler.is_compiling() or route.logits_TE.is_meta:
        return "masked"
    if isinstance(delta, ElementDelta):
        return "grouped"
    tokens, top_k = route.slot_TK.shape
    if tokens < 8:
        return "masked"
    saved = (route.num_open - top_k) * delta.index.shape[-1]
    cost = GROUPING_COST_WITH_GRADIENTS if torch.is_grad_enabled() else GROUPING_COST
    return "grouped" if saved > cost and tokens >= 8 * route.num_routed else "masked"


def expand(
    pre: list[Tensor], x_TD: Tensor, experts: Sequence[tuple[Delta, Route]], path: Path | None = None
) -> list[Tensor]:
    """Adds the deltas of every adapter to the pre-activations [T, F]; see `Delta.expand`."""
    for delta, route in experts:
        route.path = choose_path(delta, route, path)
        pre = delta.expand(pre, x_TD, route, route.path)
    return pre


def contract(y_TD: Tensor, h_TF: Tensor, experts: Sequence[tuple[Delta, Route]]) -> Tensor:
    """Adds the deltas of every adapter to the MLP's output [T, D], on the paths that `expand` took; see `Delta.contract`."""
    for delta, route in experts:
        y_TD = delta.contract(y_TD, h_TF, route, route.path)
    return y_TD


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
    x_TD = x.reshape(-1, x.shape[-1])
    pre = expand(layout.expand(block, x_TD), x_TD, experts, path)
    if layout.fused:
        # halves of one tensor again, as in the base: an activation's last bits depend on how its input lies in memory
        pre = list(torch.cat(pre, dim=-1).chunk(2, dim=-1))
    h_TF = layout.activate(block, pre)
    y_TD = contract(getattr(block, layout.down)(h_TF), h_TF, experts)
    return layout.finish(block, y_TD.view(x.shape))
