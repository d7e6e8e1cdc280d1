"""srde as a PEFT method: where PEFT and Transformers meet the core."""

import peft  # noqa: F401  # first and whole: its import registers the method, which imports the modules below

from srde.tuner.calibrate import calibrate_masks
from srde.tuner.config import SrdeConfig
from srde.tuner.control import RoutedCall, Routing, RoutingRecord
from srde.tuner.layer import SrdeLayer
from srde.tuner.model import SrdeModel
from srde.tuner.register import register_srde

__all__ = [
    "RoutedCall",
    "Routing",
    "RoutingRecord",
    "SrdeConfig",
    "SrdeLayer",
    "SrdeModel",
    "calibrate_masks",
    "register_srde",
]
