"""What the routers did with held-out rows: load, entropy, dead experts, and which domain went where.

All figures are of the routed experts; shared ones are on for every token. Padding does not count.

Letters: N rows, D domains, L layers, E experts, B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srde.errors import UsageError
from srde.train.measure import Specialisation, specialisation
from srde.tuner import RoutingRecord

DEAD_SHARE = 0.1
"""An expert of a layer is dead when it has less than this part of an even share of the routed gates."""


@dataclass(frozen=True)
class Gates:
    """The gates of one row's tokens.

    Attributes:
        sum_LE: Their sum over the tokens, routed experts and then shared ones, float64.
        entropy_L: The sum over the tokens of the entropy of each token's routed gates, in nats.
        tokens: How many tokens.
    """

    sum_LE: Tensor
    entropy_L: Tensor
    tokens: int


@dataclass(frozen=True)
class RoutingStatistics:
    """What the routers did over a whole file.

    Attributes:
        names: The routed experts' names, or their numbers as texts.
        tokens: How many tokens were routed, in each layer.
        load_LE: Mean gate of each routed expert over them. A row sums to 1, or less where tokens chose the null slot.
        share_LE: The same as shares of the routed gates: rows sum to 1.
        entropy_L: Entropy of those shares, in nats: how evenly the experts are used over the file.
        token_entropy_L: Mean entropy of the gates of single tokens, in nats: how undecided the routers are.
        open_experts: Experts that the routers may choose; the others are locked or disabled.
        dead: Layer and number of each open expert with less than a tenth of an even share.
        domains: Names of the domains, in the order of the rows of the next two.
        share_DE: Each domain's shares of the routed gates, as a mean over layers.
        share_DLE: The same layer by layer.
        specialisation: Mutual information of domain and expert in bits, with a permutation test over rows; None with fewer than
            two domains.
    """

    names: tuple[str, ...]
    tokens: int
    load_LE: np.ndarray
    share_LE: np.ndarray
    entropy_L: np.ndarray
    token_entropy_L: np.ndarray
    open_experts: tuple[int, ...]
    dead: tuple[tuple[int, int], ...]
    domains: tuple[str, ...]
    share_DE: np.ndarray
    share_DLE: np.ndarray
    specialisation: Specialisation | None

    @property
    def largest_entropy(self) -> float:
        """The entropy of even shares of the open experts, in nats; 0 if only one is open."""
        return float(np.log(max(len(self.open_experts), 1)))

    def relative(self, entropy: float) -> float:
        """An entropy as a part of the largest; 1 where only one expert is open."""
        return entropy / self.largest_entropy if self.largest_entropy else 1.0


def gates_of(record: RoutingRecord, mask_BS: Tensor) -> list[Gates]:
    """The gates of each sequence of the one forward that was recorded.

    Raises:
        UsageError: More than one adapter was active.
    """
    routes = record.calls[0].routes
    names = sorted({adapter for _, adapter in routes})
    if len(names) > 1:
        raise UsageError.of(
            "active adapters", names, rule="routing is measured of one adapter at a time",
            fix="activate one with model.set_adapter",
        )  # fmt: skip
    found = []
    for route in routes.values():
        gate_BSE = route.gate_TE.float().view(*mask_BS.shape, -1) * mask_BS[:, :, None]
        routed_BSE = gate_BSE[..., : route.num_routed]
        share_BSE = routed_BSE / routed_BSE.sum(-1, keepdim=True).clamp(min=1e-12)
        entropy_BS = torch.special.entr(share_BSE).sum(-1)
        found.append((gate_BSE.sum(1).cpu().double(), entropy_BS.sum(1).cpu().double()))
    sum_LBE = torch.stack([gates for gates, _ in found])
    entropy_LB = torch.stack([entropy for _, entropy in found])
    tokens = mask_BS.sum(1).tolist()
    return [Gates(sum_LBE[:, b], entropy_LB[:, b], count) for b, count in enumerate(tokens)]


def routing_statistics(
    gates: Sequence[Gates],
    domains: Sequence[str | None],
    *,
    names: Sequence[str],
    closed: Sequence[int] = (),
) -> RoutingStatistics:
    """Sums up the rows of a file; every token weighs the same.

    Args:
        gates: Those of each row; at least one.
        domains: The domain of each row; rows without one count in everything but the figures by domain.
        names: Names of the routed experts.
        closed: Routed experts that the routers may not choose.
    """
    routed = len(names)
    sum_NLE = torch.stack([one.sum_LE[:, :routed] for one in gates]).numpy()
    token_N = np.array([one.tokens for one in gates], np.float64)
    load_LE = sum_NLE.sum(0) / token_N.sum()
    share_LE = _shares(load_LE)
    entropy_L = torch.special.entr(torch.from_numpy(share_LE)).sum(-1).numpy()
    token_entropy_L = torch.stack([one.entropy_L for one in gates]).sum(0).numpy() / token_N.sum()
    known = tuple(dict.fromkeys(domain for domain in domains if domain is not None))
    of_N = np.array([-1 if domain is None else known.index(domain) for domain in domains])
    share_DLE = np.zeros((len(known), *load_LE.shape))
    for d in range(len(known)):
        share_DLE[d] = _shares(sum_NLE[of_N == d].sum(0))
    still_open = tuple(e for e in range(routed) if e not in set(closed))
    dead = [
        (layer, expert)
        for layer, expert in np.argwhere(share_LE < DEAD_SHARE / max(len(still_open), 1)).tolist()
        if expert in still_open
    ]
    return RoutingStatistics(
        names=tuple(names),
        tokens=int(token_N.sum()),
        load_LE=load_LE,
        share_LE=share_LE,
        entropy_L=entropy_L,
        token_entropy_L=token_entropy_L,
        open_experts=still_open,
        dead=tuple(map(tuple, dead)),
        domains=known,
        share_DE=share_DLE.mean(1),
        share_DLE=share_DLE,
        specialisation=specialisation(sum_NLE / token_N[:, None, None], of_N),
    )


def _shares(load_LE: np.ndarray) -> np.ndarray:
    return load_LE / np.maximum(load_LE.sum(-1, keepdims=True), 1e-12)
