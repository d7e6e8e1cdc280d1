"""The life of an expert in a saved adapter: looked at, added, frozen, switched off, replaced, compared.

All of it works on adapter folders: read whole and verified, changed as tensors, written whole or not at all. No model is needed,
but to choose the masks of a new expert.
"""

from srde.tuner.experts.change import (
    add_expert,
    freeze_experts,
    grown_config,
    name_experts,
    one_expert,
    replace_expert,
    switch_experts,
)
from srde.tuner.experts.compare import Difference, compare_adapters
from srde.tuner.experts.describe import describe_expert, describe_experts
from srde.tuner.experts.folder import Adapter, LayerTensors, read_adapter, write_adapter
from srde.tuner.experts.masks import choose_masks

__all__ = [
    "Adapter",
    "Difference",
    "LayerTensors",
    "add_expert",
    "choose_masks",
    "compare_adapters",
    "describe_expert",
    "describe_experts",
    "freeze_experts",
    "grown_config",
    "name_experts",
    "one_expert",
    "read_adapter",
    "replace_expert",
    "switch_experts",
    "write_adapter",
]
