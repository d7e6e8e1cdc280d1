"""The six reasoning domains."""

from __future__ import annotations

DOMAINS = ("math", "logic", "code", "science", "planning", "abstract")
"""The domains in the order of the experts that start with them: expert 0 is math. Data may name other domains."""
