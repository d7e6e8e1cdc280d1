"""Measures runs of a shadow model: FLOPs, the KV cache, and every byte that lives on the way."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class LiveBytes(TorchDispatchMode):
    """Follows every tensor from the operation that makes it to its end.

    Views share their storage and count once. The parameters and buffers of `model` do not count. What a kernel
    allocates inside itself is not seen.

    Attributes:
        now: Bytes alive.
        peak: The most bytes that were alive at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        known = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
        self._known: dict[int, Any] = {storage._cdata: storage for storage in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and their product with the values, 2 B H Lq Lk (d_k + d_v): without a discount for the causal half, as
    PyTorch's counter has it for the other fused kernels."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def vector_flops(matrix: Any, _vector: Any, *_: Any, **__: Any) -> int:
    """A multiplication and an addition per number of the matrix."""
    return 2 * matrix[0] * matrix[1]


# What PyTorch's counter does not know.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten.mv: vector_flops,
}


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention in a run; element-wise operations are not counted."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Prefill:
    """A forward without gradients that fills the KV cache and gives the logits of the last position.

    Attributes:
        flops: Of the whole batch.
        kv_bytes: The KV cache.
        peak_bytes: The most that was alive at once, KV cache included.
        cache: The cache itself, to decode from.
    """

    flops: int
    kv_bytes: int
    peak_bytes: int
    cache: Any


def prefill(model: nn.Module, batch: int, length: int) -> Prefill:
    """Measures a prefill of `batch` prompts of `length` tokens; call it inside `shadow_of`, or on a real model."""
    model.eval()
    outputs: list[Any] = []
    ids = torch.zeros(batch, length, dtype=torch.long)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad(), LiveBytes(model) as live:
        flops = count_flops(lambda: outputs.append(model(input_ids=ids, use_cache=True, **last)))
    cache = outputs[0].past_key_values
    kv_bytes = sum(t.nbytes for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor))
    return Prefill(flops, kv_bytes, live.peak, cache)


def decode_flops(model: nn.Module, cache: Any, batch: int) -> int:
    """FLOPs of one further token per sequence after a prefill."""
    ids = torch.zeros(batch, 1, dtype=torch.long)
    with torch.no_grad():
        return count_flops(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True))


@dataclass(frozen=True)
class Step:
    """Forward and backward of a training step.

    Attributes:
        activation_bytes: What the forward leaves alive for the backward.
        peak_bytes: The most that was alive at once, gradients as they come included.
    """

    activation_bytes: int
    peak_bytes: int


def train_step(model: nn.Module, batch: int, length: int, packing: bool) -> Step:
    """Measures a step on `batch` rows of `length` tokens, with the language modelling loss on all of them.

    With packing the rows lie end to end, as `srde train` collates them; without, they are of one length and unpadded.
    The auxiliary losses are left out: they keep a few numbers per token and expert, where a layer keeps several per
    token and neuron.
    """
    model.train()
    shape = (1, batch * length) if packing else (batch, length)
    ids = torch.zeros(shape, dtype=torch.long)
    with LiveBytes(model) as live:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        activation_bytes = live.now
        loss.backward()
    model.zero_grad(set_to_none=True)
    return Step(activation_bytes, live.peak)
