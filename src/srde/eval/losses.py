"""Reads token sequences with a model: summed losses, log-probabilities of given tokens, and what the routers did.

One forward per sequence, in batches of similar length, padded on the right: with causal attention, padding then changes nothing
that comes before it, whatever kind of positions the model has. Logits are asked for only where a token counts, and turned to
float32 in slices, so that memory follows the trained tokens and not the prompts.

Letters: B sequences, S positions, K kept positions, V vocabulary, L layers, E experts (routed, then shared).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srde.errors import DataError
from srde.eval.routing import Gates, gates_of
from srde.tuner import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 2**28
"""Most logits [B, K, V] of one forward, unless a single sequence has more: 1 GiB in float32."""

SLICE = 2**25
"""Logits that are in float32 at once: 128 MiB."""


@dataclass(frozen=True)
class Passage:
    """A token sequence to read.

    Attributes:
        ids: Its tokens.
        first: The tokens from this place on count in the loss; at least 1, as nothing predicts the first token of all.
        at: A place behind or at `first`, up to the length, whose token might have been one of `candidates`.
        candidates: Tokens whose log-probability at that place is wanted.
    """

    ids: Sequence[int]
    first: int
    at: int = 0
    candidates: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a model made of a passage.

    Attributes:
        loss: Summed cross-entropy of the tokens that count, in nats.
        tokens: How many count.
        loglik: For each candidate the log-probability of the tokens from `first` to `at`, and then the candidate.
        gates: What the routers did with all of its tokens; None where that was not asked for, or without experts.
    """

    loss: float
    tokens: int
    loglik: tuple[float, ...]
    gates: Gates | None


def read(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    *,
    pad_token_id: int,
    batch_size: int = 16,
    routing: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Reading]:
    """Reads passages, the longest first; the readings come in the passages' order.

    Args:
        model: A causal language model, with or without experts, in evaluation mode.
        passages: What to read.
        pad_token_id: Any id of the vocabulary.
        batch_size: Most sequences per forward; fewer where their logits would be more than `LOGITS`.
        routing: Whether to note what the routers do.
        progress: Called with the number of passages of each batch when it is done.
    """
    routers = getattr(model, "srde", None) if routing else None
    cut = keeps_logits(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    readings: dict[int, Reading] = {}
    for places in _batches(passages, batch_size, vocabulary, cut):
        batch = [passages[place] for place in places]
        found = _read_batch(model, batch, pad_token_id, routers, cut)
        readings |= zip(places, found, strict=True)
        progress(len(batch))
    return [readings[place] for place in range(len(passages))]


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can be asked for the logits of some positions only."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def check_lengths(model: PreTrainedModel, lengths: Sequence[int], rows: Sequence[Any]) -> None:
    """Refuses the first row that has more tokens than the model has positions.

    Raises:
        DataError: There is one.
    """
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    most = getattr(config, "max_position_embeddings", None)
    for length, row in zip(lengths, rows, strict=True):
        if most is not None and length > most:
            raise DataError.at(
                row.file, row.line, "row",
                f"has {length:,} tokens with its answer, and the model has {most:,} positions; take the row out of the file",
            )  # fmt: skip


def _batches(passages: Sequence[Passage], batch_size: int, vocabulary: int, cut: bool) -> Iterator[list[int]]:
    """Places of passages that are read together, the longest first: where memory does not suffice, that is seen at once."""
    order = sorted(range(len(passages)), key=lambda place: -len(passages[place].ids))
    batch: list[int] = []
    for place in order:
        if batch:
            kept = _kept([passages[p] for p in (*batch, place)], cut)
            if len(batch) == batch_size or (len(batch) + 1) * len(kept) * vocabulary > LOGITS:
                yield batch
                batch = []
        batch.append(place)
    if batch:
        yield batch


def _kept(batch: Sequence[Passage], cut: bool) -> range:
    """Positions whose logits are needed: those before the tokens that count."""
    longest = max(len(one.ids) for one in batch)
    return range(min(one.first for one in batch) - 1 if cut else 0, longest)


@torch.inference_mode()
def _read_batch(
    model: PreTrainedModel, batch: Sequence[Passage], pad: int, routers: Any, cut: bool
) -> list[Reading]:
    longest = max(len(one.ids) for one in batch)
    ids_BS = torch.tensor(
        [[*one.ids, *[pad] * (longest - len(one.ids))] for one in batch], device=model.device
    )
    mask_BS = torch.tensor(
        [[1] * len(one.ids) + [0] * (longest - len(one.ids)) for one in batch], device=model.device
    )
    kept = _kept(batch, cut)
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "use_cache": False}
    if cut and kept.start:
        inputs["logits_to_keep"] = torch.arange(kept.start, kept.stop, device=model.device)
    record = None
    if isinstance(routers, Routing):
        with routers.record() as record:
            logits_BKV = model(**inputs).logits
    else:
        logits_BKV = model(**inputs).logits
    gates = gates_of(record, mask_BS) if record is not None and record.calls else [None] * len(batch)
    return [
        _one(one, logits_BKV[b], kept.start if cut else 0, own)
        for b, (one, own) in enumerate(zip(batch, gates, strict=True))
    ]


def _one(passage: Passage, logits_KV: Tensor, start: int, gates: Gates | None) -> Reading:
    """`logits_KV[k]` are those of position `start + k`, which predict the token at the place after it."""
    ids = torch.tensor(passage.ids[passage.first :], device=logits_KV.device)
    begin = passage.first - 1 - start
    step = max(1, SLICE // logits_KV.shape[-1])
    parts = []
    for low in range(0, len(ids), step):
        part_KV = logits_KV[begin + low : begin + min(low + step, len(ids))].float().log_softmax(-1)
        parts.append(part_KV.gather(1, ids[low : low + step, None])[:, 0])
    logprob_T = torch.cat(parts).cpu().double() if parts else torch.zeros(0, dtype=torch.float64)
    loglik: tuple[float, ...] = ()
    if passage.candidates:
        before = float(logprob_T[: passage.at - passage.first].sum())
        next_V = logits_KV[passage.at - 1 - start].float().log_softmax(-1)
        loglik = tuple(before + float(next_V[candidate]) for candidate in passage.candidates)
    return Reading(-float(logprob_T.sum()), len(ids), loglik, gates)
