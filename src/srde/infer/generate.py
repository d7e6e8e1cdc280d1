"""Answers prompts with an adapter, and says which experts produced each answer.

Letters: B prompts, L layers, E experts (routed, then shared), N new tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srde.errors import ConfigError
from srde.infer.prompts import Prompt, batches, check_lengths, encode_prompt, padded, padding_id
from srde.infer.routes import read_routes
from srde.infer.stops import Stops, ended_by_string, find_stops
from srde.infer.texts import answer_text
from srde.tuner import Routing, RoutingRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

_LOOK_BACK = ("repetition_penalty", "no_repeat_ngram_size")  # at the padding too


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: What was generated, without special tokens.
        new_tokens: How many tokens that took, the one that ends the turn included.
        load_E: Mean gate of each expert over the positions that produced these tokens and over all layers; None where
            no adapter spoke.
        num_routed: How many of them are routed; the shared ones follow.
        ids: The new tokens.
    """

    text: str
    new_tokens: int
    load_E: Tensor | None
    num_routed: int = 0
    ids: tuple[int, ...] = ()

    @property
    def expert(self) -> int | None:
        """The routed expert with the largest share; None where none spoke."""
        if self.load_E is None or not self.load_E[: self.num_routed].any():
            return None
        return int(self.load_E[: self.num_routed].argmax())


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
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    system: str | None = None,
    raw: bool = False,
    stop_strings: Sequence[str] = (),
    **options: Any,
) -> Answers:
    """Answers prompts through the model's chat template, greedily unless told otherwise. An answer ends at the ends that the
    checkpoint knows and at the template's end of turn (see `srde.infer.stops`).

    Args:
        model: Any causal language model; with an srde adapter, the answers also say which experts spoke.
        tokenizer: Its tokenizer.
        prompts: Texts, or conversations of ``{"role", "content"}``.
        max_new_tokens: Most tokens per answer.
        batch_size: Prompts answered at once, padded on the left; prompts of similar length go together.
        system: What the system says first, in conversations without such a turn.
        raw: Texts are continued as they are, without the chat template.
        stop_strings: Texts that end an answer; they are not part of it.
        options: For Transformers' `generate`, such as ``do_sample=True, temperature=0.7``.

    Raises:
        ConfigError: A prompt cannot be put to the model, or leaves no room for an answer.
    """
    stops = find_stops(model, tokenizer, stop_strings, raw=raw)
    ids = [encode_prompt(tokenizer, prompt, system=system, raw=raw) for prompt in prompts]
    check_lengths(model, ids, max_new_tokens)
    settings = generation_options(tokenizer, stops, max_new_tokens, options)
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    for chunk in batches([len(i) for i in ids], batch_size, even=looks_back(options)):
        answers |= zip(chunk, _batch(model, tokenizer, [ids[i] for i in chunk], stops, settings), strict=True)
    seconds = time.perf_counter() - start
    return Answers(
        [answers[i] for i in range(len(ids))], sum(a.new_tokens for a in answers.values()) / seconds
    )


def generation_options(
    tokenizer: PreTrainedTokenizerBase, stops: Stops, max_new_tokens: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of Transformers' `generate`: greedy and with these stops, where the options do not say otherwise.

    Raises:
        ConfigError: Several answers per prompt are asked for.
    """
    if options.get("num_return_sequences", 1) != 1:
        raise ConfigError.of(
            "num_return_sequences", options["num_return_sequences"], rule="each prompt gets one answer",
            fix="give the prompt several times",
        )  # fmt: skip
    options = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": padding_id(tokenizer),
        "eos_token_id": list(stops.ids) or None,
        **options,
    }
    if not options["do_sample"]:  # a checkpoint's own sampling settings would be warned about
        options = {"temperature": None, "top_p": None, "top_k": None, **options}
    return options


def looks_back(options: dict[str, Any]) -> bool:
    """Whether options judge a token by all before it, padding included: then an answer is only its own without padding."""
    return any(options.get(name) for name in _LOOK_BACK)


def stop_strings_criteria(
    tokenizer: PreTrainedTokenizerBase, stops: Stops, prompt_length: int
) -> StoppingCriteriaList | None:
    """Ends each row of a batch at its own stop string. Transformers' own criterion also finds those that begin in the prompt."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AtStrings(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            rows = input_ids[:, prompt_length:].tolist()
            ended = [ended_by_string(tokenizer, row, stops.strings) for row in rows]
            return torch.tensor(ended, device=input_ids.device)

    return StoppingCriteriaList([AtStrings()]) if stops.strings else None


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    stops: Stops,
    options: dict[str, Any],
) -> list[Answer]:
    batch = padded(ids, padding_id(tokenizer), model.device)
    longest = batch["input_ids"].shape[1]
    criteria = stop_strings_criteria(tokenizer, stops, longest)
    routing = getattr(model, "srde", None)
    beams = options.get("num_beams") or 1
    with torch.inference_mode():
        if isinstance(routing, Routing) and beams == 1:
            with routing.record() as record:
                out = model.generate(**batch, stopping_criteria=criteria, **options)
        else:
            record, out = RoutingRecord(), model.generate(**batch, stopping_criteria=criteria, **options)
    new = out[:, longest:].tolist()
    counts = [spoken(tokenizer, row, stops, options["eos_token_id"]) for row in new]
    rows = [row[:n] for row, n in zip(new, counts, strict=True)]
    if record.calls:
        loads: Sequence[Tensor | None] = answer_load(record, counts)
    else:  # beams change places while they are searched, so the answers are read once more
        read = [
            read_routes(model, [*i, *row]) if beams > 1 else None for i, row in zip(ids, rows, strict=True)
        ]
        loads = [
            None if r is None else r.gate_LTE[:, len(i) - 1 : -1].mean((0, 1))
            for r, i in zip(read, ids, strict=True)
        ]
    texts = [answer_text(tokenizer, row, stops.strings) for row in rows]
    routed = num_routed(model)
    return [
        Answer(text, len(row), load, routed, tuple(row))
        for text, row, load in zip(texts, rows, loads, strict=True)
    ]


def num_routed(model: PreTrainedModel) -> int:
    """How many routed experts the active adapters have; 0 without an adapter."""
    routing = getattr(model, "srde", None)
    if not isinstance(routing, Routing):
        return 0
    return next((r.num_experts for layer in routing.layers.values() for r in layer.active_routers()), 0)


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


def spoken(
    tokenizer: PreTrainedTokenizerBase, row: Sequence[int], stops: Stops, ends: Sequence[int] | int | None
) -> int:
    """How many of a row's new tokens are the answer: up to the first that ends it; what follows is padding."""
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return next(
        (
            n
            for n in range(1, len(row) + 1)
            if row[n - 1] in ends or ended_by_string(tokenizer, row[:n], stops.strings)
        ),
        len(row),
    )
