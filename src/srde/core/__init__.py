"""The model in pure torch: deltas, masks, router, routed MLP, losses. Nothing here knows of files, Transformers or PEFT."""

from srde.core.delta import Delta, Path, count_rewritten
from srde.core.element import ElementDelta
from srde.core.layout import Found, MlpLayout, find_mlps, linear_shape, try_layout
from srde.core.losses import (
    load_balancing_loss,
    orthogonality_loss,
    router_supervision_loss,
    router_z_loss,
    sparsity_loss,
)
from srde.core.masks import deal, draft, gradient_scores, magnitude_scores, random_scores
from srde.core.neuron import NeuronDelta
from srde.core.routed import DELTAS, choose_path, contract, expand, routed_mlp
from srde.core.router import Groups, Mixture, Route, Router
from srde.core.selector import LearnedSparseSelector, relaxed_top_k

__all__ = [
    "DELTAS",
    "Delta",
    "ElementDelta",
    "Found",
    "Groups",
    "LearnedSparseSelector",
    "Mixture",
    "MlpLayout",
    "NeuronDelta",
    "Path",
    "Route",
    "Router",
    "choose_path",
    "contract",
    "count_rewritten",
    "deal",
    "draft",
    "expand",
    "find_mlps",
    "gradient_scores",
    "linear_shape",
    "load_balancing_loss",
    "magnitude_scores",
    "orthogonality_loss",
    "random_scores",
    "relaxed_top_k",
    "routed_mlp",
    "router_supervision_loss",
    "router_z_loss",
    "sparsity_loss",
    "try_layout",
]
