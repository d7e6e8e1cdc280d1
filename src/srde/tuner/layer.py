"""The module that takes an MLP's place: the frozen base and the adapters' routers and deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from srde.core import (
    DELTAS,
    Delta,
    MlpLayout,
    Route,
    Router,
    contract,
    expand,
    magnitude_scores,
    random_scores,
    routed_mlp,
    try_layout,
)
from srde.errors import UnsupportedModelError, UsageError
from srde.tuner.config import SrdeConfig
from srde.tuner.control import Routing
from srde.tuner.weights import dense_weights, fold

Experts = list[tuple[Delta, Route]]


class _Wrapper(nn.Module, BaseTunerLayer):
    """Stands in the place of `base_layer`: what it does not have itself is looked up there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class SrdeLayer(_Wrapper):
    """An MLP block with experts.

    Tensors are named ``srde_experts.<adapter>.values``, ``srde_experts.<adapter>.index`` and
    ``srde_router.<adapter>.weight``: exactly one level below the adapter's name, as PEFT and Transformers expect.
    """

    adapter_layer_names = ("srde_experts", "srde_router")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str, layout: MlpLayout, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.srde_experts = nn.ModuleDict()
        self.srde_router = nn.ModuleDict()
        self.name = name
        self.layout = layout
        self.routing = routing
        self._unset: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters = []

    def add_adapter(self, adapter: str, config: SrdeConfig) -> None:
        """Builds the adapter's router and zero deltas, and chooses the masks unless they come from a file."""
        device = next((p.device for p in self.base_layer.parameters()), None)
        self.srde_router[adapter] = Router(
            self.layout.hidden_size,
            config.num_experts,
            config.top_k,
            null_expert=config.null_expert,
            num_shared=config.num_shared_experts,
            temperature=config.router_temperature,
            device=device,
        )
        self.srde_router[adapter].locked = tuple(sorted(set(config.disabled_experts or ())))
        self.srde_router[adapter].frozen = tuple(sorted(set(config.frozen_experts or ())))
        delta = DELTAS[config.granularity](
            self.layout.hidden_size,
            self.layout.intermediate_size,
            self.layout.num_matrices,
            config.experts_in_all,
            config.current_sparsity,
            device,
        )
        self.srde_experts[adapter] = delta
        self._unset.pop(adapter, None)
        if delta.index.is_meta:
            return
        if not config.init_weights:  # whatever the file does not fill is found before it is used
            delta.index.fill_(-1)
            for parameter in (delta.values, self.srde_router[adapter].weight):
                if not parameter.is_meta:
                    nn.init.constant_(parameter, float("nan"))
            self._unset[adapter] = "loaded"
        elif config.mask_init == "gradient":
            delta.index.fill_(-1)
            self._unset[adapter] = "calibrated"
        elif config.mask_init == "random":
            seed = config.mask_seed + 1_000_003 * list(self.routing.sites).index(self.name)
            delta.set_masks(random_scores(self._weights_like(), torch.Generator().manual_seed(seed)))
        else:
            delta.set_masks(magnitude_scores(dense_weights(self.owner(), self.layout)))

    def owner(self) -> nn.Module:
        """The module whose attributes the layout names."""
        return self.base_layer

    def _weights_like(self) -> list[Tensor]:
        up, down = (
            (self.layout.intermediate_size, self.layout.hidden_size),
            (self.layout.hidden_size, self.layout.intermediate_size),
        )
        return [torch.empty(s, device="meta") for s in (*[up] * (self.layout.num_matrices - 1), down)]

    def active_routers(self) -> list[Router]:
        """Routers of the active adapters that this layer has."""
        return [self.srde_router[a] for a in self.active_adapters if a in self.srde_router]

    def route(self, x: Tensor) -> Experts:
        """Routes the tokens of `x` [..., D] for every active adapter."""
        experts: Experts = []
        routers, forced = self.srde_router, self.routing.forced_for(x)
        for adapter in self.active_adapters:
            if adapter in routers:
                if adapter in self._unset:
                    self._check_set(adapter)
                # `forward` and not a call: ZeRO-3 hooks a module's output tensors, and a route is none; so the router's weight
                # counts as this layer's own, like the delta's values
                route = routers[adapter].forward(x.reshape(-1, x.shape[-1]), forced)
                delta = self.srde_experts[adapter]
                self.routing.note(self.name, adapter, route, delta, routers[adapter])
                experts.append((delta, route))
        return experts

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        experts = [] if self._disable_adapters else self.route(x)
        if not experts:
            return self.base_layer(x, *args, **kwargs)
        if not self.layout.tried:
            self._try()
        return routed_mlp(self.base_layer, self.layout, x, experts, self.routing.path)

    def _try(self) -> None:
        if self.base_layer is None or next(self.base_layer.parameters()).is_meta:
            return  # a plan without weights: counts are right in any order of the matrices
        layout = try_layout(self.base_layer, self.layout)
        if layout is None:
            raise UnsupportedModelError.of(
                self.name, type(self.base_layer).__name__,
                rule="its forward is not act(x W) W', though its shapes are those of an MLP",
                fix="leave this module out with target_modules",
            )  # fmt: skip
        self.layout = layout

    def _check_set(self, adapter: str) -> None:
        delta, router, how = self.srde_experts[adapter], self.srde_router[adapter], self._unset[adapter]
        if (
            (delta.index < 0).any()
            or (delta.index >= delta.positions).any()
            or torch.isnan(delta.values).any()
            or torch.isnan(router.weight).any()
        ):
            rule, fix = {
                "loaded": (
                    "its tensors were to come from a file, and the file did not hold them all",
                    "load the adapter from a complete folder; for a new adapter use a new SrdeConfig",
                ),
                "calibrated": (
                    "mask_init='gradient' chooses the masks on data, and has seen none yet",
                    "call srde.calibrate_masks(model, batches) first, or use mask_init='magnitude'",
                ),
            }[how]
            raise UsageError.of(f"adapter in {self.name}", adapter, rule=rule, fix=fix)
        del self._unset[adapter]

    def fold(self, adapter: str, gate_E: Tensor, check_only: bool = False) -> None:
        """Adds ``sum_e gate_e * Delta_e`` to the base's weights, for good; or only looks whether that gives finite numbers."""
        fold(self.owner(), self.layout, self.name, self.srde_experts[adapter].dense(gate_E), check_only)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UsageError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing is ever merged in place."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        # the dtype stays out of it: values and routers are float32 whatever the base is in
        return next((p.device for p in base_layer.parameters()), None), None


@contextmanager
def switched_off(layers: Sequence[SrdeLayer]) -> Iterator[None]:
    """Makes layers compute what the base does while the context is open."""
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


class SrdeLooseUp(SrdeLayer):
    """The D -> F matrix of an MLP that has no module of its own (OPT): routes, and carries the experts."""

    def __init__(
        self, base_layer: nn.Module, name: str, layout: MlpLayout, routing: Routing, down: nn.Module
    ) -> None:
        super().__init__(base_layer, name, layout, routing)
        self.pending: Experts = []
        self.down = (down,)  # in a tuple, so that the module tree holds it once

    def owner(self) -> nn.Module:
        pair = nn.Module()
        pair.add_module(self.layout.ups[0], self.base_layer)
        pair.add_module(self.layout.down, self.down[0])
        return pair

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        a = self.base_layer(x, *args, **kwargs)
        self.pending = [] if self._disable_adapters else self.route(x)
        a_TF, x_TD = a.reshape(-1, a.shape[-1]), x.reshape(-1, x.shape[-1])
        return expand([a_TF], x_TD, self.pending, self.routing.path)[0].view(a.shape)


class SrdeLooseDown(_Wrapper):
    """The F -> D matrix that belongs to a `SrdeLooseUp`: adds the delta for the tokens just routed there."""

    def __init__(self, base_layer: nn.Module, up: SrdeLooseUp) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.up = (up,)
        self.merged_adapters = []

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        up = self.up[0]
        y = self.base_layer(h, *args, **kwargs)
        experts, up.pending = up.pending, []
        return contract(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), experts).view(y.shape)

    def unmerge(self) -> None:
        """Nothing is ever merged in place."""


MERGE_REFUSED = (
    "merge: srde experts are chosen per token, so there is no one weight that equals the adapter. "
    "Fold one expert with merge_and_unload(expert=i), a fixed mixture with merge_and_unload(weights=[...]), "
    "or keep the adapter and get the base back with unload()."
)
