"""Muon for what is a matrix by meaning, AdamW for the rest, as one optimizer.

Letters: M matrices of an MLP, E experts, R neurons rewritten per expert, D model width.

An adapter's values [M, E, R, D] are M x E matrices: the rows that one expert rewrites in one matrix. Muon orthogonalises the
update of each on its own (`torch.optim.Muon`, which takes matrices only); the router [E, D] is one more. Single weight entries
and whatever else is trained are no matrices, and AdamW takes them.

An expert that had no token in a step has a gradient of zero. Muon gives every update the same size, so that a remnant of
momentum would move such an expert as far as a real gradient: it is left alone until it has tokens again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srde.core import NeuronDelta, Router


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW side by side: one list of groups, one state, one step.

    Args:
        matrices: Parameters whose last two axes are a matrix; leading axes count matrices.
        rest: Parameters for AdamW.
        lr: The learning rate of both; Muon's updates are scaled to the size of AdamW's (`match_rms_adamw`; Liu et al., 2025,
            "Muon is Scalable for LLM Training"), so that one rate suits both.
        momentum: Muon's.
        weight_decay: Of both, decoupled.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        rest: Sequence[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        groups = [
            {"params": list(matrices), "kind": "muon", "momentum": momentum},
            {"params": list(rest), "kind": "adamw", "betas": betas, "eps": eps},
        ]
        super().__init__([group for group in groups if group["params"]], shared)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["kind"] == "muon" else self._adamw)(parameters, group)
        return loss

    def _muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        views: list[nn.Parameter] = []
        buffers: list[Tensor] = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            matrices, grads, momenta = map(
                _matrices, (parameter.data, parameter.grad, state["momentum_buffer"])
            )
            moved = grads.flatten(1).any(dim=1).tolist()
            for matrix, grad, momentum, has_gradient in zip(matrices, grads, momenta, moved, strict=True):
                if has_gradient:
                    view = nn.Parameter(matrix)  # shares the parameter's memory
                    view.grad = grad
                    views.append(view)
                    buffers.append(momentum)
        if not views:
            return
        muon = torch.optim.Muon(
            views, lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"], adjust_lr_fn="match_rms_adamw"
        )  # fmt: skip
        for view, momentum in zip(views, buffers, strict=True):
            muon.state[view]["momentum_buffer"] = momentum
        muon.step()

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        adamw = torch.optim.AdamW(parameters, **options)
        adamw.state = self.state
        adamw.step()


def _matrices(tensor: Tensor | None) -> Tensor:
    """[..., A, B] as a list of matrices [N, A, B]; a view."""
    assert tensor is not None
    return tensor.view(-1, *tensor.shape[-2:])


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters of a model with an srde adapter: matrices by meaning, and the rest."""
    matrices: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, NeuronDelta):
            matrices.append(module.values)
        elif isinstance(module, Router):
            matrices.append(module.weight)
    matrices = [parameter for parameter in matrices if parameter.requires_grad]
    known = {id(parameter) for parameter in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return matrices, rest
