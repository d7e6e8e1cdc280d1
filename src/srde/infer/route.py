"""Which experts may speak: one, some, a fixed mixture, none, or as the routers say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from srde.errors import ConfigError, UsageError
from srde.hub.open import experts_config
from srde.tuner import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = "auto"
OFF = "off"


@contextmanager
def routed(
    model: PreTrainedModel, route: str | None = None, expert: int | str | None = None
) -> Iterator[None]:
    """Makes tokens use the experts that a text names while the context is open.

    Args:
        model: A model with an srde adapter, as PEFT gives it, or a SaRDinE model.
        route: ``auto`` or None: as the routers say. ``off``: the base. A name or a number: that expert; where several have the
            name, the routers choose among them; so they do among ``math,code``. ``math=0.7,code=0.3``: this mixture for all
            tokens.
        expert: One expert's number or name instead, be it disabled or not.

    Raises:
        ConfigError: No expert has that name or number, the text cannot be read, or both are given.
        UsageError: The model has no srde adapter.
    """
    if route is not None and expert is not None:
        raise ConfigError.of(
            "route and expert", (route, expert), rule="they exclude each other", fix="give one of them"
        )
    if expert is None and route in (None, AUTO):
        yield
        return
    routing = getattr(model, "srde", None)
    if not isinstance(routing, Routing):
        raise UsageError.of(
            "route", route if expert is None else expert, rule="the model has no srde adapter to route",
            fix="load one, or leave the route out",
        )  # fmt: skip
    with _context(model, routing, route, expert):
        yield


def _context(model: Any, routing: Routing, route: str | None, expert: int | str | None) -> Any:
    if route == OFF:
        return model.disable_adapter()
    config = experts_config(model)
    if "=" in str(route):
        return routing.force_mixture(config.mixture(str(route)))
    wanted = [expert] if expert is not None else [name.strip() for name in str(route).split(",")]
    named = sorted({e for name in wanted for e in config.experts_named(name)})
    if len(named) == 1 and expert is not None:
        return routing.force_experts(named[0])
    if not set(named) - {*(config.disabled_experts or ())}:
        raise ConfigError.of(
            "route", route or expert, rule="all of its experts are disabled",
            fix="run `srde experts disable --undo`, or name one with --expert",
        )  # fmt: skip
    return routing.force_experts(named[0]) if len(named) == 1 else routing.restrict_experts(named)


def expert_labels(model: Any) -> list[str]:
    """What to call each routed expert: its number, and its name if it has one."""
    config = experts_config(model)
    names = config.expert_names
    return [f"{e} {names[e]}" if names else str(e) for e in range(config.num_experts)]
