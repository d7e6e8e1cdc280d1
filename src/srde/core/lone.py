"""A token that stands alone on a CPU: the step of decoding, made of as few calls as it can be.

Its arithmetic is a few hundred thousand multiplications a layer, which is nothing; its time is that of starting operations, and
most of all those that the base does not start too. So the choice of experts is made in Python from a handful of logits, the
experts' values are taken where they lie, and the gates go into the products.

Letters: D model width, F hidden neurons, E experts, R neurons rewritten per expert, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srde.core.delta import Delta
from srde.core.layout import MlpLayout
from srde.core.neuron import NeuronDelta
from srde.core.router import Route, Router


@dataclass(frozen=True)
class _Expert:
    """One expert's D -> F matrices [R, D], its F -> D matrix [D, R] and its neurons [R], where they lie."""

    ups: tuple[Tensor, ...]
    down_DR: Tensor
    index_R: Tensor


class LoneToken:
    """One MLP with the experts of one adapter, for one token, without a gradient. Made by `lone_token`."""

    def __init__(self, block: nn.Module, layout: MlpLayout, delta: NeuronDelta, router: Router) -> None:
        values, index = delta.values.detach(), delta.index
        self.block, self.layout = block, layout
        self.top_k, self.num_experts, self.num_shared = router.top_k, router.num_experts, router.num_shared
        self.weight = router.weight.detach()
        self.experts = [
            _Expert(tuple(values[:-1, e].unbind()), values[-1, e].t(), index[e])
            for e in range(delta.num_experts)
        ]
        self.zero_R = values.new_zeros(index.shape[1])
        self._made_of = delta.values, delta.index, router.weight
        self._places = delta.values.data_ptr(), router.weight.data_ptr()

    def fits(self, delta: Delta, router: Router) -> bool:
        """Whether it was made of these tensors, where they lie now."""
        values, index, weight = self._made_of
        found, wanted = delta._parameters["values"], router._parameters["weight"]
        return (
            found is values
            and wanted is weight
            and delta._buffers["index"] is index
            and (values.data_ptr(), weight.data_ptr()) == self._places
            and router.top_k == self.top_k
        )

    def run(self, x: Tensor, temperature: float) -> tuple[Tensor, list[int], list[float], Tensor]:
        """The MLP's output for one token.

        Args:
            x: Its hidden state, D numbers of any shape.
            temperature: The router's.

        Returns:
            The output in the shape of `x`, the K chosen slots, best first, their shares, and the logits [slots].
        """
        x_D = x.view(-1).float()
        logits_S = self.weight.mv(x_D)
        if temperature != 1:
            logits_S = logits_S / temperature
        logits = logits_S.tolist()
        slots = sorted(range(len(logits)), key=logits.__getitem__, reverse=True)[: self.top_k]
        best = logits[slots[0]]
        weights = [math.exp(logits[slot] - best) for slot in slots]
        total = sum(weights)
        shares = [weight / total for weight in weights]
        experts, layout, modules = self.experts, self.layout, self.block._modules
        chosen = [(experts[s], share) for s, share in zip(slots, shares, strict=True) if s < self.num_experts]
        if self.num_shared:
            chosen += [(expert, 1.0) for expert in experts[self.num_experts :]]

        zero_R, dtype, pre = self.zero_R, x.dtype, []
        for m, name in enumerate(layout.ups):
            a = modules[name](x)  # type: ignore[misc]
            a_F = a.view(-1)
            for expert, share in chosen:
                v_R = torch.addmv(zero_R, expert.ups[m], x_D, beta=0, alpha=share)
                a_F.index_add_(0, expert.index_R, v_R if dtype is torch.float32 else v_R.to(dtype))
            pre.append(a)
        h = layout.activate(self.block, pre)
        y = modules[layout.down](h)  # type: ignore[misc]
        h_F, y_D = h.view(-1), y.view(-1)
        y_D = y_D if dtype is torch.float32 else y_D.float()
        for expert, share in chosen:
            h_R = h_F.index_select(0, expert.index_R)
            y_D.addmv_(expert.down_DR, h_R if dtype is torch.float32 else h_R.float(), alpha=share)
        y = y if dtype is torch.float32 else y_D.to(dtype).view(x.shape)
        return layout.finish(self.block, y), slots, shares, logits_S


def lone_token(block: nn.Module, layout: MlpLayout, delta: Delta, router: Router) -> LoneToken | None:
    """What computes one token alone, or None where that is not to be had: other devices and types, entry deltas, fused
    matrices, a layout that no trial has confirmed."""
    plain = all(
        type(tensor.detach()) is Tensor and tensor.device.type == "cpu" and tensor.dtype == torch.float32
        for tensor in (delta.values, router.weight)
    )
    if not plain or not isinstance(delta, NeuronDelta) or layout.fused or layout.loose or not layout.tried:
        return None
    return LoneToken(block, layout, delta, router)


def lone_route(router: Router, slots: list[int], shares: list[float], logits_S: Tensor) -> Route:
    """What was decided for the token, for those who ask."""
    share_TK = logits_S.new_tensor([shares])
    return Route(logits_S.view(1, -1), torch.tensor([slots]), share_TK, router.num_experts, router.num_shared)
