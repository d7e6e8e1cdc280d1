"""Router warm start: routers that divide the tokens sensibly before anything is trained.

Letters: L layers, N sampled tokens, D model width, E routed experts.

By clusters (k-means of the hidden states that each router sees), or by the rows' domains. Clusters have no numbers of their
own: those of each layer are numbered like the domains' experts where domains are known, and otherwise like those of the
layer before, so that expert 3 of one layer has to do with expert 3 of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from srde.errors import DataError
from srde.tuner.layer import switched_off

WarmStart = Literal["none", "kmeans", "domains"]

MOST_TOKENS = 4096
RIDGE = 0.01


def warm_start(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    how: WarmStart,
    *,
    expert_of: Any = None,
    seed: int = 0,
    adapter: str = "default",
    keep: Sequence[int] = (),
) -> None:
    """Sets the weights of an adapter's routers from hidden states of the base.

    Args:
        model: A `PeftModel` with an srde adapter.
        batches: As for training; those with `domain_ids` tell the domain of each token.
        how: "kmeans" or "domains".
        expert_of: Maps `domain_ids` to experts (-1 for none), as `Supervision.experts` does; None where domains are not known.
        seed: Of the sample of tokens, and of k-means.
        adapter: The adapter's name.
        keep: Rows of the routers that stay as they are.

    Raises:
        DataError: "domains" is asked for and no token has one, or there are fewer tokens than clusters.
    """
    layers = [layer for layer in model.srde.layers.values() if adapter in layer.srde_router]
    states, expert_N = _collect(model, layers, batches, expert_of, seed)
    if how == "domains" and (expert_N < 0).all():
        raise DataError.at(
            "training rows", None, "domain", "no row has one, and --warm_start domains needs them"
        )
    most = max(layer.srde_router[adapter].num_experts for layer in layers)
    if how == "kmeans" and len(expert_N) < most:
        raise DataError.at(
            "training rows", None, "tokens", f"{len(expert_N)} are too few for {most} clusters, one per expert; "
            "leave --warm_start out",
        )  # fmt: skip
    before: np.ndarray | None = None
    for layer in layers:
        router = layer.srde_router[adapter]
        x_ND = states[layer.name]
        if how == "domains":
            weight_ED = by_domain(x_ND, expert_N, router.num_experts, _whole(router.weight))
        else:
            weight_ED, before = by_cluster(x_ND, router.num_experts, seed, expert_N, before)
        if kept := [row for row in keep if row < len(weight_ED)]:
            weight_ED[kept] = _whole(router.weight).detach()[kept].to(weight_ED)
        _set_rows(router.weight, weight_ED)


@torch.no_grad()
def _set_rows(weight: nn.Parameter, rows_ED: Tensor) -> None:
    """Sets the first rows of a router's weight, whole or spread over processes (FSDP2)."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor):
        whole = _whole(weight).clone()
        whole[: len(rows_ED)] = rows_ED.to(whole)
        weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))
    else:
        weight[: len(rows_ED)] = rows_ED.to(weight)


def by_cluster(
    x_ND: Tensor, num_experts: int, seed: int, expert_N: Tensor, before: np.ndarray | None
) -> tuple[Tensor, np.ndarray]:
    """Router weights [E, D] that send a token to its k-means cluster, and the cluster of each token as numbered.

    Spherical k-means: hidden states of length 1, so that the nearest centre is the one with the largest product, which is
    what a router without a bias computes.

    Args:
        x_ND: Hidden states.
        num_experts: Clusters.
        seed: Of k-means.
        expert_N: The expert of each token by its domain, -1 for unknown.
        before: The numbered clusters of the same tokens in the layer before.
    """
    from sklearn.cluster import KMeans

    unit_ND = torch.nn.functional.normalize(x_ND, dim=1)
    means = KMeans(num_experts, n_init=1, random_state=seed).fit(unit_ND.numpy())
    cluster_N = means.labels_
    wanted = expert_N.numpy() if (expert_N >= 0).any() else before
    order = np.arange(num_experts) if wanted is None else _number_like(cluster_N, wanted, num_experts)
    centre_ED = torch.from_numpy(means.cluster_centers_).float()
    centre_ED = torch.nn.functional.normalize(centre_ED, dim=1)[torch.from_numpy(np.argsort(order))]
    return _scaled(centre_ED, x_ND), order[cluster_N]


def by_domain(x_ND: Tensor, expert_N: Tensor, num_experts: int, present_ED: Tensor) -> Tensor:
    """Router weights [E, D] that tell the experts' domains apart: the least-squares classifier (ridge) of one-hot targets,
    every expert weighing the same. Experts without tokens keep their weights.

    Args:
        x_ND: Hidden states.
        expert_N: The expert of each token by its domain, -1 for unknown: those are left out.
        num_experts: Routed experts.
        present_ED: The router's weights as they are.
    """
    known = expert_N >= 0
    x_ND, expert_N = x_ND[known].double(), expert_N[known]
    count_E = torch.bincount(expert_N, minlength=num_experts)
    have = count_E > 0
    target_NE = torch.nn.functional.one_hot(expert_N, num_experts).double() - have.double() / have.sum()
    weight_N1 = (1 / count_E.clamp(min=1).double())[expert_N].unsqueeze(1)
    gram_DD = x_ND.t() @ (weight_N1 * x_ND)
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean())
    weight_ED = torch.linalg.solve(gram_DD, x_ND.t() @ (weight_N1 * target_NE)).t().float()
    weight_ED = _scaled(weight_ED, x_ND.float())
    return torch.where(have.unsqueeze(1), weight_ED, present_ED.detach().cpu().float()[:num_experts])


def _whole(weight: Tensor) -> Tensor:
    """A weight that may be spread over processes, put together."""
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _scaled(weight_ED: Tensor, x_ND: Tensor) -> Tensor:
    """Without what all experts have in common (it moves no choice), and with logits of variance 1."""
    weight_ED = weight_ED - weight_ED.mean(0)
    return weight_ED / (x_ND @ weight_ED.t()).std().clamp(min=1e-6)


def _number_like(cluster_N: np.ndarray, wanted_N: np.ndarray, num_experts: int) -> np.ndarray:
    """New numbers of the clusters, so that as many tokens as possible have the wanted one (an assignment problem)."""
    from scipy.optimize import linear_sum_assignment

    known = wanted_N >= 0
    shared = np.zeros((num_experts, num_experts), dtype=np.int64)
    np.add.at(shared, (cluster_N[known], wanted_N[known]), 1)
    # of tokens of an expert, the share that a cluster has: a rare domain weighs as much as a common one
    share = shared / np.maximum(shared.sum(0, keepdims=True), 1)
    clusters, experts = linear_sum_assignment(-share)
    order = np.empty(num_experts, dtype=np.int64)
    order[clusters] = experts
    return order


def _collect(
    model: nn.Module, layers: Sequence[Any], batches: Iterable[Mapping[str, Any]], expert_of: Any, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states [N, D] before each router for a sample of tokens, float32 on the CPU, and the tokens' experts [N]."""
    batches = [dict(batch) for batch in batches]
    share = MOST_TOKENS / max(sum(batch["input_ids"].numel() for batch in batches), 1)
    generator = torch.Generator().manual_seed(seed)
    states: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    experts = []
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), switched_off(layers):
        for turn, batch in enumerate(batches):
            domain_ids = batch.pop("domain_ids", None)
            batch.pop("labels", None)
            ids = batch["input_ids"]
            mask = batch.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None or mask.ndim != 2 else mask
            chosen = (mask.flatten() > 0) & (torch.rand(ids.numel(), generator=generator) < share)
            place = chosen.nonzero().squeeze(1)
            expert = (
                expert_of(domain_ids, batch.get("position_ids"), turn).flatten()
                if domain_ids is not None and expert_of
                else torch.full((ids.numel(),), -1)
            )
            experts.append(expert[place])
            with _listening(layers, states, place):
                model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    model.train(was_training)
    return {name: torch.cat(own) for name, own in states.items()}, torch.cat(experts).long()


@contextmanager
def _listening(layers: Sequence[Any], states: Mapping[str, list[Tensor]], place: Tensor) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        states[module.name].append(x.reshape(-1, x.shape[-1])[place.to(x.device)].float().cpu())

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
