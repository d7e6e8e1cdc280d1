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
        table: The experts of each domain by its number, none for tokens that are free; None gives domain d to expert d, modulo
            their number.
        rest: The experts of tokens without a domain, padding among them; free, if left out.
    """

    steps: int
    num_experts: int
    coef: float = 0.1
    start: int = 0
    table: tuple[tuple[int, ...], ...] | None = None
    rest: tuple[int, ...] = ()

    def experts(self, domain_ids: Tensor, position_ids: Tensor | None = None, turn: int = 0) -> Tensor:
        """The expert of each token, -1 for free ones, shaped like `domain_ids`.

        The examples of a domain with several experts go to them in turn, whole.

        Args:
            domain_ids: Domain of each token, [B, S].
            position_ids: Of packed examples, which restart at 0; None for one example a row.
            turn: Who is first; the step, say.
        """
        if not self.table and not self.rest:
            return torch.where(domain_ids < 0, domain_ids, domain_ids % self.num_experts)
        rows = [own or (-1,) for own in (*(self.table or ()), self.rest)]
        most = max(map(len, rows))
        table = torch.tensor(
            [[own[place % len(own)] for place in range(most)] for own in rows], device=domain_ids.device
        )
        count = torch.tensor([len(own) for own in rows], device=domain_ids.device)
        known = torch.where(domain_ids < 0, len(rows) - 1, domain_ids)
        nth = _nth_of_its_domain(example_numbers(domain_ids, position_ids), known, len(rows))
        nth = nth + (
            turn * 2654435761 % 2**32 >> 16
        )  # mixed, or a domain that comes every n-th step would keep its first
        return table[known, nth % count[known]]


def _nth_of_its_domain(example: Tensor, domain: Tensor, num_domains: int) -> Tensor:
    """How many examples of the same domain come before each token's own, shaped like `example`."""
    number, domain_T = example.flatten(), domain.flatten()
    domain_N = torch.zeros(int(number.max()) + 1, dtype=torch.long, device=number.device)
    domain_N.scatter_reduce_(0, number, domain_T, "amin", include_self=False)  # padding says the largest
    before_ND = torch.nn.functional.one_hot(domain_N, num_domains).cumsum(0) - 1
    return before_ND.gather(1, domain_N.unsqueeze(1)).squeeze(1)[example]


def domain_table(
    names: Sequence[str],
    num_experts: int,
    given: Sequence[str] | None,
    *,
    named: Sequence[str] | None = None,
    disabled: Sequence[int] = (),
) -> tuple[tuple[int, ...], ...]:
    """The experts of each domain: as given, or else those of its name, or else expert d for domain d, modulo their number.

    Args:
        names: Domains by their numbers.
        num_experts: Routed experts.
        given: Entries such as ``math=0,6``.
        named: Names of the experts, if they have some; a domain whose name is none of these has no expert then.
        disabled: Experts that are switched off: no domain has them.

    Raises:
        ConfigError: An entry cannot be read, or names a domain or an expert that does not exist or is switched off.
    """
    if named is None:
        table = {name: (number % num_experts,) for number, name in enumerate(names)}
    else:
        table = {name: tuple(e for e, own in enumerate(named) if own == name) for name in names}
    table = {name: tuple(e for e in own if e not in disabled) for name, own in table.items()}
    for entry in given or ():
        name, experts = _entry(entry, names, num_experts)
        if off := [e for e in experts if e in disabled]:
            raise ConfigError.of(
                "domain_experts", entry, rule=f"expert {off[0]} is disabled",
                fix="name another, or switch it on with `srde experts disable --undo`",
            )  # fmt: skip
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
