"""Held-out loss per domain, and what the routers do with each domain.

Letters: L layers, E experts (routed, then shared), N held-out examples, C domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srde.data.tokenize import IGNORE
from srde.train.memory import LOWER_HELD_OUT, means_out_of_memory, out_of_memory
from srde.tuner import Routing, RoutingRecord

PERMUTATIONS = 999


@dataclass(frozen=True)
class Measurement:
    """A model on held-out rows.

    Attributes:
        loss: Mean cross-entropy per trained token, in nats.
        domains: Domain number -> (mean loss, trained tokens); -1 for rows without a domain.
        gate_NLE: Mean gate of each expert in each layer over each example's tokens; None without experts.
        domain_N: The domain of each example.
    """

    loss: float
    domains: dict[int, tuple[float, int]]
    gate_NLE: np.ndarray | None
    domain_N: np.ndarray


def measure(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    gather: Callable[[list[Any]], list[Any]] = lambda items: items,
    check: Callable[[], None] = lambda: None,
) -> Measurement:
    """Runs held-out batches through a model.

    Args:
        model: A causal language model, with or without an srde adapter; in whatever mode it is in.
        batches: With `labels`, and with `domain_ids` where domains are known; packed or padded.
        gather: Joins lists of all processes.
        check: Called before every batch; may raise to end the measurement.
    """
    sums: dict[int, list[float]] = {}
    gates: list[tuple[int, np.ndarray]] = []
    routing = getattr(model, "srde", None)
    for original in batches:
        check()
        batch = dict(original)
        labels = batch.pop("labels")
        domain_ids = batch.pop("domain_ids", None)
        batch.pop("row_ids", None)
        if domain_ids is None:
            domain_ids = torch.full_like(labels, -1)
        try:
            loss_BS, record = _forward(model, routing, batch, labels)
        except (RuntimeError, MemoryError) as error:
            if means_out_of_memory(error):
                raise out_of_memory(original, error, LOWER_HELD_OUT) from error
            raise
        trained = labels[:, 1:] != IGNORE
        for domain in domain_ids[:, 1:][trained].unique().tolist():
            mine = trained & (domain_ids[:, 1:] == domain)
            total = sums.setdefault(domain, [0.0, 0])
            total[0] += float(loss_BS[mine].double().sum())
            total[1] += int(mine.sum())
        if record is not None and record.calls and record.calls[0].routes:
            gates += _by_example(record.calls[0].routes.values(), batch, domain_ids)
    merged: dict[int, list[float]] = {}
    for domain, (loss, count) in gather(list(sums.items())):
        total = merged.setdefault(domain, [0.0, 0])
        total[0], total[1] = total[0] + loss, total[1] + count
    gates = gather(gates)
    tokens = sum(count for _, count in merged.values())
    return Measurement(
        loss=sum(loss for loss, _ in merged.values()) / max(tokens, 1),
        domains={d: (loss / max(n, 1), int(n)) for d, (loss, n) in sorted(merged.items())},
        gate_NLE=np.stack([gate for _, gate in gates]) if gates else None,
        domain_N=np.array([domain for domain, _ in gates], dtype=np.int64),
    )


@torch.no_grad()
def _forward(
    model: nn.Module, routing: Any, batch: dict[str, Any], labels: Tensor
) -> tuple[Tensor, RoutingRecord | None]:
    """The loss of each token but the first of a row, and what the routers decided."""
    if isinstance(routing, Routing):
        with routing.record() as record:
            logits = model(**batch).logits
    else:
        record, logits = None, model(**batch).logits
    targets = labels[:, 1:]
    loss_BS = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return loss_BS.view(targets.shape), record


def _by_example(
    routes: Iterable[Any], batch: dict[str, Any], domain_ids: Tensor
) -> list[tuple[int, np.ndarray]]:
    """Domain and mean gates [L, E] of each example of a batch."""
    gate_LTE = torch.stack([route.gate_TE for route in routes]).float()
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    example_T = example_numbers(batch["input_ids"], positions).flatten()
    keep_T = torch.ones_like(example_T, dtype=torch.bool) if mask is None else mask.flatten().bool()
    count = int(example_T.max()) + 1
    weight_NT = F.one_hot(example_T, count).t().float() * keep_T
    weight_NT = weight_NT / weight_NT.sum(1, keepdim=True).clamp(min=1)
    mean_NLE = torch.einsum("nt,lte->nle", weight_NT, gate_LTE).cpu().numpy()
    first = [int((example_T == n).nonzero()[0]) for n in range(count)]
    domains = domain_ids.flatten()[first].tolist()
    return list(zip(domains, mean_NLE, strict=True))


def example_numbers(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    """Which example each token belongs to, counted from 0 over the batch, shaped like `input_ids`: packed examples begin
    where positions restart; others are rows."""
    if position_ids is None or len(input_ids) > 1:
        return torch.arange(len(input_ids), device=input_ids.device).unsqueeze(1).expand_as(input_ids)
    return (position_ids == 0).cumsum(1).clamp(min=1) - 1


@dataclass(frozen=True)
class Specialisation:
    """How far experts differ by domain.

    Attributes:
        information_L: Mutual information between domain and expert in each layer, in bits.
        mean: Its mean over layers.
        chance: What permuted domains give on average.
        p_value: Share of permutations (and the observation itself) that reach the observed mean.
        permutations: How many there were.
    """

    information_L: list[float]
    mean: float
    chance: float
    p_value: float
    permutations: int


def specialisation(
    gate_NLE: np.ndarray,
    domain_N: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> Specialisation | None:
    """Mutual information between domain and expert, with a permutation test over examples.

    An example's tokens are not independent, so domains are permuted among examples and not among tokens. Each domain weighs the
    same: the information is that of a domain drawn evenly, one of its examples, one of its tokens and that token's expert.

    Args:
        gate_NLE: Mean gates of the routed experts per example and layer.
        domain_N: The examples' domains; examples with -1 are left out.
        seed: Of the permutations.
        permutations: How many.

    Returns:
        None where fewer than two domains have examples.
    """
    domain_N = np.asarray(domain_N)
    gate_NLE, domain_N = gate_NLE[domain_N >= 0], domain_N[domain_N >= 0]
    names = np.unique(domain_N)
    if len(names) < 2:
        return None
    flat = gate_NLE.reshape(len(gate_NLE), -1).astype(np.float64)
    rng = np.random.default_rng(seed)
    one_hot_NC = (domain_N[:, None] == names[None, :]).astype(np.float64)

    def information(order: np.ndarray) -> np.ndarray:
        share_CN = (one_hot_NC[order] / one_hot_NC.sum(0)).T
        joint_CLE = (share_CN @ flat).reshape(len(names), *gate_NLE.shape[1:]) / len(names)
        total_L = joint_CLE.sum((0, 2))
        joint_CLE = joint_CLE / np.maximum(total_L, 1e-12)[None, :, None]
        independent = joint_CLE.sum(0, keepdims=True) * joint_CLE.sum(2, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(joint_CLE > 0, joint_CLE * np.log2(joint_CLE / independent), 0.0)
        return np.asarray(terms.sum((0, 2)))

    found_L = information(np.arange(len(domain_N)))
    by_chance = np.array([information(rng.permutation(len(domain_N))).mean() for _ in range(permutations)])
    reached = int((by_chance >= found_L.mean() - 1e-15).sum())
    return Specialisation(
        information_L=[float(v) for v in found_L],
        mean=float(found_L.mean()),
        chance=float(by_chance.mean()),
        p_value=(1 + reached) / (1 + permutations),
        permutations=permutations,
    )
