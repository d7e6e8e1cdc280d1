"""Expert pre-training: all experts learn side by side, each token forced to an expert of its domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srde.errors import ConfigError
from srde.train.measure import example_numbers


@dataclass(frozen=True)
class Supervision:
    """Which expert each token is forced to, and when; the routers learn from the same labels whose tokens are whose.

    Attributes:
        steps: The step after the last that forces tokens.
        num_experts: Routed experts.
        coef: Weight of the routers' cross-entropy.
        start: The first step that forces tokens.
        table: The experts of each domain by its number; None gives domain d to expert d, modulo their number.
    """

    steps: int
    num_experts: int
    coef: float = 0.1
    start: int = 0
    table: tuple[tuple[int, ...], ...] | None = None

    def experts(self, domain_ids: Tensor, position_ids: Tensor | None = None, turn: int = 0) -> Tensor:
        """The expert of each token, -1 for tokens without a domain, shaped like `domain_ids`.

        The examples of a domain with several experts go to them in turn, whole.

        Args:
            domain_ids: Domain of each token, [B, S].
            position_ids: Of packed examples, which restart at 0; None for one example a row.
            turn: Who is first; the step, say.
        """
        if not self.table:
            return torch.where(domain_ids < 0, domain_ids, domain_ids % self.num_experts)
        most = max(map(len, self.table))
        table = torch.tensor(
            [[own[place % len(own)] for place in range(most)] for own in self.table], device=domain_ids.device
        )
        count = torch.tensor([len(own) for own in self.table], device=domain_ids.device)
        known = domain_ids.clamp(min=0)
        nth = _nth_of_its_domain(example_numbers(domain_ids, position_ids), known, len(self.table))
        nth = nth + (
            turn * 2654435761 % 2**32 >> 16
        )  # mixed, or a domain that comes every n-th step would keep its first
        return torch.where(domain_ids < 0, domain_ids, table[known, nth % count[known]])


def _nth_of_its_domain(example: Tensor, domain: Tensor, num_domains: int) -> Tensor:
    """How many examples of the same domain come before each token's own, shaped like `example`."""
    number, domain_T = example.flatten(), domain.flatten()
    domain_N = torch.zeros(int(number.max()) + 1, dtype=torch.long, device=number.device)
    domain_N.scatter_reduce_(0, number, domain_T, "amax")  # one domain per example; padding says 0
    before_ND = torch.nn.functional.one_hot(domain_N, num_domains).cumsum(0) - 1
    return before_ND.gather(1, domain_N.unsqueeze(1)).squeeze(1)[example]


def domain_table(
    names: Sequence[str], num_experts: int, given: Sequence[str] | None
) -> tuple[tuple[int, ...], ...]:
    """The experts of each domain: as given, or else expert d for domain d, modulo their number.

    Args:
        names: Domains by their numbers.
        num_experts: Routed experts.
        given: Entries such as ``math=0,6``.

    Raises:
        ConfigError: An entry cannot be read, or names a domain or an expert that does not exist.
    """
    table = {name: (number % num_experts,) for number, name in enumerate(names)}
    for entry in given or ():
        name, experts = _entry(entry, names, num_experts)
        table[name] = experts
    return tuple(table[name] for name in names)


def _entry(entry: str, names: Sequence[str], num_experts: int) -> tuple[str, tuple[int, ...]]:
    name, _, text = entry.partition("=")
    try:
        experts = tuple(int(part) for part in text.split(","))
    except ValueError:
        experts = ()
    if not experts or name not in names or not all(0 <= e < num_experts for e in experts):
        raise ConfigError.of(
            "domain_experts", entry,
            rule=f"an entry is a domain ({', '.join(names)}), '=' and experts from 0 to {num_experts - 1}",
            fix="write for example --domain_experts math=0,6 code=2",
        )  # fmt: skip
    return name, experts
