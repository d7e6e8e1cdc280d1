"""Out of memory: halves of the batch, one after the other, instead of the end of the run.

The parts' losses are shares of the whole batch's loss, and their gradients add up to its gradient: the effective batch and the
language-modelling loss stay what they were. The auxiliary losses are means over the tokens at hand, and learned masks go by the
squared norms of the parts, as with gradient accumulation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srde.errors import TrainingError

_SEQUENCES = ("input_ids", "labels", "position_ids", "domain_ids", "attention_mask")
_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


def means_out_of_memory(error: BaseException) -> bool:
    """Whether a failure was for want of memory, on an accelerator or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _TEXTS)


def halves(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Two parts of a batch, as even as may be: by rows, or, of one row of packed examples, by examples.

    Returns:
        None for a batch that is a single example.
    """
    ids: Tensor = batch["input_ids"]
    if len(ids) > 1:
        middle = len(ids) // 2
        return (
            {k: v[:middle] if _splits(k, v) else v for k, v in batch.items()},
            {k: v[middle:] if _splits(k, v) else v for k, v in batch.items()},
        )
    positions = batch.get("position_ids")
    if positions is None:
        return None
    starts = (positions[0] == 0).nonzero().squeeze(1)[1:]
    if not len(starts):
        return None
    cut = int(starts[(starts - ids.shape[1] // 2).abs().argmin()])
    return (
        {k: v[:, :cut] if _splits(k, v) else v for k, v in batch.items()},
        {k: v[:, cut:] if _splits(k, v) else v for k, v in batch.items()},
    )


def _splits(name: str, value: Any) -> bool:
    return name in _SEQUENCES and isinstance(value, Tensor)


def parts(batch: dict[str, Any], times: int) -> list[dict[str, Any]]:
    """A batch halved so many times over, as far as it can be halved."""
    result = [batch]
    for _ in range(times):
        result = [half for part in result for half in (halves(part) or (part,))]
    return result


LOWER = (
    "Lower --max_length, then --per_device_train_batch_size, or pass --gradient_checkpointing true, --dtype bfloat16 "
    "or --quantization nf4"
)
LOWER_HELD_OUT = "Lower --per_device_eval_batch_size, then --max_length"


def out_of_memory(batch: dict[str, Any], error: BaseException, fix: str = LOWER) -> TrainingError:
    """The error for a batch that does not fit and cannot be made smaller."""
    rows, length = batch["input_ids"].shape
    failure = TrainingError.of(
        "batch", f"{rows} x {length} tokens",
        rule=f"out of memory: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
        fix=fix,
    )  # fmt: skip
    assert isinstance(failure, TrainingError)
    return failure
