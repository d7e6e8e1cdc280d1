"""The auxiliary losses. Each is a mean over layers of a number that does not depend on batch or length.

Letters: T tokens, E experts, K top-k, N things that one expert rewrites, S slots (experts, then the null slot).

A mask [T] says which tokens count; padding does not. Statistics are means over counted tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srde.core.delta import Delta
from srde.core.router import Route


def load_balancing_loss(route: Route, num_routed: int, mask_T: Tensor | None = None) -> Tensor:
    """``E * sum_e f_e * P_e``: 1 when tokens and router probability spread evenly, up to E when all go to one.

    f_e is the share of the K choices that went to expert e, P_e the mean router probability. Switch Transformer
    (Fedus et al., 2021, eq. 4), with top-k as in Mixtral; Transformers' `load_balancing_loss_func` is K times this.
    Only open experts compete: locked ones have no share, and the null slot is nobody's load.
    """
    logits_TE = route.logits_TE[:, :num_routed]
    probs_TE = logits_TE.softmax(dim=-1)
    used_TE = (route.gate_TE[:, :num_routed] != 0).to(probs_TE.dtype)
    weight_T1 = _weight(mask_T, used_TE)
    share_E = (used_TE * weight_T1).sum(0)
    share_E = share_E / share_E.sum().clamp(min=1)
    prob_E = (probs_TE * weight_T1).sum(0) / weight_T1.sum().clamp(min=1)
    open_E = (logits_TE[:1] > float("-inf")).sum() if len(logits_TE) else num_routed
    return open_E * (share_E * prob_E).sum()


def router_z_loss(route: Route, mask_T: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits: keeps them small. ST-MoE (Zoph et al., 2022, eq. 5)."""
    z_T1 = route.logits_TE.logsumexp(dim=-1, keepdim=True).square()
    weight_T1 = _weight(mask_T, z_T1)
    return (z_T1 * weight_T1).sum() / weight_T1.sum().clamp(min=1)


def router_supervision_loss(route: Route, num_routed: int, expert_T: Tensor) -> Tensor:
    """Cross-entropy of the router's choice with a known one: teaches it whose tokens are whose.

    Args:
        route: The route, forced or not: the logits are the router's own.
        num_routed: Routed experts.
        expert_T: The right expert of each token; -1 where there is none, such as padding.
    """
    known = expert_T >= 0
    logits_TE = route.logits_TE[:, :num_routed]
    if not known.any():
        return logits_TE.sum() * 0
    return F.cross_entropy(logits_TE, expert_T, ignore_index=-1)


def orthogonality_loss(delta: Delta, locked: tuple[int, ...] = ()) -> Tensor:
    """How much the experts overlap: the mean, over pairs, of the cosine between the squared sizes of their changes.

    0 when no two experts change the same neuron (or entry), 1 when all change the same ones by the same amounts.
    Locked experts are left out. An expert that has changed nothing yet overlaps with nobody.
    """
    keep = [e for e in range(delta.num_experts) if e not in locked]
    if len(keep) < 2 or delta.disjoint():
        return delta.values.new_zeros(())  # nothing to push apart
    place_EN, size_EN = delta.places()[keep], delta.usage()[keep]
    norm_E1 = size_EN.square().sum(dim=1, keepdim=True).clamp(min=torch.finfo(size_EN.dtype).tiny).sqrt()
    unit_EN = size_EN / norm_E1
    # sum over ordered pairs e != e' of <unit_e, unit_e'> = |sum_e unit_e|^2 - sum_e |unit_e|^2, on used places only
    if torch.compiler.is_compiling():  # how many are used depends on data: there, on all places
        slot, count = place_EN.flatten(), delta.positions * delta.num_matrices
    else:
        used, slot = place_EN.flatten().unique(return_inverse=True)
        count = len(used)
    total_U = unit_EN.new_zeros(count).index_add(0, slot, unit_EN.flatten())
    pairs = len(keep) * (len(keep) - 1)
    return (total_U.square().sum() - unit_EN.square().sum()) / pairs


def sparsity_loss(delta: Delta, locked: tuple[int, ...] = ()) -> Tensor:
    """Mean magnitude of the deltas of the experts that train: pulls towards changing the base no more than needed."""
    if not locked:
        return delta.values.abs().mean()
    keep = torch.tensor([e for e in range(delta.num_experts) if e not in locked], device=delta.values.device)
    return delta.values.index_select(1, keep).abs().mean()


def _weight(mask_T: Tensor | None, like_TX: Tensor) -> Tensor:
    if mask_T is None:
        return like_TX.new_ones(len(like_TX), 1)
    return mask_T.reshape(-1, 1).to(like_TX.dtype)
