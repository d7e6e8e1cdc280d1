"""What a plan says, as plain data. Sizes are bytes, FLOPs are per token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from srde.plan.measure import Step
from srde.plan.weights import Weights


@dataclass(frozen=True)
class Run:
    """What depends on batch and length; bytes come on top of the base's weights, the adapter and the optimizer's state.

    Attributes:
        batch_size: Sequences at once.
        length: Tokens per sequence.
        path: The compute path that srde chooses by itself for so many tokens; None for what is not srde.
        kv_bytes: The KV cache, full.
        prefill_peak_bytes: The most that is alive in a prefill, KV cache included.
        decode_flops: Per decoded token, with `length` tokens before it; an adapter's on top of the base's.
        step: A training step; None for the bare base.
        checkpointed_step: A training step with gradient checkpointing.
    """

    batch_size: int
    length: int
    path: str | None
    kv_bytes: int
    prefill_peak_bytes: int
    decode_flops: int
    step: Step | None = None
    checkpointed_step: Step | None = None


@dataclass(frozen=True)
class Base:
    """The frozen model.

    Attributes:
        architecture: Its class.
        parameters: All of them, towers of other modalities included.
        weights: In each format.
        prefill_flops: Per token, one figure per run.
        decode_bytes: Weights read for a token that is decoded alone, at batch 1: those of the text decoder and the head,
            without the embedding table.
        mlps: MLPs that carry experts.
        hidden_size: Of these.
        intermediate_size: Of these.
        num_matrices: Of these: 3 gated, 2 plain.
        runs: One per batch size and length.
    """

    architecture: str
    parameters: int
    weights: Weights
    prefill_flops: list[int]
    decode_bytes: int
    mlps: int
    hidden_size: int
    intermediate_size: int
    num_matrices: int
    runs: list[Run]


@dataclass(frozen=True)
class Adapter:
    """One adapter on the base.

    Attributes:
        kind: "srde" or "lora".
        sparsity: srde's; for LoRA that of the srde adapter whose size it has.
        rank: LoRA's rank; for srde what one expert rewrites, neurons per MLP or entries per matrix.
        trainable_parameters: Exact.
        adapter_bytes: In memory: values, routers, indices.
        file_bytes: Of `adapter_model.safetensors`.
        gradient_bytes: Of all gradients, once they are there.
        optimizer_bytes: Of the optimizer's state.
        flops: Extra per token: LoRA's, or srde's with the masked path.
        flops_grouped: Extra per token with srde's grouped path.
        decode_bytes: Extra bytes read for a token that is decoded alone, at batch 1.
        runs: One per batch size and length.
    """

    kind: str
    sparsity: float
    rank: int
    trainable_parameters: int
    adapter_bytes: int
    file_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    flops: int
    flops_grouped: int | None
    decode_bytes: int
    runs: list[Run]


@dataclass(frozen=True)
class Plan:
    """A base and the adapters that were planned for it: srde and LoRA by turns, largest first."""

    model: str
    settings: dict[str, Any]
    base: Base
    adapters: list[Adapter]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def serve_bytes(self, run: Run, adapter: Adapter | None, weights: str) -> int:
        """Memory to serve with the base's weights in this format: weights, adapter, and the peak of a prefill."""
        return self._held(adapter, weights) + run.prefill_peak_bytes

    def train_bytes(self, run: Run, adapter: Adapter, weights: str, checkpointing: bool) -> int:
        """Memory to train: weights, adapter, optimizer's state, and the peak of forward and backward. When the optimizer
        steps, all gradients are there and no activation is; a fused optimizer needs nothing more."""
        step = run.checkpointed_step if checkpointing else run.step
        assert step is not None
        return (
            self._held(adapter, weights)
            + adapter.optimizer_bytes
            + max(step.peak_bytes, adapter.gradient_bytes)
        )

    def _held(self, adapter: Adapter | None, weights: str) -> int:
        unpacked = self.base.weights.unpacked if weights != "plain" else 0
        return getattr(self.base.weights, weights) + unpacked + (adapter.adapter_bytes if adapter else 0)
