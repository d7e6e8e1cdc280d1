"""Batches: several examples packed into one row, or padded rows.

Packing wastes nothing on padding: examples stand one after another, each with position ids from 0, and Transformers makes the
attention mask block-diagonal where positions restart. It does so only if the model passes `position_ids` on to its mask,
`attention_mask` is None and there is no KV cache, and it says nothing where one of these fails: examples then see each other.
Llama, Mistral, Ministral3, Qwen2/3, Gemma2/3, GPT-2, GPT-J, GPT-NeoX and Phi isolate; OPT, Bloom, MPT, Falcon and the state-space
models do not. `packing_is_exact` asks the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from srde.data.tokenize import IGNORE, Example
from srde.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Several examples in one row: ids, labels, positions and domain numbers of one length, as lists or as integer arrays.

    Positions restart at 0 with each example, whose first label is `IGNORE`: it would be predicted from the example before.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    position_ids: Sequence[int]
    domain_ids: Sequence[int]


def pack(examples: Sequence[Example], *, max_length: int) -> list[PackedRow]:
    """Packs examples into rows of at most `max_length` tokens, by best fit: into the fullest row that still has room.

    The examples are shuffled first, always in the same way. Packed by falling length, as is usual, or in the file's order, a row
    would hold examples of one kind, and training on it would lead away from all the others.

    Raises:
        DataError: An example is longer than `max_length`.
    """
    places = pack_places([len(example.input_ids) for example in examples], max_length=max_length)
    return [concatenate([examples[place] for place in row]) for row in places]


def pack_places(lengths: Sequence[int], *, max_length: int) -> list[list[int]]:
    """Which examples `pack` puts into each row, by their places."""
    shuffled = Random(0).sample(range(len(lengths)), len(lengths))
    rows = pack_lengths([lengths[place] for place in shuffled], max_length=max_length)
    return [[shuffled[place] for place in row] for row in rows]


def pack_lengths(lengths: Sequence[int], *, max_length: int, window: int | None = None) -> list[list[int]]:
    """Best fit, online: each example in turn goes into the fullest row that still has room for it.

    Args:
        lengths: Tokens of the examples, in order.
        max_length: Tokens that a row may have.
        window: Rows that stay open; when there are more, the fullest is closed, so that rows keep the examples' order up to
            about that many rows. None keeps all open, which fills best.

    Returns:
        The places of each row's examples, rows in the order in which they were begun.

    Raises:
        DataError: An example is longer than `max_length`.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # free tokens -> open rows
    with_room = (
        0  # bit r is set if there is a row with r free tokens: the next fit is found in a few machine words
    )
    opened = 0
    for place, length in enumerate(lengths):
        if length > max_length:
            raise DataError.at(
                "examples", None, "row", f"has {length} tokens, more than max_length={max_length}"
            )
        fitting = with_room >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = by_room[free].pop()
            if not by_room[free]:
                with_room ^= 1 << free
        else:
            free, row = max_length, len(rows)
            rows.append([])
            opened += 1
        rows[row].append(place)
        if free > length:
            by_room[free - length].append(row)
            with_room |= 1 << (free - length)
        else:
            opened -= 1
        if window is not None and opened > window:
            fullest = (with_room & -with_room).bit_length() - 1
            by_room[fullest].pop(0)
            opened -= 1
            if not by_room[fullest]:
                with_room ^= 1 << fullest
    return rows


def concatenate(examples: Sequence[Example]) -> PackedRow:
    """One row of several examples."""
    return PackedRow(
        input_ids=[token for example in examples for token in example.input_ids],
        labels=[label for example in examples for label in (IGNORE, *example.labels[1:])],
        position_ids=[position for example in examples for position in range(len(example.input_ids))],
        domain_ids=[example.domain_id for example in examples for _ in example.input_ids],
    )


def packed_collator(rows: Sequence[PackedRow]) -> dict[str, Any]:
    """Makes one batch of packed rows: `input_ids`, `labels`, `position_ids`, `domain_ids` of shape (1, sum of the rows' lengths).

    Rows are laid end to end instead of padded, so that no padding reaches a routing statistic. Attention grows with the square of
    that length: for more tokens a step, accumulate gradients rather than collate more rows.

    The batch also says `use_cache=False`. With a cache, which models make by default, Transformers does not isolate the examples.
    """
    import numpy as np
    import torch

    def joined(name: str) -> Tensor:
        parts = [np.asarray(getattr(row, name), dtype=np.int64) for row in rows]
        return torch.from_numpy(np.concatenate(parts)[None])

    return {name: joined(name) for name in ("input_ids", "labels", "position_ids", "domain_ids")} | {
        "use_cache": False
    }


@dataclass(frozen=True)
class PaddedCollator:
    """Makes batches of single examples, padded on the right; for models whose packing is not exact, and for evaluation.

    Attributes:
        pad_token_id: Any id of the vocabulary: the mask hides it and its label is `IGNORE`.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Returns `input_ids`, `labels`, `attention_mask`, `domain_ids` of shape (examples, longest length)."""
        import torch

        longest = max(len(example.input_ids) for example in examples)

        def padded(sequences: Sequence[list[int]], filling: int) -> Tensor:
            return torch.tensor(
                [[*sequence, *[filling] * (longest - len(sequence))] for sequence in sequences]
            )

        return {
            "input_ids": padded([example.input_ids for example in examples], self.pad_token_id),
            "labels": padded([example.labels for example in examples], IGNORE),
            "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
            "domain_ids": padded([[example.domain_id] * len(example.input_ids) for example in examples], -1),
        }


def packing_is_exact(model: PreTrainedModel) -> bool:
    """True if packed examples do not see each other in this model; costs two forward passes of ten tokens.

    Changes the first of two packed examples and looks at the logits of the second: in a model that isolates them, not one bit
    may change, because masked keys enter the attention with weight 0.
    """
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    positions = [*range(5), *range(5)]
    logits = []
    training = model.training
    model.eval()
    for start in (1, 6):
        ids = [(start + place) % vocabulary for place in range(5)] + [
            (11 + place) % vocabulary for place in range(5)
        ]
        batch = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
        with torch.no_grad():
            output = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False)
        logits.append(output.logits[0, 5:])
    model.train(training)
    return torch.equal(*logits)
