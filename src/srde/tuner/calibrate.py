"""Chooses masks by gradient: what the loss on a calibration batch would most like to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from srde.core import gradient_scores
from srde.errors import UsageError
from srde.tuner.control import no_adapter
from srde.tuner.layer import SrdeLayer, switched_off


def calibrate_masks(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], adapter: str = "default"
) -> None:
    """Chooses an adapter's masks by first-order saliency: the squared gradient of the loss by the base's MLP weights.

    The base stays frozen: gradients are put together from what flows through each layer, so quantised bases work too.
    Neurons need O(F) memory per layer; single entries need as much as the MLP's weights in float32.

    Args:
        model: A model with an srde adapter (a `PeftModel`, or Transformers' own after `load_adapter`).
        batches: Calibration batches, as for training, with `labels`; each is run once.
        adapter: The adapter whose masks to choose. Values that were trained already would lose their place.

    Raises:
        UsageError: There is no batch, or the adapter has been trained.
    """
    layers = [layer for layer in model.srde.layers.values() if adapter in layer.srde_experts]
    if not layers:
        raise no_adapter(model.srde.layers.values(), adapter)
    if any(layer.srde_experts[adapter].values.detach().abs().sum() > 0 for layer in layers):
        raise UsageError.of(
            "adapter", adapter, rule="its deltas are not zero any more, and new masks would move them elsewhere",
            fix="calibrate before training, or start a new adapter",
        )  # fmt: skip
    scores = [_Scores(layer, adapter) for layer in layers]
    trained = [(p, p.grad) for p in model.parameters() if p.requires_grad]  # of `modules_to_save`
    was_training = model.training
    count = 0
    try:
        model.eval()
        for parameter, _ in trained:
            parameter.grad = None
        with switched_off(layers), torch.enable_grad():
            for batch in batches:
                model(**batch).loss.backward()
                count += 1
    finally:
        for score in scores:
            score.taps.remove()
        for parameter, grad in trained:
            parameter.grad = grad
        model.train(was_training)
    if count == 0:
        raise UsageError.of(
            "batches", "none", rule="choosing masks by gradient needs at least one batch", fix="pass some"
        )
    for score in scores:
        score.finish()


class Taps:
    """Hooks on the matrices of one MLP: as gradients flow back, gives what went into each and the gradient of what came out.

    Args:
        layer: The MLP.
        add: Called with the matrix' name, its input [T, I] and the gradient of its output [T, O].
    """

    def __init__(self, layer: SrdeLayer, add: Callable[[str, Tensor, Tensor], None]) -> None:
        self.add = add
        block, layout = layer.owner(), layer.layout
        self.handles = [
            getattr(block, name).register_forward_hook(self._hook(name))
            for name in (*layout.ups, layout.down)
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if not out.requires_grad:  # below the first layer nothing does: the graph starts here
                out = out.detach().requires_grad_()
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            out.register_hook(lambda grad: self.add(name, x, grad.reshape(-1, grad.shape[-1])))
            return out

        return hook

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self.handles:
            handle.remove()


class _Scores:
    """Collects the scores of one MLP's matrices while batches run."""

    def __init__(self, layer: SrdeLayer, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter
        self.by_neuron = layer.srde_experts[adapter].values.ndim == 4
        self.scores: dict[str, Tensor] = {}
        self.taps = Taps(layer, self._add)

    def _add(self, name: str, x_TI: Tensor, grad_TO: Tensor) -> None:
        score = gradient_scores(x_TI, grad_TO)
        if self.by_neuron:
            score = (
                score.sum(dim=0, keepdim=True)
                if name == self.layer.layout.down
                else score.sum(dim=1, keepdim=True)
            )
        self.scores[name] = self.scores[name] + score if name in self.scores else score

    def finish(self) -> None:
        for score in self.scores.values():
            sum_over_processes(score)  # every process has seen rows of its own, and all must choose alike
        layout = self.layer.layout
        ups = [self.scores[name] for name in layout.ups]
        if layout.fused:
            first, second = ups[0].chunk(2)
            ups = [first, second] if layout.gate_first else [second, first]
        self.layer.srde_experts[self.adapter].set_masks([*ups, self.scores[layout.down]])
        self.layer._unset.pop(self.adapter, None)


def sum_over_processes(tensor: Tensor) -> None:
    """Adds a tensor up over the processes that train together, in place; with one process it stays as it is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
