"""How a run's experts share the tokens: dead experts, collapsed routers.

Letters in names: L layers, E open routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from srde.monitor.history import Floats, Loads

DEAD_SHARE = 0.01
"""An expert is dead below this part of an even share."""

COLLAPSED_SHARE = 0.9
"""A layer's router has collapsed when one expert has more than this part of its load."""

COLLAPSED_ENTROPY = 0.3
"""Or when the entropy of its shares, divided by that of even shares, is below this."""

FORCED_PHASES = frozenset({"expert_pretraining"})
"""Phases whose tokens go where their labels say: what is seen there is the data's share, not the router's work."""

_FEWEST_WINDOWS = 3


@dataclass(frozen=True)
class Routing:
    """The mean over the last windows of one phase with the same experts open.

    Attributes:
        share_LE: Each open expert's part of its layer's load; rows sum to 1, or are NaN where a layer had no load.
        windows: How many windows it is the mean of.
        forced: Whether labels and not routers chose the experts.
    """

    share_LE: Floats
    windows: int
    forced: bool

    @property
    def dead(self) -> list[tuple[int, int]]:
        """Layer and number of each expert with under 1 % of an even share.

        Told only once three windows agree: an expert that has just been opened gets its time. In a forced phase there are none.
        """
        if self.forced or self.windows < _FEWEST_WINDOWS:
            return []
        layers, experts = np.nonzero(self.share_LE < DEAD_SHARE / self.share_LE.shape[1])
        return list(zip(layers.tolist(), experts.tolist(), strict=True))

    @property
    def entropy_L(self) -> Floats:
        """The shares' entropy in each layer, 1 for even shares and 0 for one expert alone; 1 if only one is open."""
        experts = self.share_LE.shape[1]
        if experts < 2:
            return np.ones(len(self.share_LE))
        share_LE = np.clip(self.share_LE, 1e-12, None)
        entropy_L: Floats = -(share_LE * np.log(share_LE)).sum(-1) / np.log(experts)
        return entropy_L

    @property
    def collapsed(self) -> list[int]:
        """The layers whose router has collapsed; none in a forced phase or with one expert."""
        if self.forced or self.windows < _FEWEST_WINDOWS or self.share_LE.shape[1] < 2:
            return []
        top_L = self.share_LE.max(-1)
        return np.nonzero((top_L > COLLAPSED_SHARE) | (self.entropy_L < COLLAPSED_ENTROPY))[0].tolist()


def shares(load_LE: Floats) -> Floats:
    """Loads as parts of their layer's load; NaN for a layer without any."""
    load_LE = np.clip(load_LE, 0.0, None)
    total_L1 = load_LE.sum(-1, keepdims=True)
    share_LE: Floats = np.divide(load_LE, total_L1, out=np.full_like(load_LE, np.nan), where=total_L1 > 0)
    return share_LE


def recent_routing(loads: Loads, num_experts: int | None) -> Routing | None:
    """The routing of the last windows that had the same phase and the same experts open as the last one.

    Args:
        loads: The run's loads.
        num_experts: Routed experts; columns beyond them (shared experts) are left out. None keeps all.

    Returns:
        None if there is no window with loads.
    """
    if not loads.recent:
        return None
    last = loads.recent[-1]
    found: list[Floats] = []
    for window in reversed(loads.recent):
        if (window.phase, window.open_experts) != (last.phase, last.open_experts):
            break
        load_LE = window.load_LE(num_experts)
        if load_LE is not None and (not found or load_LE.shape == found[0].shape):
            found.append(load_LE)
    if not found or not found[0].size:
        return None
    return Routing(shares(np.mean(found, axis=0)), len(found), last.phase in FORCED_PHASES)


def share_history(loads: Loads, num_experts: int | None) -> tuple[Floats, Floats]:
    """How the shares went over the run.

    Args:
        loads: The run's loads.
        num_experts: Routed experts, as in `recent_routing`.

    Returns:
        The steps of the windows that are kept, and for each the experts' shares as a mean over layers (windows x experts), in
        multiples of an even share; NaN for experts that were not open.
    """
    steps, rows = [], []
    for window in [*loads.spread, *(one for one in loads.recent if one.step > loads.spread[-1].step)]:
        load_LE = window.load_LE(num_experts)
        if load_LE is not None and load_LE.size:
            share_LE = shares(load_LE)
            known_LE = share_LE[np.isfinite(share_LE).all(-1)]
            if len(known_LE):
                steps.append(window.step)
                rows.append(known_LE.mean(0) * share_LE.shape[1])
    ratio_TE = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for row, ratio_E in enumerate(rows):
        ratio_TE[row, : len(ratio_E)] = ratio_E
    return np.array(steps), ratio_TE
