"""What can be set about generating, with the names that Transformers gives it; contradictions are refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from srde.errors import ConfigError

_SAMPLING = ("top_p", "top_k", "min_p", "seed")


@dataclass(frozen=True)
class Settings:
    """Settings of one or more answers. What is None is the checkpoint's own, or Transformers' default.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        temperature: 0 is greedy; above 0 the tokens are drawn (`do_sample`).
        top_p: Draws from the smallest set of tokens with this much probability together.
        top_k: Draws from this many of the likeliest tokens.
        min_p: Leaves out tokens below this share of the likeliest one's probability.
        repetition_penalty: Above 1, tokens that were there already become less likely.
        no_repeat_ngram_size: No run of so many tokens appears twice.
        num_beams: Beams of beam search; 1 is none.
        stop_strings: Texts that end an answer.
        seed: Of what is drawn; None draws anew each time.
        use_cache: False computes all positions for every token again, slowly.

    Raises:
        ConfigError: A setting breaks its rule, or would have no effect.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    num_beams: int = 1
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        _check(
            "max_new_tokens",
            self.max_new_tokens,
            self.max_new_tokens >= 1,
            "an answer needs at least 1 token",
            "use 256",
        )
        _check(
            "temperature",
            self.temperature,
            self.temperature >= 0 and math.isfinite(self.temperature),
            "it must be at least 0",
            "use 0 for greedy",
        )
        _check(
            "num_beams",
            self.num_beams,
            self.num_beams >= 1,
            "there is at least 1 beam",
            "use 1 for no beam search",
        )
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _check(
                name,
                value,
                value is None or 0 < value <= 1,
                "it is a probability, above 0 and at most 1",
                "use 0.9 or so",
            )
        for name in ("top_k", "no_repeat_ngram_size"):
            value = getattr(self, name)
            _check(
                name,
                value,
                value is None or value >= 1,
                "it is a number of tokens, at least 1",
                "leave it out to do without",
            )
        penalty = self.repetition_penalty
        _check(
            "repetition_penalty",
            penalty,
            penalty is None or (penalty > 0 and math.isfinite(penalty)),
            "it divides scores and must be above 0",
            "use 1.1 or so",
        )
        for name in _SAMPLING:
            value = getattr(self, name)
            _check(
                name,
                value,
                value is None or self.temperature > 0,
                "it is for drawn tokens, and with temperature=0 none is drawn",
                "add temperature 1, or leave it out",
            )
        _check(
            "num_beams", self.num_beams, self.num_beams == 1 or self.temperature == 0,
            f"beam search looks for the likeliest text, and temperature={self.temperature} draws one",
            "give one of them",
        )  # fmt: skip

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `srde.infer.generate.generate` and `srde.infer.stream.stream`; the seed is not among them."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature > 0:
            options |= {"do_sample": True, "temperature": self.temperature}
        for name in ("top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if self.num_beams > 1:
            options["num_beams"] = self.num_beams
        if self.stop_strings:
            options["stop_strings"] = self.stop_strings
        if not self.use_cache:
            options["use_cache"] = False
        return options

    def start(self) -> None:
        """Seeds torch's generators; called once before the first answer."""
        import torch

        if self.temperature > 0:
            torch.manual_seed(self.seed) if self.seed is not None else torch.seed()


def _check(name: str, value: object, holds: bool, rule: str, fix: str) -> None:
    if not holds:
        raise ConfigError.of(name, value, rule=rule, fix=fix)
