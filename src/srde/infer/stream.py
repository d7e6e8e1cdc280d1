"""Answers as they come: each piece of text with the experts that produced it.

Transformers' `generate` runs in a thread of its own and hands over each token; so what is streamed is what `generate` gives.

Letters: B prompts, E experts (routed, then shared).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srde.errors import ConfigError
from srde.infer.generate import Answer, generation_options, looks_back, num_routed, stop_strings_criteria
from srde.infer.prompts import Prompt, batches, check_lengths, encode_prompt, padded, padding_id
from srde.infer.stops import Stops, ended_by_string, find_stops
from srde.infer.texts import LiveText
from srde.tuner import Routing, RoutingRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: the text that one token added.

    Attributes:
        index: The prompt that it answers.
        text: The text; all pieces of an answer together are `Answer.text`.
        gate_E: Mean gate of each expert over the layers, where that token was produced; None where no adapter spoke.
        num_routed: How many of them are routed.
    """

    index: int
    text: str
    gate_E: Tensor | None
    num_routed: int = 0

    @property
    def expert(self) -> int | None:
        """The routed expert with the largest share; None where no adapter spoke, or no expert was chosen."""
        return None if self.gate_E is None else top_expert(self.gate_E[: self.num_routed])


def top_expert(gate_E: Tensor) -> int | None:
    """The expert with the largest gate; None if all of them are 0, as with the null expert."""
    return int(gate_E.argmax()) if bool((gate_E != 0).any()) else None


class Stream:
    """Iterates over the pieces of all answers; made by `stream`.

    Attributes:
        answers: Prompt's number -> its answer, once it is complete; also of an answer that was broken off, once the iterator
            is closed.
        stops: Where answers end, as it was found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: list[list[int]],
        stops: Stops,
        options: dict[str, Any],
        batch_size: int,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._ids, self._options, self._batch_size = ids, options, batch_size
        self.stops = stops
        self.answers: dict[int, Answer] = {}

    def __iter__(self) -> Iterator[Piece]:
        with ThreadPoolExecutor(1) as pool:
            for chunk in batches(
                [len(i) for i in self._ids], self._batch_size, even=looks_back(self._options)
            ):
                yield from self._batch(pool, chunk)

    def _batch(self, pool: ThreadPoolExecutor, chunk: list[int]) -> Iterator[Piece]:
        ends = self._options["eos_token_id"]
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        rows = [_Row(index, self._tokenizer, self.stops, ends, num_routed(self._model)) for index in chunk]
        tokens: queue.SimpleQueue[tuple[list[int], Tensor | None] | None] = queue.SimpleQueue()
        leave = threading.Event()
        work = pool.submit(self._generate, [self._ids[i] for i in chunk], tokens, leave)
        try:
            while (step := tokens.get()) is not None:
                for b, row in enumerate(rows):
                    yield from row.push(step[0][b], None if step[1] is None else step[1][b])
                    if row.over:
                        self.answers[row.index] = row.answer()
            work.result()  # raises what the thread raised
            for row in rows:
                yield from row.finish()
        finally:  # the reader has enough, or Ctrl-C: the thread leaves after the token that it is at
            leave.set()
            for row in rows:
                self.answers[row.index] = row.answer()

    def _generate(
        self,
        ids: list[list[int]],
        tokens: queue.SimpleQueue[tuple[list[int], Tensor | None] | None],
        leave: threading.Event,
    ) -> None:
        """What the thread does: one call of `generate`; `None` comes last in any case."""
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Left(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
                return torch.full((len(input_ids),), leave.is_set(), device=input_ids.device)

        try:
            batch = padded(ids, padding_id(self._tokenizer), self._model.device)
            length = batch["input_ids"].shape[1]
            criteria = stop_strings_criteria(self._tokenizer, self.stops, length) or StoppingCriteriaList()
            criteria.append(Left())
            routing = getattr(self._model, "srde", None)
            recording = routing.record() if isinstance(routing, Routing) else nullcontext(RoutingRecord())
            with torch.inference_mode(), recording as record:
                self._model.generate(
                    **batch,
                    streamer=_Hand(tokens, record, len(ids)),
                    stopping_criteria=criteria,
                    **self._options,
                )
        finally:
            tokens.put(None)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 1,
    system: str | None = None,
    raw: bool = False,
    stop_strings: Sequence[str] = (),
    **options: Any,
) -> Stream:
    """Answers prompts piece by piece: the same tokens and the same text as `srde.infer.generate.generate`.

        answer = stream(model, tokenizer, "What is 17 + 25?")
        for piece in answer:
            print(piece.text, end="", flush=True)
        print(answer.answers[0].expert)

    A context such as `routed` must stay open while the pieces are read.

    Args:
        model: A causal language model, with or without an srde adapter.
        tokenizer: Its tokenizer.
        prompts: A text, or several; or conversations of ``{"role", "content"}``.
        max_new_tokens: Most tokens per answer.
        batch_size: Prompts answered at once; their pieces come in turns.
        system: What the system says first, in conversations without such a turn.
        raw: Texts are continued as they are, without the chat template.
        stop_strings: Texts that end an answer.
        options: For Transformers' `generate`; no beam search, whose text is known only at its end.

    Raises:
        ConfigError: A prompt cannot be put to the model or leaves no room for an answer, or beams were asked for.
    """
    if (options.get("num_beams") or 1) > 1:
        raise ConfigError.of(
            "num_beams", options["num_beams"], rule="beam search knows its text only at the end, so nothing can be streamed",
            fix="leave it out, or do without --stream and --show_routing",
        )  # fmt: skip
    stops = find_stops(model, tokenizer, stop_strings, raw=raw)
    ids = [encode_prompt(tokenizer, prompt, system=system, raw=raw) for prompt in _several(prompts)]
    check_lengths(model, ids, max_new_tokens)
    settings = generation_options(tokenizer, stops, max_new_tokens, options)
    return Stream(model, tokenizer, ids, stops, settings, batch_size)


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, also of one text and of one conversation."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


class _Hand:
    """The streamer that `generate` calls: hands over each token with the gates [B, E] that produced it."""

    def __init__(self, tokens: queue.SimpleQueue[Any], record: RoutingRecord, rows: int) -> None:
        self._tokens, self._record, self._rows = tokens, record, rows
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:  # the prompts come first
            self._prompt = False
            return
        gates = None
        if self._record.calls:
            routes = self._record.calls[-1].routes.values()
            gate_BSE = torch.stack([route.gate_TE for route in routes]).float().mean(0)
            gates = gate_BSE.view(self._rows, -1, gate_BSE.shape[-1])[:, -1].cpu()
            self._record.calls.clear()  # a long answer keeps nothing
        self._tokens.put((value.tolist(), gates))

    def end(self) -> None:
        """Nothing is held back here."""


@dataclass
class _Row:
    """One answer of a batch while it comes."""

    index: int
    tokenizer: PreTrainedTokenizerBase
    stops: Stops
    ends: set[int]
    num_routed: int
    over: bool = False
    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.live: LiveText[Tensor | None] = LiveText(self.tokenizer, self.stops.strings)

    def push(self, token: int, gate_E: Tensor | None) -> Iterator[Piece]:
        if self.over:
            return
        self.ids.append(token)
        if gate_E is not None:
            self.gates.append(gate_E)
        self.over = token in self.ends or ended_by_string(self.tokenizer, self.ids, self.stops.strings)
        yield from self._pieces(self.live.push(token, gate_E))
        if self.over:
            yield from self._pieces(self.live.finish())

    def finish(self) -> Iterator[Piece]:
        """What is left of an answer that no token ended."""
        if not self.over:
            self.over = True
            yield from self._pieces(self.live.finish())

    def _pieces(self, found: list[tuple[str, Tensor | None]]) -> Iterator[Piece]:
        for text, gate_E in found:
            self.texts.append(text)
            yield Piece(self.index, text, gate_E, self.num_routed if gate_E is not None else 0)

    def answer(self) -> Answer:
        load_E = torch.stack(self.gates).mean(0) if self.gates else None
        return Answer("".join(self.texts), len(self.ids), load_E, self.num_routed, tuple(self.ids))
