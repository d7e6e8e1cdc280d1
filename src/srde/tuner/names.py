"""Experts by name."""

from __future__ import annotations

from srde.errors import ConfigError


class NamedExperts:
    """What a configuration with named experts can tell.

    Attributes:
        num_experts: Routed experts.
        expert_names: Their names, in order; several may share one; None where they have none.
    """

    num_experts: int
    expert_names: list[str] | None

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
        names = (
            f", named {', '.join(dict.fromkeys(self.expert_names))}"
            if self.expert_names
            else " and have no names"
        )
        raise ConfigError.of(
            "expert", name, rule=f"the adapter's experts are numbered 0 to {self.num_experts - 1}{names}",
            fix="pass one of these",
        )  # fmt: skip
