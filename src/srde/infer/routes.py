"""What the routers decide for one sequence, read in one forward.

Letters: T tokens, L layers with experts, E experts (routed, then shared).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srde.tuner import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from srde.core import Route


@dataclass(frozen=True)
class Routes:
    """The routers' decisions at every position of one sequence, on the CPU in float32.

    Attributes:
        layers: Names of the MLPs with experts, in the model's order.
        gate_LTE: Weight of each expert; 0 where it was not chosen.
        sure_LT: Probability that the router gives to the slot it likes best, of all that are open to it.
        entropy_LT: Entropy of these probabilities, 0 (sure) to 1 (all the same).
        num_routed: How many experts are routed; the shared ones follow.
        null: Whether tokens may choose to use no expert.
        forced: Whether the experts were given from outside. The probabilities are the routers' own all the same.
    """

    layers: list[str]
    gate_LTE: Tensor
    sure_LT: Tensor
    entropy_LT: Tensor
    num_routed: int
    null: bool
    forced: bool


def read_routes(model: PreTrainedModel, ids: Sequence[int]) -> Routes | None:
    """Reads a sequence once and says where its tokens went; None where no adapter is active.

    Args:
        model: With an srde adapter.
        ids: The tokens [T].
    """
    routing = getattr(model, "srde", None)
    if not isinstance(routing, Routing):
        return None
    row = torch.tensor([list(ids)], device=model.device)
    with torch.inference_mode(), routing.record() as record:
        model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
    if not record.calls:
        return None
    record.layers()  # refuses several adapters at once
    named = {layer: route for (layer, _), route in record.calls[0].routes.items()}
    certain = [_certainty(route) for route in named.values()]
    first = next(iter(named.values()))
    return Routes(
        list(named),
        torch.stack([route.gate_TE for route in named.values()]).float().cpu(),
        torch.stack([sure for sure, _ in certain]),
        torch.stack([entropy for _, entropy in certain]),
        first.num_routed,
        first.logits_TE.shape[1] > first.num_routed,
        first.forced,
    )


def _certainty(route: Route) -> tuple[Tensor, Tensor]:
    """Probability of the best slot [T], and normalised entropy [T], over the slots that are not locked."""
    p_TE = route.logits_TE.float().cpu().softmax(-1)
    open_slots = int(torch.isfinite(route.logits_TE[0]).sum())
    entropy_T = -torch.special.xlogy(p_TE, p_TE).sum(-1)
    return p_TE.amax(-1), entropy_T / math.log(open_slots) if open_slots > 1 else entropy_T
