"""Folds one expert, or a fixed mixture, into the base: a plain model at the base's speed; and proves that it says the same.

Letters: N prompts, S positions, V vocabulary, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srde.errors import ArtifactError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBES = (
    "The capital of France is Paris, and the capital of Italy is",
    "If a train travels 120 km in 1.5 hours, its average speed is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "All birds have feathers. A penguin is a bird. Therefore",
    "Water boils at a lower temperature on a mountain because",
    "To make a cup of tea, first fill the kettle, then",
    "Day is to night as summer is to",
    "Dear Anna, thank you for the letter, which arrived on",
)
"""What merged and routed model both read; written for this."""
BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.15}
"""Largest logit difference that is let through, by the base's type, as a share of the largest logit in size where that is over 1.
Merged weights are rounded to that type, the routed model's deltas are not: what is left is the rounding of weights. Whatever the
bound, a model that is further from the adapter than the base is has lost what was merged, and is refused."""


@dataclass(frozen=True)
class Parity:
    """How near a merged model is to the adapter with its routing fixed.

    Attributes:
        largest: Largest difference of a logit.
        mean: Mean difference of a logit, in size.
        change: Mean difference that the merged experts make to the base's logits.
        scale: Largest logit in size.
        bound: What `largest` may be.
        same_next: Share of positions at which both have the same likeliest next token.
        positions: At how many positions they were compared.
        dtype: The base's type.
    """

    largest: float
    mean: float
    change: float
    scale: float
    bound: float
    same_next: float
    positions: int
    dtype: str

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.3g} (bound {self.bound:.3g}; logits up to {self.scale:.3g}; mean "
            f"difference {self.mean:.2g} where the experts make {self.change:.2g}; {self.dtype}); "
            f"same next token at {100 * self.same_next:.1f} % of {self.positions} positions"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    expert: int | None = None,
    weights: Sequence[float] | None = None,
    bound: float | None = None,
    prompts: Sequence[str] = PROBES,
) -> tuple[PreTrainedModel, Parity]:
    """Folds one expert, or a mixture, into the base and compares logits before and after.

    Args:
        model: The model with the adapter; used up.
        tokenizer: Its tokenizer.
        expert: The routed expert, gate 1.
        weights: A gate for each of the E routed experts instead.
        bound: Largest logit difference to let through; by the base's type if left out, see `BOUNDS`.
        prompts: What both read.

    Returns:
        The plain model, and how near it is.

    Raises:
        ArtifactError: They differ by more than the bound.
        UsageError: Neither or both of `expert` and `weights` are given, or the base is quantised.
    """
    model.eval()
    route: AbstractContextManager[None]
    if weights is not None:
        route = model.srde.force_mixture(weights)
    else:
        route = model.srde.force_experts(-1 if expert is None else expert)
    with route:
        before = _logits(model, tokenizer, prompts)
    with model.disable_adapter():
        base = _logits(model, tokenizer, prompts)
    dtype = model.dtype
    plain = model.merge_and_unload(expert=expert, weights=weights, safe_merge=True)
    after = _logits(plain, tokenizer, prompts)
    difference = torch.cat([(a - b).abs().flatten() for a, b in zip(after, before, strict=True)])
    scale = max(float(one.abs().max()) for one in before)
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(after, before, strict=True)])
    parity = Parity(
        largest=float(difference.max()),
        mean=float(difference.mean()),
        change=float(torch.cat([(a - b).abs().flatten() for a, b in zip(before, base, strict=True)]).mean()),
        scale=scale,
        bound=BOUNDS[dtype] * max(scale, 1) if bound is None else bound,
        same_next=float(same.float().mean()),
        positions=len(same),
        dtype=str(dtype).removeprefix("torch."),
    )
    if not parity.largest <= parity.bound:  # a difference that is no number is refused too
        raise ArtifactError.of(
            "merged model", f"{parity.largest:.3g}",
            rule=f"its logits may differ from the adapter's by {parity.bound:.3g}: {parity}",
            fix="merge in float32 with --dtype float32, or allow more with --max_logit_difference",
        )  # fmt: skip
    if parity.mean > parity.change > 0 and bound is None:
        raise ArtifactError.of(
            "merged model", f"{parity.mean:.3g}", rule=f"rounding changed it more than the experts do: {parity}",
            fix="merge in float32 with --dtype float32, or allow it with --max_logit_difference",
        )  # fmt: skip
    return plain, parity


@torch.inference_mode()
def _logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[Tensor]:
    """Logits [S, V] float32 of each prompt on its own."""
    out = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        out.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().cpu())
    return out
