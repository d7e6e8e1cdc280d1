"""Batches: several examples packed into one row, or padded rows.

Packing wastes nothing on padding: examples stand one after another, each with position ids from 0, and Transformers makes the
attention mask block-diagonal where positions restart. It does so only if the model passes `position_ids` on to its mask,
`attention_mask` is None and there is no KV cache, and it says nothing where one of these fails: examples then see each other.
Llama, Mistral, Ministral3, Qwen2/3, Gemma2/3, GPT-2, GPT-J, GPT-NeoX and Phi isolate; OPT, Bloom, MPT, Falcon and the state-space
models do not. `packing_is_exact` asks the model itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
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
    """Several examples in one row: ids, labels, positions and domain numbers of one length.

    Positions restart at 0 with each example, whose first label is `IGNORE`: it would be predicted from the example before.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    domain_ids: list[int]


def pack(examples: Sequence[Example], *, max_length: int) -> list[PackedRow]:
    """Packs examples into rows of at most `max_length` tokens, by best fit: into the fullest row that still has room.

    The examples are shuffled first, always in the same way. Packed by falling length, as is usual, or in the file's order, a row
    would hold examples of one kind, and training on it would lead away from all the others.

    Raises:
        DataError: An example is longer than `max_length`.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example in Random(0).sample(examples, len(examples)):
        length = len(example.input_ids)
        if length > max_length:
            raise DataError.at(
                "examples", None, "row", f"has {length} tokens, more than max_length={max_length}"
            )
        at = bisect_left(room, (length, 0))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = max_length, len(rows)
            rows.append([])
        rows[row].append(example)
        insort(room, (free - length, row))
    return [_concatenate(row) for row in rows]


def _concatenate(examples: Sequence[Example]) -> PackedRow:
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
    import torch

    return {
        "input_ids": torch.tensor([[token for row in rows for token in row.input_ids]]),
        "labels": torch.tensor([[label for row in rows for label in row.labels]]),
        "position_ids": torch.tensor([[position for row in rows for position in row.position_ids]]),
        "domain_ids": torch.tensor([[domain for row in rows for domain in row.domain_ids]]),
        "use_cache": False,
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
