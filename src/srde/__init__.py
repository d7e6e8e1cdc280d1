"""srde: Sparse Routed Delta Experts. Turns any frozen causal language model into a set of domain experts.

    from srde import SrdeConfig
    from peft import get_peft_model

    model = get_peft_model(model, SrdeConfig())

Importing the package imports neither torch nor PEFT: names load when they are first used. Once both `srde` and `peft`
are imported, in either order, PEFT knows the method.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from srde._hook import when_imported

if TYPE_CHECKING:
    from srde.core import LearnedSparseSelector
    from srde.hub.sardine import SaRDinEConfig, SaRDinEForCausalLM
    from srde.tuner import Routing, RoutingRecord, SrdeConfig, SrdeModel, calibrate_masks

__version__ = "0.1.0"

_HOMES = {
    "LearnedSparseSelector": "srde.core",
    "SaRDinEConfig": "srde.hub.sardine",
    "SaRDinEForCausalLM": "srde.hub.sardine",
    "SrdeConfig": "srde.tuner",
    "SrdeModel": "srde.tuner",
    "Routing": "srde.tuner",
    "RoutingRecord": "srde.tuner",
    "calibrate_masks": "srde.tuner",
}

__all__ = [
    "LearnedSparseSelector",
    "Routing",
    "RoutingRecord",
    "SaRDinEConfig",
    "SaRDinEForCausalLM",
    "SrdeConfig",
    "SrdeModel",
    "__version__",
    "calibrate_masks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _register() -> None:
    importlib.import_module("srde.tuner.register").register_srde()


when_imported("peft", _register)
