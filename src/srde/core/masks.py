"""Which of the base's weights an expert rewrites: scores of the base, dealt out to the experts.

Letters: T tokens, I inputs, O outputs, E experts, N things that one expert rewrites.

Ways to score, and two ways to deal. `random` and `magnitude` look at the weights alone; `gradient` looks at how much
the loss on a calibration batch moves with each weight; these give one score for all experts, and `deal` deals. Learned
scores (`srde.core.selector`) are each expert's own: `draft` lets the experts choose in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_scores(weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Uniform scores, shaped like the weights; on the CPU, so that a seed means the same on every device."""
    return [torch.rand(w.shape, generator=generator) for w in weights]


def magnitude_scores(weights: Sequence[Tensor]) -> list[Tensor]:
    """Squared weights: a neuron's score is then the squared norm of all its weights."""
    return [w.float().square() for w in weights]


def gradient_scores(input_TI: Tensor, grad_output_TO: Tensor) -> Tensor:
    """Squared gradient of the loss by a linear layer's weight, [O, I] float32.

    The first-order saliency: the loss falls by this much per unit of step along the weight's own gradient. Built from
    what flows through the layer, so it also works where the weight itself is quantised and has no gradient.
    """
    return (grad_output_TO.float().t() @ input_TI.float()).square()


def deal(score_S: Tensor, num_experts: int, count: int) -> Tensor:
    """Deals the best-scored of S things to the experts like cards, best first, one each per round.

    So all experts get things of about the same worth, and none is given out twice while there are enough. Where there
    are not (E * N > S), each expert fills up with the best that it does not have yet.

    Returns:
        Long tensor [E, N], ascending for each expert.
    """
    order_S = score_S.argsort(descending=True, stable=True)
    rounds = min(count, len(order_S) // num_experts)
    dealt_EN = order_S[: rounds * num_experts].view(rounds, num_experts).t()
    if rounds < count:
        own_ES = torch.zeros(num_experts, len(order_S), dtype=torch.bool, device=order_S.device)
        own_ES.scatter_(1, dealt_EN, True)
        rank_S = torch.arange(len(order_S), device=order_S.device)
        rank_S = torch.empty_like(order_S).scatter_(0, order_S, rank_S)
        rank_ES = rank_S.expand(num_experts, -1).masked_fill(own_ES, len(order_S))
        more_EN = rank_ES.argsort(dim=1, stable=True)[:, : count - rounds]
        dealt_EN = torch.cat([dealt_EN, more_EN], dim=1)
    return dealt_EN.sort(dim=1).values


def draft(score_ES: Tensor, count: int) -> Tensor:
    """Lets the experts choose in turn, each the best by its own scores that nobody has taken, until each has `count`.

    Who begins changes from round to round (0 1 2, 2 1 0, ...). Where there are not enough for all (E * N > S), there are as many
    whole rounds as can be, and then each expert fills up with the best that it does not have itself.

    Returns:
        Long tensor [E, N], ascending for each expert.
    """
    num_experts, size = score_ES.shape
    order = score_ES.float().argsort(dim=1, descending=True, stable=True).tolist()
    taken = [False] * size
    chosen: list[list[int]] = [[] for _ in range(num_experts)]
    place = [0] * num_experts
    for turn in range(min(count, size // num_experts)):
        for e in range(num_experts) if turn % 2 == 0 else reversed(range(num_experts)):
            while taken[order[e][place[e]]]:
                place[e] += 1
            taken[order[e][place[e]]] = True
            chosen[e].append(order[e][place[e]])
    for e, own in enumerate(chosen):
        if len(own) < count:
            have = set(own)
            own += [one for one in order[e] if one not in have][: count - len(own)]
    return torch.tensor(chosen, device=score_ES.device).sort(dim=1).values
