"""What is measured of each variant: prefill, decode, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srde.train.losses import auxiliary_losses, delta_losses
from variants import Variant


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        name: As in the tables.
        unit: Of its time.
        tokens: How many of `unit` one run makes; its time is divided by it.
        prepare: Makes what is then run, once per variant.
        against: The kind of variant it is compared with.
    """

    name: str
    unit: str
    tokens: int
    prepare: Callable[[Variant], Callable[[], object]]
    against: str


def prefill(length: int) -> Job:
    """A prompt of `length` tokens: no gradient, KV cache filled, logits of the last token, as `generate` does."""

    def prepare(variant: Variant) -> Callable[[], object]:
        model, ids = variant.select().eval(), _ids(variant.model, 1, length)

        def run() -> object:
            variant.select()
            with torch.no_grad():
                return model(input_ids=ids, use_cache=True, logits_to_keep=1)

        return run

    return Job(f"prefill 1x{length}", "ms", 1, prepare, "base")


def decode(batch: int, context: int, tokens: int) -> Job:
    """One token per sequence after `context` tokens; the cache is cut back each time, so that its length stays the same."""

    def prepare(variant: Variant) -> Callable[[], object]:
        model = variant.select().eval()
        with torch.no_grad():
            cache = model(
                input_ids=_ids(model, batch, context), use_cache=True, logits_to_keep=1
            ).past_key_values
        ids = _ids(model, batch, 1)

        def run() -> None:
            variant.select()
            with torch.no_grad():
                for _ in range(tokens):
                    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    cache.crop(-1)

        return run

    return Job(f"decode {batch}x1 at {context}", "ms/step", tokens, prepare, "base")


def train(batch: int, length: int) -> Job:
    """Forward, backward and a step of fused AdamW; srde with all four auxiliary losses."""

    def prepare(variant: Variant) -> Callable[[], object]:
        model, ids = variant.select().train(), _ids(variant.model, batch, length)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def run() -> None:
            variant.select()
            _loss(variant, ids).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    return Job(f"step {batch}x{length}", "ms", 1, prepare, "lora")


def _loss(variant: Variant, ids: Tensor) -> Tensor:
    """The loss as `srde.train.SrdeLossMixin` puts it together."""
    if variant.kind != "srde":
        return variant.model(input_ids=ids, labels=ids, use_cache=False).loss
    routing, config = variant.model.srde, variant.model.peft_config["default"]
    routing.measure = delta_losses
    with routing.record() as record:
        loss = variant.model(input_ids=ids, labels=ids, use_cache=False).loss
    for name, value in auxiliary_losses(record.calls[0], config, "default").items():
        loss = loss + getattr(config, f"{name}_coef") * value
    return loss


def _ids(model: nn.Module, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (batch, length), generator=generator)
    return ids.to(next(model.parameters()).device)
