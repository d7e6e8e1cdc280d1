"""Answers prompts with an adapter, and says which experts produced each answer.

Letters: B prompts, E experts (routed, then shared), N new tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srde.data.tokenize import prompt_ids
from srde.tuner import Routing, RoutingRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Turns = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: What was generated, without special tokens.
        new_tokens: How many tokens that took, the one that ends the turn included.
        load_E: Mean gate of each expert over the positions that produced these tokens and over all layers; None where
            no adapter spoke.
        num_routed: How many of them are routed; the shared ones follow.
    """

    text: str
    new_tokens: int
    load_E: Tensor | None
    num_routed: int = 0

    @property
    def expert(self) -> int | None:
        """The routed expert with the largest share; None where no adapter spoke."""
        return None if self.load_E is None else int(self.load_E[: self.num_routed].argmax())


@dataclass(frozen=True)
class Answers:
    """Answers in the prompts' order, and the new tokens per second over all of them (prompts' processing included)."""

    answers: list[Answer]
    tokens_per_second: float

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.answers)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Turns],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    **options: Any,
) -> Answers:
    """Answers prompts through the model's chat template, greedily unless told otherwise.

    Args:
        model: Any causal language model; with an srde adapter, the answers also say which experts spoke.
        tokenizer: Its tokenizer.
        prompts: Texts, or conversations of ``{"role", "content"}``.
        max_new_tokens: Most tokens per answer.
        batch_size: Prompts answered at once, padded on the left; prompts of similar length go together.
        options: For Transformers' `generate`, such as ``do_sample=True, temperature=0.7``.
    """
    turns = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    ids = [prompt_ids(tokenizer, t) for t in turns]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers: dict[int, Answer] = {}
    options = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    if not options["do_sample"]:  # a checkpoint's own sampling settings would be warned about
        options = {"temperature": None, "top_p": None, "top_k": None, **options}
    start = time.perf_counter()
    for first in range(0, len(order), batch_size):
        chunk = order[first : first + batch_size]
        answers |= zip(chunk, _batch(model, tokenizer, [ids[i] for i in chunk], options), strict=True)
    seconds = time.perf_counter() - start
    return Answers(
        [answers[i] for i in range(len(ids))], sum(a.new_tokens for a in answers.values()) / seconds
    )


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], options: dict[str, Any]
) -> list[Answer]:
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(i)) + i for i in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids], device=model.device)
    routing = getattr(model, "srde", None)
    with torch.inference_mode():
        if isinstance(routing, Routing):
            with routing.record() as record:
                out = model.generate(input_ids=input_ids, attention_mask=mask, **options)
        else:
            record, out = RoutingRecord(), model.generate(input_ids=input_ids, attention_mask=mask, **options)
    new = out[:, longest:]
    counts = [_spoken(row, _end_ids(model, tokenizer)) for row in new.tolist()]
    loads = answer_load(record, counts) if record.calls else [None] * len(ids)
    texts = [
        tokenizer.decode(row[:n], skip_special_tokens=True).strip()
        for row, n in zip(new, counts, strict=True)
    ]
    routed = (
        next((r.num_experts for layer in routing.layers.values() for r in layer.active_routers()), 0)
        if routing
        else 0
    )
    return [Answer(t, n, load, routed) for t, n, load in zip(texts, counts, loads, strict=True)]


def answer_load(record: RoutingRecord, counts: Sequence[int]) -> list[Tensor]:
    """Mean gates [E] of each of B answers, over layers and over the positions that produced its tokens.

    Args:
        record: Of one `generate`: first the prompts, then one call per new token.
        counts: How many new tokens each answer has; later positions of a batch are padding.
    """
    per_call = []
    for call in record.calls:
        gates = torch.stack([route.gate_TE for route in call.routes.values()]).float().mean(0)
        per_call.append(
            gates.view(len(counts), -1, gates.shape[-1])[:, -1]
        )  # the last position predicts the new token
    gate_NBE = torch.stack(per_call)
    return [gate_NBE[: max(n, 1), b].mean(0) for b, n in enumerate(counts)]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {i for i in (*ends, tokenizer.eos_token_id) if i is not None}


def _spoken(row: list[int], ends: set[int]) -> int:
    return next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
