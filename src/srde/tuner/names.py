"""Experts by name."""

from __future__ import annotations

import math

from srde.errors import ConfigError


class NamedExperts:
    """What a configuration with named experts can tell.

    Attributes:
        num_experts: Routed experts.
        expert_names: Their names, in order; several may share one; None where they have none.
        disabled_experts: Those that are never chosen.
    """

    num_experts: int
    expert_names: list[str] | None
    disabled_experts: list[int] | None

    def name_of(self, expert: int) -> str:
        """An expert's name, or its number where it has none."""
        return self.expert_names[expert] if self.expert_names else str(expert)

    def experts_named(self, name: str | int) -> tuple[int, ...]:
        """The routed experts that a name or a number means.

        Raises:
            ConfigError: There is none.
        """
        if isinstance(name, int) or name.isdecimal():
            if 0 <= int(name) < self.num_experts:
                return (int(name),)
        elif found := tuple(e for e, own in enumerate(self.expert_names or ()) if own == name):
            return found
        if self.expert_names:
            rule = f", named {', '.join(dict.fromkeys(self.expert_names))}"
            fix = "pass one of these"
        else:
            rule, fix = " and have no names", "pass a number, or give them names with `srde experts name`"
        raise ConfigError.of(
            "expert",
            name,
            rule=f"the adapter's experts are numbered 0 to {self.num_experts - 1}{rule}",
            fix=fix,
        )

    def mixture(self, text: str) -> list[float]:
        """The gate of each routed expert from text such as ``math=0.7,code=0.3``; a name's share is split among its experts.

        Raises:
            ConfigError: An entry cannot be read, names no expert, or one that another entry names too.
        """
        gates: dict[int, float] = {}
        for entry in text.split(","):
            name, _, number = entry.strip().partition("=")
            try:
                share = float(number)
            except ValueError:
                share = math.nan
            experts = self.experts_named(name.strip()) if math.isfinite(share) else ()
            if not experts or gates.keys() & set(experts):
                raise ConfigError.of(
                    "mixture", text,
                    rule=f"an entry is an expert that no other entry names, '=' and a number; {entry.strip()!r} is none",
                    fix="write for example math=0.7,code=0.3",
                )  # fmt: skip
            gates |= dict.fromkeys(experts, share / len(experts))
        return [gates.get(expert, 0.0) for expert in range(self.num_experts)]
