"""Runs a model that has no weights: every tensor has its shape, dtype and device, and no numbers.

The tensors are PyTorch's fake tensors for the CPU. Transformers' forward, PEFT's and srde's layers, autograd, activation
checkpointing and the choice of the attention kernel run as they always do, for every architecture; what an operation
would compute is left out. Only what depends on values needs a stand-in: how many tokens each expert gets (an even
split; sums over experts do not depend on it), and the sparse product of single-entry deltas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from srde.core import Groups, Route, Router, element
from srde.plan.adapters import srde_layers


@contextmanager
def shadow_of(model: nn.Module) -> Iterator[None]:
    """Gives a meta model fake tensors for its run; the model stays a shadow afterwards.

    Args:
        model: A base on the meta device, with or without an adapter.
    """
    layers = srde_layers(model)
    for layer in layers:
        layer.layout = replace(layer.layout, tried=True)  # there are no numbers to try it on
        layer.srde_router["default"].register_forward_hook(_split_evenly)
    sparse_matrix = element._csr
    element._csr = _shape_of_csr
    try:
        with FakeTensorMode():
            _fill(model)
            yield
    finally:
        element._csr = sparse_matrix


def _fill(model: nn.Module) -> None:
    fakes: dict[Tensor, Tensor] = {}  # a tied weight stays one tensor
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in fakes:
                fakes[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            setattr(module, name, fakes[p])
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, fakes.setdefault(b, torch.empty(b.shape, dtype=b.dtype)))


def _split_evenly(router: Router, _args: Any, route: Route) -> None:
    """Forward hook: the groups of the grouped path, as many tokens for each routed expert."""
    pairs, experts = route.slot_TK.numel(), router.num_experts
    ends = [pairs * (e + 1) // experts for e in range(experts)]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    counts += [len(route.slot_TK)] * router.num_shared
    expert_P, token_P = (torch.empty(sum(counts), dtype=torch.long) for _ in range(2))
    route.groups = Groups(expert_P, token_P, counts)


def _shape_of_csr(_row: Tensor, _col: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    """Stands for a sparse matrix in its products; next to its indices it takes no memory worth counting."""
    return value.new_empty(1).expand(size)
