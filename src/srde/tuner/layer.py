"""The module that takes an MLP's place under PEFT: the frozen base and the adapters' routers and deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from srde.core import MlpLayout, magnitude_scores, random_scores
from srde.errors import UsageError
from srde.tuner.config import SrdeConfig
from srde.tuner.control import Routing
from srde.tuner.routed_layer import RoutedDown, RoutedLayer, RoutedUp
from srde.tuner.weights import dense_weights, fold


class SrdeLayer(RoutedLayer, BaseTunerLayer):
    """An MLP block with the experts of PEFT adapters."""

    adapter_layer_names = ("srde_experts", "srde_router")
    other_param_names = ()
    active_adapters = BaseTunerLayer.active_adapters

    def __init__(self, base_layer: nn.Module, name: str, layout: MlpLayout, routing: Routing) -> None:
        super().__init__(base_layer, name, layout, routing)
        self.merged_adapters = []

    def add_adapter(self, adapter: str, config: SrdeConfig) -> None:
        """Builds the adapter's router and zero deltas, and chooses the masks unless they come from a file."""
        delta = self.put_experts(
            adapter,
            num_experts=config.num_experts,
            top_k=config.top_k,
            sparsity=config.current_sparsity,
            granularity=config.granularity,
            null_expert=config.null_expert,
            num_shared=config.num_shared_experts,
            temperature=config.router_temperature,
            disabled=config.disabled_experts,
            frozen=config.frozen_experts,
        )
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

    def _weights_like(self) -> list[Tensor]:
        up, down = (
            (self.layout.intermediate_size, self.layout.hidden_size),
            (self.layout.hidden_size, self.layout.intermediate_size),
        )
        return [torch.empty(s, device="meta") for s in (*[up] * (self.layout.num_matrices - 1), down)]

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


class SrdeLooseUp(RoutedUp, SrdeLayer):
    """The D -> F matrix of an MLP that has no module of its own (OPT), under PEFT."""

    def __init__(
        self, base_layer: nn.Module, name: str, layout: MlpLayout, routing: Routing, down: nn.Module
    ) -> None:
        RoutedUp.__init__(self, base_layer, name, layout, routing, down)


class SrdeLooseDown(RoutedDown, BaseTunerLayer):
    """The F -> D matrix that belongs to a `SrdeLooseUp`."""

    def __init__(self, base_layer: nn.Module, up: SrdeLooseUp) -> None:
        super().__init__(base_layer, up)
        self.merged_adapters = []

    def unmerge(self) -> None:
        """Nothing is ever merged in place."""


MERGE_REFUSED = (
    "merge: srde experts are chosen per token, so there is no one weight that equals the adapter. "
    "Fold one expert with merge_and_unload(expert=i), a fixed mixture with merge_and_unload(weights=[...]), "
    "or keep the adapter and get the base back with unload()."
)
