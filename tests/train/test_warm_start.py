"""Warm start: routers find planted clusters, number them alike, and tell domains apart as least squares does."""

from itertools import permutations

import numpy as np
import pytest
import torch
from peft import get_peft_model

from srde import SrdeConfig
from srde.errors import DataError
from srde.train.supervision import Supervision
from srde.train.warm_start import RIDGE, by_cluster, by_domain, warm_start
from tiny import tiny

GROUPS = 4


def grouped(**settings):
    """A model in whose hidden states the tokens 16 g to 16 g + 15 lie close together."""
    base = tiny()
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(GROUPS, 1, 32, generator=generator)
    noise = torch.randn(GROUPS, 16, 32, generator=generator)
    base.model.embed_tokens.weight.data.copy_((centre + 0.5 * noise).view(64, 32))
    return get_peft_model(base, SrdeConfig(**{"num_experts": GROUPS, "top_k": 1} | settings))


def batches(count=6, domains=False, domain_of=lambda ids: ids // 16, seed=2):
    found = []
    for number in range(count):
        ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(seed + number))
        found.append({"input_ids": ids, "labels": ids})
        if domains:
            found[-1]["domain_ids"] = domain_of(ids)
    return found


def chosen(model, seed=77):
    """Groups [T] of new tokens, and each layer's first choice for them [T]."""
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), model.srde.record() as record:
        model(input_ids=ids)
    return ids.flatten() // 16, [slots[:, 0] for slots, _ in record.layers().values()]


def best_agreement(a, b):
    return max((torch.tensor(order)[a] == b).float().mean().item() for order in permutations(range(GROUPS)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clusters_in_the_hidden_states_become_experts(seed):
    model = grouped()
    before = best_agreement(chosen(model)[0], chosen(model)[1][0])
    warm_start(model, batches(), "kmeans", seed=seed)
    group, choices = chosen(model)
    for choice in choices:
        assert best_agreement(group, choice) > 0.95 > before


def test_without_domains_the_layers_number_alike():
    model = grouped()
    warm_start(model, batches(), "kmeans")
    _, (first, second) = chosen(model)
    assert (first == second).float().mean() > 0.95


@pytest.mark.parametrize("how", ["kmeans", "domains"])
def test_with_domains_experts_have_the_domains_numbers(how):
    """Domain g belongs to expert 3 - g."""
    model = grouped()
    supervision = Supervision(0, GROUPS, table=((3,), (2,), (1,), (0,)))
    warm_start(model, batches(domains=True), how, expert_of=supervision.experts)
    group, choices = chosen(model)
    for choice in choices:
        assert (choice == 3 - group).float().mean() > 0.95


def test_a_rare_domain_counts_as_much_as_a_common_one():
    """Nineteen of twenty tokens of known domain are of the first two groups."""

    def mostly(ids):
        rare = (ids >= 32) & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) > 0.05)
        return torch.where(rare, -1, ids // 16)

    for how in ("kmeans", "domains"):
        model = grouped()
        supervision = Supervision(0, GROUPS)
        known = batches(12, domains=True, domain_of=mostly)
        warm_start(model, known, how, expert_of=supervision.experts)
        group, choices = chosen(model)
        for choice in choices:
            assert (choice == group).float().mean() > 0.9


def test_clusters_are_numbered_by_shares_and_not_by_counts():
    """Cluster 0 has most of the common domain and all of the rare one; it is the rare one's, or that would have none."""
    group = torch.tensor([0] * 100 + [1] * 60)
    expert = torch.tensor([0] * 90 + [1] * 10 + [0] * 60)
    x = torch.eye(2, 5)[group] + 0.01 * torch.randn(160, 5, generator=torch.Generator().manual_seed(0))
    _, cluster = by_cluster(x, 2, 0, expert, None)
    assert cluster.tolist() == (1 - group).tolist()


def test_domain_routers_are_least_squares_of_even_experts():
    generator = torch.Generator().manual_seed(0)
    x, expert = torch.randn(300, 10, generator=generator), torch.randint(-1, 3, (300,), generator=generator)
    expert[torch.rand(300, generator=generator) < 0.5] = 0  # one has far more than the others
    x += torch.randn(4, 10, generator=generator)[expert]
    got = by_domain(x, expert, 3, torch.zeros(3, 10))
    a, y = x[expert >= 0].double().numpy(), np.eye(3)[expert[expert >= 0]] - 1 / 3
    weight = 1 / np.bincount(expert[expert >= 0])[expert[expert >= 0]]
    root = np.sqrt(weight)[:, None]
    ridge = np.sqrt(RIDGE * np.mean(np.sum(weight[:, None] * a**2, axis=0)))
    left, right = np.vstack([root * a, ridge * np.eye(10)]), np.vstack([root * y, np.zeros((10, 3))])
    want = np.linalg.lstsq(left, right, rcond=None)[0].T
    want = want / (a @ want.T).std(ddof=1)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-4)


@pytest.mark.parametrize("how", ["kmeans", "domains"])
def test_logits_have_variance_1_and_nothing_in_common(how):
    generator = torch.Generator().manual_seed(0)
    x, expert = 7 * torch.randn(400, 10, generator=generator) + 3, torch.arange(400) % 4
    x += torch.randn(4, 10, generator=generator)[expert] * 9
    if how == "domains":
        weight = by_domain(x, expert, 4, torch.zeros(4, 10))
    else:
        weight, _ = by_cluster(x, 4, 0, torch.full((400,), -1), None)
    assert weight.dtype == torch.float32
    assert (x @ weight.t()).std().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(weight.sum(0), torch.zeros(10), atol=1e-5, rtol=0)


def test_cluster_numbers_are_those_of_the_returned_rows():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(400) % 4
    x = torch.randn(4, 10, generator=generator)[group] + 0.1 * torch.randn(400, 10, generator=generator)
    weight, cluster = by_cluster(x, 4, 0, group, None)
    assert cluster.tolist() == group.tolist()
    # the mean is taken off every row alike, so that the order of the logits stays
    assert (x @ weight.t()).argmax(1).tolist() == group.tolist()
    again, same = by_cluster(x, 4, 3, torch.full((400,), -1), cluster)
    assert same.tolist() == group.tolist()
    torch.testing.assert_close(again, weight)


def test_experts_without_tokens_keep_their_direction():
    model = grouped(num_experts=6, null_expert=True)
    before = {
        n: layer.srde_router["default"].weight.detach().clone() for n, layer in model.srde.layers.items()
    }
    warm_start(model, batches(domains=True), "domains", expert_of=Supervision(0, 6).experts)
    for name, layer in model.srde.layers.items():
        cosine = torch.cosine_similarity(layer.srde_router["default"].weight.detach(), before[name], dim=1)
        assert cosine[:4].abs().max() < 0.9 and cosine[4:].min() > 1 - 1e-6  # of the null slot too


def test_every_expert_of_a_domain_gets_tokens_though_each_batch_is_one_example():
    model = grouped()
    before = {
        n: layer.srde_router["default"].weight.detach().clone() for n, layer in model.srde.layers.items()
    }
    supervision = Supervision(0, GROUPS, table=((0, 1), (2, 3)))
    single = [{key: value[:1] for key, value in one.items()} for one in batches(12, domains=True)]
    for number, one in enumerate(single):
        one["domain_ids"] = torch.full_like(one["input_ids"], number % 2)
    warm_start(model, single, "domains", expert_of=supervision.experts)
    for name, layer in model.srde.layers.items():
        assert (layer.srde_router["default"].weight.detach() != before[name]).any(1).all()


def test_padding_is_no_part_of_the_sample():
    plain = batches(domains=True)
    ones = [one | {"attention_mask": torch.ones_like(one["input_ids"])} for one in plain]
    fill = {"input_ids": 5, "labels": -100, "attention_mask": 0, "domain_ids": 3}
    padded = [{k: torch.nn.functional.pad(v, (0, 9), value=fill[k]) for k, v in one.items()} for one in ones]
    weights = []
    for data in (ones, padded):
        model = grouped()
        warm_start(model, data, "domains", expert_of=Supervision(0, GROUPS).experts)
        weights.append([layer.srde_router["default"].weight for layer in model.srde.layers.values()])
    for got, want in zip(*weights, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("expert_of", [None, Supervision(0, GROUPS).experts])
def test_domains_cannot_be_told_apart_where_there_are_none(expert_of):
    model = grouped()
    unknown = batches(domains=True, domain_of=lambda ids: torch.full_like(ids, -1))
    message = "^training rows: domain: no row has one, and --warm_start domains needs them"
    with pytest.raises(DataError, match=message):
        warm_start(model, unknown, "domains", expert_of=expert_of)


def test_a_warm_start_leaves_only_routers_changed():
    model = grouped().train()
    data = batches(domains=True)
    keys = [set(one) for one in data]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    warm_start(model, data, "kmeans", expert_of=Supervision(0, GROUPS).experts)
    assert model.training and [set(one) for one in data] == keys
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "srde_router" in name} and len(changed) == 2
    for layer in model.srde.layers.values():
        assert not layer.disable_adapters and not layer._forward_pre_hooks


def test_the_same_seed_gives_the_same_routers():
    weights = []
    for seed in (0, 0, 1):
        model = grouped()
        torch.rand(seed + len(weights))
        warm_start(model, batches(90), "kmeans", seed=seed)  # more tokens than are looked at
        weights.append(
            torch.cat([layer.srde_router["default"].weight for layer in model.srde.layers.values()])
        )
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
