"""The router: which experts a token uses, and how much of each.

Letters: T tokens, D model width, E experts (routed, then shared), K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srde.errors import ConfigError, UsageError


@dataclass(frozen=True)
class Mixture:
    """One fixed mixture of experts for all tokens, in the router's place.

    Attributes:
        share_E: The gate of each routed expert; any finite numbers.
    """

    share_E: tuple[float, ...]


@dataclass
class Route:
    """What the router decided for T tokens.

    Attributes:
        logits_TE: Router logits over the slots (routed experts, then the null slot if there is one),
            float32 or wider; locked slots hold minus infinity.
        slot_TK: The chosen slots, best first; -1 where a token was forced and has no further choice.
        share_TK: The weight of each, in the same order; they add up to 1, but in a given mixture.
        num_routed: How many experts are routed.
        num_shared: How many more are shared: always on, with gate 1.
        forced: Whether tokens were told their expert.
        open_E: The experts that may be chosen, and the shared ones [those]; None where that is all. Locked ones are left out of
            every product, so that an adapter with one more locked expert gives the very bits of the one without.
        path: The compute path that the route's delta takes, set when it starts.
        lone: Set when that delta treats the route as a lone token's.
        rows: Kept for that delta: what it works out once and needs twice.
    """

    logits_TE: Tensor
    slot_TK: Tensor
    share_TK: Tensor
    num_routed: int
    num_shared: int = 0
    forced: bool = False
    open_E: Tensor | None = field(default=None, repr=False, compare=False)
    path: Literal["masked", "grouped"] = field(default="masked", repr=False, compare=False)
    lone: bool = field(default=False, repr=False, compare=False)
    rows: Any = field(default=None, repr=False, compare=False)
    _gate_TE: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def gate_TE(self) -> Tensor:
        """Weight of each expert, zero where it was not chosen: [T, routed and then shared experts]. The null slot has no
        column: its share is dropped. Made at the first call; a lone token does without."""
        if self._gate_TE is None:
            zero_TE = torch.zeros_like(self.logits_TE)
            gate_TE = zero_TE.scatter_add(1, self.slot_TK.clamp(min=0), self.share_TK)[:, : self.num_routed]
            if self.num_shared:
                gate_TE = torch.cat([gate_TE, gate_TE.new_ones(len(gate_TE), self.num_shared)], dim=1)
            self._gate_TE = gate_TE
        return self._gate_TE

    @property
    def num_open(self) -> int:
        """How many routed experts may be chosen."""
        return self.num_routed if self.open_E is None else len(self.open_E) - self.num_shared

    @property
    def lone_experts(self) -> tuple[Tensor, Tensor] | None:
        """The experts [N] of a token that stands alone (decoding), its own and the shared ones, and their gates [N].

        None where there are more tokens, where these are all the experts, or where a slot may be no expert (the null slot;
        forced tokens).
        """
        tokens, top_k = self.slot_TK.shape
        if tokens != 1 or self.forced or top_k >= self.num_open or self.logits_TE.shape[1] > self.num_routed:
            return None
        slot_N, share_N = self.slot_TK[0], self.share_TK[0]
        if self.num_shared:
            every = torch.arange(self.num_routed, self.num_routed + self.num_shared, device=slot_N.device)
            slot_N, share_N = (
                torch.cat([slot_N, every]),
                torch.cat([share_N, share_N.new_ones(self.num_shared)]),
            )
        return slot_N, share_N

    @cached_property
    def groups(self) -> Groups:
        """The (expert, token) pairs in expert order. Reads values on the host: not for compiled code."""
        used_TE = self.gate_TE != 0
        pairs_P2 = used_TE.t().nonzero()
        return Groups(pairs_P2[:, 0], pairs_P2[:, 1], used_TE.sum(0).tolist())


@dataclass(frozen=True)
class Groups:
    """P pairs of an expert and one of its tokens, sorted by expert.

    Attributes:
        expert_P: The expert of each pair.
        token_P: The token of each pair.
        counts: Pairs of each expert, E whole numbers that add up to P.
    """

    expert_P: Tensor
    token_P: Tensor
    counts: list[int]


class Router(nn.Module):
    """Linear top-k router: float32 logits, the K best slots, softmax over the chosen (as in Mixtral).

    Args:
        hidden_size: Model width D.
        num_experts: Routed experts.
        top_k: Slots that a token chooses.
        null_expert: Adds one slot without a delta; a token that chooses it leaves that share of the
            base untouched.
        num_shared: Experts beside the routed ones whose gate is always 1.
        temperature: Divides the logits; above 1 the shares of the chosen are more even.
        device: Where the weight lives.

    Attributes:
        locked: Routed experts that are never chosen, and so not trained.
        frozen: Routed experts that are chosen and not trained: `Routing.hold_locked` holds them.

    Shapes: `weight` is [slots, D] float32 with slots = num_experts + null_expert.
    """

    INIT_STD = 0.02

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        null_expert: bool = False,
        num_shared: int = 0,
        temperature: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.null_expert = null_expert
        self.num_shared = num_shared
        self.temperature = temperature
        self.locked: tuple[int, ...] = ()
        self.frozen: tuple[int, ...] = ()
        self.weight = nn.Parameter(
            torch.empty(num_experts + null_expert, hidden_size, dtype=torch.float32, device=device)
        )
        nn.init.normal_(self.weight, std=self.INIT_STD)

    def lock(self, experts: Iterable[int]) -> None:
        """Locks exactly these routed experts: they are never chosen, so their gradient is exactly zero.

        Raises:
            ConfigError: An expert does not exist, or no slot would be left.
        """
        locked = tuple(sorted(set(experts)))
        for expert in locked:
            if not 0 <= expert < self.num_experts:
                raise ConfigError.of(
                    "locked expert", expert,
                    rule=f"routed experts are numbered 0 to {self.num_experts - 1}",
                    fix="lock only experts that exist",
                )  # fmt: skip
        if len(locked) == self.num_experts and not self.null_expert:
            raise ConfigError.of(
                "locked experts", list(locked),
                rule="at least one slot must stay open for the router to choose",
                fix="leave one expert unlocked, or build the adapter with null_expert=True",
            )  # fmt: skip
        self.locked = locked

    def forward(self, x_TD: Tensor, forced_T: Tensor | int | Mixture | None = None) -> Route:
        """Routes T tokens.

        Args:
            x_TD: Hidden states before the MLP.
            forced_T: A routed expert for every token, or one per token with -1 for "free": a forced token
                uses that expert alone, with gate 1. Or a mixture for every token. Locks do not apply to it.
        """
        logits_TE = self._logits(x_TD)
        open_E = None
        if self.locked and forced_T is None:
            experts = [e for e in range(self.num_experts + self.num_shared) if e not in self.locked]
            open_E = torch.tensor(experts, dtype=torch.long, device=logits_TE.device)
        if isinstance(forced_T, Mixture):
            share_E = logits_TE.new_tensor(forced_T.share_E)
            if share_E.shape != (self.num_experts,):
                raise ConfigError.of(
                    "mixture", forced_T.share_E, rule=f"it has one gate for each of the {self.num_experts} routed experts",
                    fix="use 0 for experts to leave out",
                )  # fmt: skip
            slot_E = torch.arange(self.num_experts, device=logits_TE.device)
            shape = (len(x_TD), self.num_experts)
            return Route(
                logits_TE,
                slot_E.expand(shape),
                share_E.expand(shape),
                self.num_experts,
                self.num_shared,
                True,
            )
        top_TK, slot_TK = logits_TE.topk(self.top_k, dim=-1)
        share_TK = top_TK.softmax(dim=-1)
        if forced_T is not None:
            slot_TK, share_TK = self._force(forced_T, slot_TK, share_TK)
        return Route(
            logits_TE, slot_TK, share_TK, self.num_experts, self.num_shared, forced_T is not None, open_E
        )

    def _logits(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weight: Tensor = self.weight
        open_S = None
        if self.locked:
            slots = [s for s in range(len(weight)) if s not in self.locked]
            open_S = torch.tensor(slots, dtype=torch.long, device=weight.device)
            weight = weight.index_select(0, open_S)
        if autocasts(x_TD):  # autocast would round the logits to bf16
            with torch.autocast(x_TD.device.type, enabled=False):
                logits_TE = F.linear(x_TD.to(dtype), weight.to(dtype))
        else:
            logits_TE = F.linear(x_TD.to(dtype), weight.to(dtype))
        if self.temperature != 1:
            logits_TE = logits_TE / self.temperature
        if open_S is not None:
            closed_TE = logits_TE.new_full((len(x_TD), len(self.weight)), float("-inf"))
            logits_TE = closed_TE.index_copy(1, open_S, logits_TE)
        return logits_TE

    def _force(self, forced_T: Tensor | int, slot_TK: Tensor, share_TK: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(forced_T, int):
            forced_T = slot_TK.new_full((len(slot_TK),), forced_T)
        if forced_T.shape != (len(slot_TK),):
            raise UsageError.of(
                "forced experts", tuple(forced_T.shape),
                rule=f"one expert per token is needed, and this layer sees {len(slot_TK)} tokens",
                fix="pass one expert, one per sequence, or one per token of the batch as it is fed",
            )  # fmt: skip
        free_T1 = (forced_T < 0).unsqueeze(1)
        only_TK, whole_TK = torch.full_like(slot_TK, -1), torch.zeros_like(share_TK)
        only_TK[:, 0], whole_TK[:, 0] = forced_T, 1
        return torch.where(free_T1, slot_TK, only_TK), torch.where(free_T1, share_TK, whole_TK)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor lives; on the meta device there is none, and torch raises when asked."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
