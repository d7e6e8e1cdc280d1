"""Runs a model that has no weights: every tensor has its shape, dtype and device, and no numbers.

The tensors are PyTorch's fake tensors for the CPU. Transformers' forward, PEFT's and srde's layers, autograd, activation
checkpointing and the choice of the attention kernel run as they always do, for every architecture; what an operation
would compute is left out. Only what depends on values needs a stand-in: how many tokens each expert gets (an even split;
sums over experts do not depend on it), whether masks overlap, whether a row is packed, and the sparse product of
single-entry deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import masking_utils

from srde.core import Delta, ElementDelta, Groups, Route, Router, element
from srde.plan.adapters import srde_layers


@contextmanager
def shadow_of(model: nn.Module, packing: bool) -> Iterator[None]:
    """Gives a meta model fake tensors for its run; the model stays a shadow afterwards.

    Args:
        model: A base on the meta device, with or without an adapter.
        packing: Whether rows without a cache hold several sequences, isolated from each other by a mask. Transformers
            looks for them in the positions, and assumes them where it finds no numbers.
    """
    layers = srde_layers(model)
    for layer in layers:
        layer.layout = replace(layer.layout, tried=True)  # there are no numbers to try it on
        _split_what_it_routes(layer.srde_router["default"])
        delta = layer.srde_experts["default"]
        delta.disjoint = partial(bool, _go_round(delta))
    with ExitStack() as stack:
        stack.enter_context(_replaced(element, "_csr", _shape_of_csr))
        if not packing:
            stack.enter_context(_replaced(masking_utils, "find_packed_sequence_indices", _one_sequence))
        stack.enter_context(FakeTensorMode())
        _fill(model)
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, original)


def _fill(model: nn.Module) -> None:
    fakes: dict[Tensor, Tensor] = {}  # a tied weight stays one tensor
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in fakes:
                fakes[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            setattr(module, name, fakes[p])
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, fakes.setdefault(b, torch.empty(b.shape, dtype=b.dtype)))


def _split_what_it_routes(router: Router) -> None:
    """Makes a router give its routes groups: a layer calls its router's `forward`, past any hooks."""
    plain = router.forward

    def forward(*args: Any, **kwargs: Any) -> Route:
        route = plain(*args, **kwargs)
        route.groups = _even_groups(router, route)
        return route

    router.forward = forward  # type: ignore[method-assign]


def _even_groups(router: Router, route: Route) -> Groups:
    """The groups of the grouped path, as many tokens for each routed expert."""
    pairs, experts = route.slot_TK.numel(), router.num_experts
    ends = [pairs * (e + 1) // experts for e in range(experts)]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    counts += [len(route.slot_TK)] * router.num_shared
    expert_P, token_P = (torch.empty(sum(counts), dtype=torch.long) for _ in range(2))
    return Groups(expert_P, token_P, counts)


def _go_round(delta: Delta) -> bool:
    """Whether there are enough neurons, or entries, to give every expert its own: then `deal` gives none out twice."""
    places = delta.intermediate_size * (delta.hidden_size if isinstance(delta, ElementDelta) else 1)
    return delta.index.shape[-2] * delta.index.shape[-1] <= places


def _shape_of_csr(_row: Tensor, _col: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    """Stands for a sparse matrix in its products; next to its indices it takes no memory worth counting."""
    return value.new_empty(1).expand(size)


def _one_sequence(_position_ids: Tensor) -> None:
    """Stands for the search for packed sequences: there are none, and so no mask is needed."""
