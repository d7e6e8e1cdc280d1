"""Mask learning: which neurons each expert may rewrite, learned on the expert's own tokens.

Letters: T tokens, D model width, F hidden neurons, E experts (routed, then shared), R neurons rewritten per expert.

While masks are learned the deltas are zero and the model is the base. If expert e moved its neuron f along that neuron's
steepest descent by a step of length 1, the loss would fall by ``gain_ef``: the norm of the gradient of the loss by the
neuron's weights (its rows in the D -> F matrices and its column in the other), over the expert's tokens and weighted with its
gates. That is minus the loss's gradient by the mask's entry, and it is what the selector (Gumbel top-k, straight-through) is
trained with, step after step, while its temperature falls. Squared norms of micro-batches (and processes) are added up.
Nothing of size E x F x D is ever kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from srde.core import LearnedSparseSelector
from srde.train.schedules import LinearSchedule
from srde.tuner.calibrate import Taps, sum_over_processes
from srde.tuner.layer import SrdeLayer, switched_off

STEP_SIZE = 60.0
"""How far the logits move over a whole phase of unit gradients; with it the choice has settled at the end (measured)."""
LAST_TEMPERATURE = 0.1


class MaskLearner:
    """Learns the masks of one adapter, all layers side by side.

    Args:
        model: A `PeftModel` whose deltas are zero.
        adapter: The adapter.
        start: The first step of the phase.
        end: The step after its last.
        seed: Of the noise; the same step has the same noise in every process.

    Attributes:
        selectors: Layer name -> its selector, logits [E, F].
    """

    def __init__(
        self, model: nn.Module, *, start: int, end: int, seed: int = 0, adapter: str = "default"
    ) -> None:
        self.model, self.adapter, self.seed = model, adapter, seed
        self.start, self.end = start, end
        self.temperature = LinearSchedule(1.0, LAST_TEMPERATURE, start, end)
        self.layers: list[SrdeLayer] = [
            layer for layer in model.srde.layers.values() if adapter in layer.srde_experts
        ]
        self.selectors: dict[str, LearnedSparseSelector] = {}
        for layer in self.layers:
            delta = layer.srde_experts[adapter]
            self.selectors[layer.name] = LearnedSparseSelector(
                delta.positions,
                delta.index.shape[1],
                num_experts=delta.num_experts,
                device=delta.index.device,
            )
        self.gains: dict[str, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Runs the model as its base; backward passes inside add to the gains."""
        ears = [_Ear(layer, self) for layer in self.layers]
        try:
            with switched_off(self.layers):
                yield
        finally:
            for ear in ears:
                ear.remove()

    def update(self, step: int) -> None:
        """One step of all selectors along what was heard since the last. Processes add up what they have heard."""
        generator = torch.Generator()
        for number, (name, selector) in enumerate(self.selectors.items()):
            gain_EF = self.gains.pop(name, None)
            gain_EF = torch.zeros_like(selector.logits) if gain_EF is None else gain_EF.to(selector.logits)
            sum_over_processes(gain_EF)
            gain_EF = gain_EF.sqrt()
            gain_EF = gain_EF / gain_EF.mean(dim=1, keepdim=True).clamp(min=torch.finfo(gain_EF.dtype).tiny)
            selector.temperature = self.temperature.at(step)
            seed = ((self.seed * 1_000_003 + step) * 10_007 + number) % 2**63
            mask_EF, _ = selector(generator.manual_seed(seed))
            (grad_EF,) = torch.autograd.grad(-(mask_EF * gain_EF).sum(), selector.logits)
            with torch.no_grad():
                selector.logits -= STEP_SIZE / (self.end - self.start) * grad_EF

    def finish(self) -> None:
        """Gives the adapter the masks that were learned; no neuron goes to two experts while there are enough."""
        for layer in self.layers:
            layer.srde_experts[self.adapter].set_own_masks(self.selectors[layer.name].logits.detach())

    def importance(self) -> dict[str, Tensor]:
        """How sure the selector is of each neuron that the adapter rewrites: layer name -> [E, R], as logits around the
        border between chosen and not chosen."""
        result = {}
        for layer in self.layers:
            logits_EF = self.selectors[layer.name].logits.detach()
            index_ER = layer.srde_experts[self.adapter].index
            border = logits_EF.topk(index_ER.shape[1], dim=1).values[:, -1:]
            result[layer.name] = logits_EF.gather(1, index_ER) - border
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """The selectors' logits by layer; between two steps there is nothing else."""
        return {name: selector.logits.detach() for name, selector in self.selectors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from saved logits."""
        for name, selector in self.selectors.items():
            selector.logits.data.copy_(state[name])


class _Ear:
    """Hears how much each neuron of one MLP matters to each expert."""

    def __init__(self, layer: SrdeLayer, learner: MaskLearner) -> None:
        self.layer, self.learner = layer, learner
        self.gate_TE: Tensor | None = None
        self.handle = layer.register_forward_pre_hook(self._route)
        self.taps = Taps(layer, self._add)

    def _route(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        layer, x = self.layer, args[0]
        with torch.no_grad():
            router = layer.srde_router[self.learner.adapter]
            route = router(x.detach().reshape(-1, x.shape[-1]), layer.routing.forced_for(x))
            self.gate_TE = route.gate_TE

    def _add(self, name: str, x_TI: Tensor, grad_TO: Tensor) -> None:
        assert self.gate_TE is not None
        layout = self.layer.layout
        down = name == layout.down
        scores = []
        for gate_T in self.gate_TE.unbind(1):
            used = gate_T.nonzero().squeeze(1)
            x, grad = x_TI[used].float(), grad_TO[used].float() * gate_T[used].unsqueeze(1)
            # a neuron is an output of the first matrices and an input of the last
            scores.append(_norms(x, grad) if down else _norms(grad, x))
        score_EF = torch.stack(scores)
        if layout.fused and not down:
            score_EF = sum(score_EF.chunk(2, dim=1))
        gains = self.learner.gains
        gains[self.layer.name] = gains[self.layer.name] + score_EF if self.layer.name in gains else score_EF

    def remove(self) -> None:
        self.handle.remove()
        self.taps.remove()


def _norms(neurons_TF: Tensor, others_TD: Tensor) -> Tensor:
    """Squared norms [F] of the rows of ``neurons^T others`` [F, D]; the cheaper of two ways, by the number of tokens."""
    tokens, width = others_TD.shape
    if tokens * (width + neurons_TF.shape[1]) < width * neurons_TF.shape[1]:
        return (others_TD @ others_TD.t() @ neurons_TF).mul(neurons_TF).sum(0).clamp(min=0)
    return (neurons_TF.t() @ others_TD).square().sum(1)
