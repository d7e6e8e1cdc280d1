"""What one can ask of, and tell, the routers of a model: `model.srde`.

Letters: B sequences, S positions, T tokens (B * S), E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from srde.core.delta import Delta, Path
from srde.core.layout import MlpLayout
from srde.core.router import Mixture, Route, Router
from srde.errors import ConfigError, SrdeError, UsageError

if TYPE_CHECKING:
    from srde.tuner.routed_layer import RoutedLayer


@dataclass
class RoutedCall:
    """What the routers decided in one forward of the model.

    Attributes:
        routes: (layer name, adapter name) -> the route of its T tokens, in the model's order.
        mask_T: 1 for tokens, 0 for padding; None when the call had no two-dimensional attention mask.
        measured: The same keys -> what `Routing.measure` gave for that layer.
    """

    routes: dict[tuple[str, str], Route] = field(default_factory=dict)
    mask_T: Tensor | None = None
    measured: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)

    def kept(self, values_T: Tensor) -> Tensor:
        """The entries of the tokens that are not padding."""
        return values_T if self.mask_T is None else values_T[self.mask_T.bool()]


@dataclass
class RoutingRecord:
    """What each token chose, per layer, over all forwards made while recording (for `generate`: the prompt, then one
    call per new token)."""

    calls: list[RoutedCall] = field(default_factory=list)
    _complete: bool = field(default=True, repr=False)

    def layers(self, adapter: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer the chosen slots [T, K] (best first; -1: none) and the gates [T, E] of all tokens but padding.

        Args:
            adapter: The adapter's name; may be left out where only one was active.

        Raises:
            UsageError: Nothing was recorded, or several adapters were active and none was named.
        """
        names = {key[1] for call in self.calls for key in call.routes}
        if adapter is None and len(names) != 1:
            raise UsageError.of(
                "recorded adapters", sorted(names),
                rule="the record must hold exactly one adapter, or one must be named",
                fix="run the model inside `with model.srde.record()`, and pass adapter=... if several are active",
            )  # fmt: skip
        wanted = adapter or names.pop()
        slots: dict[str, list[Tensor]] = {}
        gates: dict[str, list[Tensor]] = {}
        for call in self.calls:
            for (layer, name), route in call.routes.items():
                if name == wanted:
                    slots.setdefault(layer, []).append(call.kept(route.slot_TK.detach()))
                    gates.setdefault(layer, []).append(call.kept(route.gate_TE.detach()))
        return {layer: (torch.cat(slots[layer]), torch.cat(gates[layer])) for layer in slots}

    def load(self, adapter: str | None = None) -> Tensor:
        """Mean gate of every expert in every layer over all tokens but padding: [layers, E]."""
        return torch.stack([gate_TE.mean(0) for _, gate_TE in self.layers(adapter).values()])

    def _add(self, layer: str, adapter: str, route: Route, mask: Tensor | None) -> None:
        if self._complete or (layer, adapter) in self.calls[-1].routes:
            tokens = len(route.slot_TK)
            self.calls.append(RoutedCall(mask_T=_last_columns(mask, tokens)))
            self._complete = False
        self.calls[-1].routes[layer, adapter] = route


def _last_columns(mask: Tensor | None, tokens: int) -> Tensor | None:
    """The mask of the tokens of this call: with a cache, the mask also covers earlier positions."""
    if mask is None or mask.ndim != 2 or tokens % len(mask):
        return None
    return mask[:, -(tokens // len(mask)) :].reshape(-1)


class Routing:
    """The routers of one model, all layers together. Reached as `model.srde` once an adapter is in place.

    Attributes:
        sites: The MLPs that can carry experts, module name -> layout; looked up once, on the bare model.
        layers: The MLPs that do, module name -> layer.
        path: Forces one of the two compute paths, "masked" or "grouped"; None lets each layer choose the cheaper.
        measure: Called with each layer's delta and router inside its forward, in training mode: the one place where their
            parameters are whole under FSDP2 and ZeRO-3. Not only while recording, because a checkpointed layer must do the
            same things again in backward.
    """

    def __init__(self, sites: dict[str, MlpLayout]) -> None:
        self.sites = sites
        self.layers: dict[str, RoutedLayer] = {}
        self.path: Path | None = None
        self.measure: Callable[[Delta, Router], dict[str, Tensor]] | None = None
        self.hooks: list[RemovableHandle] = []
        self._forced: Tensor | int | Mixture | None = None
        self._mask: Tensor | None = None
        self._outermost: nn.Module | None = None
        self._records: list[RoutingRecord] = []

    def watch(self, model: nn.Module) -> None:
        """Hooks the model, so that routes are known by forward and by padding; `hooks` holds the handles."""
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        for module in {model, decoder}:
            self.hooks.append(module.register_forward_pre_hook(self.begin, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self.end, always_call=True))
        if (head := output_head(model)) is not None:
            self.hooks.append(head.register_forward_pre_hook(_make_contiguous))

    @contextmanager
    def record(self) -> Iterator[RoutingRecord]:
        """Records what each token chooses while the context is open.

        Routes keep their gradient, so that losses can be built on them; what runs during backward (gradient
        checkpointing) is outside and not recorded twice.
        """
        record = RoutingRecord()
        self._records.append(record)
        try:
            yield record
        finally:
            self._records.remove(record)

    @contextmanager
    def force_experts(self, experts: int | Sequence[int] | Tensor) -> Iterator[None]:
        """Makes tokens use one given expert, with gate 1, instead of what the routers say. Shared experts stay on.

        Args:
            experts: One expert for all tokens; or one per sequence [B]; or one per token [B, S]. -1 means "as routed".

        Raises:
            ConfigError: An expert does not exist in an active adapter.
            UsageError: (in the forward) The numbers of experts and tokens do not fit.
        """
        forced = experts if isinstance(experts, int) else torch.as_tensor(experts, dtype=torch.long)
        forced = int(forced) if isinstance(forced, Tensor) and forced.ndim == 0 else forced
        if isinstance(forced, Tensor) and forced.numel() == 0:
            raise UsageError.of("forced experts", [], rule="there must be at least one", fix="name an expert")
        lowest, highest = (
            (forced, forced) if isinstance(forced, int) else (int(forced.min()), int(forced.max()))
        )
        count = min(
            (r.num_experts for layer in self.layers.values() for r in layer.active_routers()), default=0
        )
        if not -1 <= lowest <= highest < count:
            raise ConfigError.of(
                "forced expert", highest if highest >= count else lowest,
                rule=f"routed experts are numbered 0 to {count - 1}, and -1 means as routed",
                fix="name an expert that the active adapter has",
            )  # fmt: skip
        before, self._forced = self._forced, None if isinstance(forced, int) and forced < 0 else forced
        try:
            yield
        finally:
            self._forced = before

    @contextmanager
    def force_mixture(self, weights: Sequence[float]) -> Iterator[None]:
        """Makes all tokens use one fixed mixture of the routed experts. Shared experts stay on.

        Args:
            weights: A gate for each routed expert; 0 leaves it out.

        Raises:
            ConfigError: (in the forward) The number of weights is not the number of experts.
        """
        before, self._forced = self._forced, Mixture(tuple(float(weight) for weight in weights))
        try:
            yield
        finally:
            self._forced = before

    @contextmanager
    def restrict_experts(self, experts: Iterable[int]) -> Iterator[None]:
        """Lets the routers of the active adapters choose among these experts only; what is locked already stays so.

        Raises:
            ConfigError: An expert does not exist, or none is left to choose.
        """
        allowed = set(experts)
        routers = [router for layer in self.layers.values() for router in layer.active_routers()]
        before = [router.locked for router in routers]
        try:
            for router, locked in zip(routers, before, strict=True):
                if unknown := allowed - set(range(router.num_experts)):
                    raise ConfigError.of(
                        "experts", sorted(unknown), rule=f"routed experts are numbered 0 to {router.num_experts - 1}",
                        fix="name experts that the active adapter has",
                    )  # fmt: skip
                router.lock({*locked, *(set(range(router.num_experts)) - allowed)})
            yield
        finally:
            for router, locked in zip(routers, before, strict=True):
                router.locked = locked

    def lock(self, experts: Iterable[int], adapter: str = "default") -> None:
        """Locks exactly these experts of an adapter, in every layer: never chosen, gradient exactly zero.

        An optimizer with momentum or weight decay moves weights without a gradient too: see `hold_locked`.
        """
        experts = list(experts)
        routers = [
            layer.srde_router[adapter] for layer in self.layers.values() if adapter in layer.srde_router
        ]
        if not routers:
            raise no_adapter(self.layers.values(), adapter)
        for router in routers:
            router.lock(experts)

    def hold_locked(self, optimizer: torch.optim.Optimizer) -> Any:
        """Makes an optimizer leave locked and frozen experts bit-identical, and their rows of the router: what it changed
        of them is put back after each step.

        Returns:
            The hook's handle; `handle.remove()` ends it.
        """

        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper has no hooks
        first = optimizer.register_step_pre_hook(self._note_locked)
        second = optimizer.register_step_post_hook(self._restore_locked)
        return _Both(first, second)

    def _note_locked(self, *_: Any) -> None:
        """Optimizer pre-hook: copies what is held."""
        self._held = [
            (parameter, where, parameter.data[where].clone())
            for layer in self.layers.values()
            for name, router in layer.srde_router.items()
            if (locked := sorted({*router.locked, *router.frozen}))
            for parameter, where in (
                (layer.srde_experts[name].values, (slice(None), locked)),
                (router.weight, (locked,)),
            )
        ]

    def _restore_locked(self, *_: Any) -> None:
        """Optimizer post-hook: puts it back."""
        for parameter, where, data in self._held:
            parameter.data[where] = data

    def forced_for(self, x: Tensor) -> Tensor | int | Mixture | None:
        """The forced experts of the tokens in `x` [..., D]: whatever was given, spread over the tokens."""
        forced = self._forced
        if not isinstance(forced, Tensor):
            return forced
        tokens = x.numel() // x.shape[-1]
        if forced.ndim == 1 and len(forced) != tokens and len(forced) and tokens % len(forced) == 0:
            forced = forced.repeat_interleave(tokens // len(forced))
        return forced.reshape(-1).to(x.device)

    @property
    def is_steered(self) -> bool:
        """Whether tokens are told their experts, or layers their way of computing."""
        return self._forced is not None or self.path is not None

    @property
    def listens(self) -> bool:
        """Whether somebody records what is routed."""
        return bool(self._records)

    def note(self, layer: str, adapter: str, route: Route, delta: Delta, router: Router) -> None:
        """Called by each layer with each route, and whose it is."""
        measured = self.measure(delta, router) if self.measure is not None and delta.training else {}
        for record in self._records:
            record._add(layer, adapter, route, self._mask)
            record.calls[-1].measured[layer, adapter] = measured

    def begin(self, module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model and of its decoder, which trainers also call alone: remembers which
        positions are padding. A decoder may get the mask from its model in another form; then the model's holds.
        """
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._mask = mask
        self._outermost = self._outermost or module

    def end(self, module: nn.Module, _args: Any, _out: Any) -> None:
        """Forward hook of the same modules: forgets the mask, and the next route begins a new call of each record."""
        if self._outermost is module:
            self._outermost = self._mask = None
            for record in self._records:
                record._complete = True


def no_adapter(layers: Iterable[RoutedLayer], adapter: str) -> SrdeError:
    """The error for an adapter's name that no layer has."""
    names = sorted({name for layer in layers for name in layer.srde_experts})
    return UsageError.of(
        "adapter", adapter, rule=f"the model has no such srde adapter; it has {', '.join(names) or 'none'}",
        fix="name one that it has",
    )  # fmt: skip


@dataclass
class _Both:
    first: Any
    second: Any

    def remove(self) -> None:
        self.first.remove()
        self.second.remove()


def output_head(model: nn.Module) -> nn.Module | None:
    """The LM head, if the model has one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _make_contiguous(_head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Pre-hook of the LM head. The last position of [B, S, D] is a slice with gaps; for such an input PyTorch multiplies
    a *frozen* weight batch-wise, after copying all of it (56 MB a call on a 135M model): `at::native::should_fold`.
    `contiguous()` would not do: with one position it finds nothing to copy, and the gap stays in the stride."""
    x = args[0]
    if x.ndim == 3 and x.stride(0) != x.shape[1] * x.stride(1):
        return x.clone(memory_format=torch.contiguous_format), *args[1:]
    return args
