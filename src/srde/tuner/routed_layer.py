"""An MLP of a model with routed experts in it, whoever put them there: PEFT (`srde.tuner.layer`) or a model of its own
(`srde.hub`). Knows torch and the core only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from srde.core.delta import Delta
from srde.core.layout import MlpLayout, try_layout
from srde.core.lone import LoneToken, lone_route, lone_token
from srde.core.routed import DELTAS, contract, expand, routed_mlp
from srde.core.router import Route, Router
from srde.errors import UnsupportedModelError, UsageError
from srde.tuner.control import Routing

Experts = list[tuple[Delta, Route]]
_NOTHING: AbstractContextManager[None] = nullcontext()


class StandsFor(nn.Module):
    """Stands in the place of `base_layer`: what it does not have itself is looked up there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class RoutedLayer(StandsFor):
    """An MLP block with experts.

    Tensors are named ``srde_experts.<adapter>.values``, ``srde_experts.<adapter>.index`` and
    ``srde_router.<adapter>.weight``: exactly one level below the adapter's name, as PEFT and Transformers expect.

    Attributes:
        active_adapters: The adapters that act, in order; a subclass says which.
    """

    active_adapters: Sequence[str]

    def __init__(self, base_layer: nn.Module, name: str, layout: MlpLayout, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.srde_experts = nn.ModuleDict()
        self.srde_router = nn.ModuleDict()
        self.name = name
        self.layout = layout
        self.routing = routing
        self._unset: dict[str, str] = {}
        self._lone: LoneToken | None = None
        self._disable_adapters = False

    def put_experts(
        self,
        adapter: str,
        *,
        num_experts: int,
        top_k: int,
        sparsity: float,
        granularity: str = "neuron",
        null_expert: bool = False,
        num_shared: int = 0,
        temperature: float = 1.0,
        disabled: Sequence[int] | None = None,
        frozen: Sequence[int] | None = None,
    ) -> Delta:
        """Gives an adapter its router and zero deltas, still without masks.

        Returns:
            The deltas.
        """
        device = _runs_on(self.base_layer)
        router = Router(
            self.layout.hidden_size,
            num_experts,
            top_k,
            null_expert=null_expert,
            num_shared=num_shared,
            temperature=temperature,
            device=device,
        )
        router.locked, router.frozen = tuple(sorted({*(disabled or ())})), tuple(sorted({*(frozen or ())}))
        delta = DELTAS[granularity](
            self.layout.hidden_size,
            self.layout.intermediate_size,
            self.layout.num_matrices,
            num_experts + num_shared,
            sparsity,
            device,
        )
        self.srde_router[adapter], self.srde_experts[adapter] = router, delta
        self._unset.pop(adapter, None)
        return delta

    def owner(self) -> nn.Module:
        """The module whose attributes the layout names."""
        return self.base_layer

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
        if self._disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if x.numel() == self.layout.hidden_size and (y := self._alone(x)) is not None:
            return y
        with self.in_memory():
            experts = self.route(x)
            if not experts:
                return self.base_layer(x, *args, **kwargs)
            self.try_layout()
            return routed_mlp(self.base_layer, self.layout, x, experts, self.routing.path)

    def _alone(self, x: Tensor) -> Tensor | None:
        """The output for a single token on the short way of `srde.core.lone`; None where it is not to be gone."""
        routing = self.routing
        if (
            torch.is_grad_enabled()
            or not x.is_cpu
            or x.dtype is torch.float64
            or routing.is_steered
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or len(adapters := self.active_adapters) != 1
            or self._unset
        ):
            return None
        delta, router = (
            self.srde_experts._modules.get(adapters[0]),
            self.srde_router._modules.get(adapters[0]),
        )
        if not isinstance(delta, Delta) or not isinstance(router, Router) or router.locked:
            return None
        lone = self._lone
        if lone is None or not lone.fits(delta, router):
            self._lone = lone = lone_token(self.base_layer, self.layout, delta, router)
            if lone is None:
                return None
        y, slots, shares, logits_S = lone.run(x, router.temperature)
        if routing.listens:
            routing.note(self.name, adapters[0], lone_route(router, slots, shares, logits_S), delta, router)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lone": None}  # a copy has tensors of its own

    def in_memory(self) -> AbstractContextManager[None]:
        """Brings deltas and routers here while the context is open, where Accelerate has offloaded them: it does that in hooks
        of modules that are called, and these are not."""
        for router in self.srde_router._modules.values():  # not `.values()`: this is asked at every token
            if router is not None and router._parameters["weight"].is_meta:  # type: ignore[union-attr]
                parts = [*self.srde_experts.children(), *self.srde_router.children()]
                return _loaded([module for module in parts if "_hf_hook" in module.__dict__])
        return _NOTHING

    def try_layout(self) -> None:
        """Confirms the layout by a trial run, if that has not been done when the weights were not there yet.

        Raises:
            UnsupportedModelError: The module does not compute what its shapes promise.
        """
        if (
            self.layout.tried
            or self.layout.loose
            or self.base_layer is None
            or next(self.base_layer.parameters()).is_meta
        ):
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


class RoutedUp(RoutedLayer):
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
        a_TF, x_TD = a.reshape(-1, a.shape[-1]), x.reshape(-1, x.shape[-1])
        with self.in_memory():
            self.pending = [] if self._disable_adapters else self.route(x)
            return expand([a_TF], x_TD, self.pending, self.routing.path)[0].view(a.shape)


class RoutedDown(StandsFor):
    """The F -> D matrix that belongs to a `RoutedUp`: adds the delta for the tokens just routed there."""

    def __init__(self, base_layer: nn.Module, up: RoutedUp) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.up = (up,)

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        up = self.up[0]
        y = self.base_layer(h, *args, **kwargs)
        experts, up.pending = up.pending, []
        with up.in_memory():
            return contract(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), experts).view(y.shape)


@contextmanager
def _loaded(modules: Sequence[nn.Module]) -> Iterator[None]:
    for module in modules:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in modules:
            module._hf_hook.post_forward(module, None)


def _runs_on(base: nn.Module) -> torch.device | None:
    """Where a module computes: on its parameters' device, or where Accelerate brings them that are offloaded."""
    device = next((p.device for p in base.parameters()), None)
    if device is not None and device.type == "meta":
        places = (getattr(m.__dict__.get("_hf_hook"), "execution_device", None) for m in base.modules())
        device = next((torch.device(place) for place in places if place is not None), device)
    return device
