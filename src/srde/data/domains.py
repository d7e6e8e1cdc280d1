"""The six reasoning domains."""

from __future__ import annotations

from collections.abc import Iterable

DOMAINS = ("math", "logic", "code", "science", "planning", "abstract")
"""The domains in the order of the experts that start with them: expert 0 is math. Data may name other domains."""


def number_domains(names: Iterable[str | None]) -> dict[str, int]:
    """Numbers for the domains of a data set: the six have theirs, others follow in order of first appearance."""
    others = dict.fromkeys(name for name in names if name and name not in DOMAINS)
    return {name: number for number, name in enumerate((*DOMAINS, *others))}
