"""Held-out loss against a loop over tokens; specialisation against mutual information written out; means kept exactly."""

import json
from itertools import permutations, product
from math import log2

import numpy as np
import pytest
import torch
from peft import get_peft_model

from srde import SrdeConfig
from srde.train.means import Means
from srde.train.measure import example_numbers, measure, specialisation
from tiny import tiny

LENGTHS, DOMAINS = [7, 4, 9, 5, 6], [0, 1, 0, -1, 2]


def examples():
    generator = torch.Generator().manual_seed(0)
    found = []
    for length, domain in zip(LENGTHS, DOMAINS, strict=True):
        ids = torch.randint(6, 64, (length,), generator=generator)
        labels = ids.clone()
        labels[: 1 + length // 3] = -100
        found.append((ids, labels, domain))
    return found


def padded(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([ids for ids, _, _ in rows], True, 0),
        "labels": pad([labels for _, labels, _ in rows], True, -100),
        "attention_mask": pad([torch.ones_like(ids) for ids, _, _ in rows], True, 0),
        "domain_ids": pad([torch.full_like(ids, domain) for ids, _, domain in rows], True, -1),
    }


def packed(rows):
    return {
        "input_ids": torch.cat([ids for ids, _, _ in rows])[None],
        "labels": torch.cat([labels for _, labels, _ in rows])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _, _ in rows])[None],
        "domain_ids": torch.cat([torch.full_like(ids, domain) for ids, _, domain in rows])[None],
        "use_cache": False,
    }


WAYS = {
    "one by one": lambda rows: [padded([row]) for row in rows],
    "padded": lambda rows: [padded(rows[:3]), padded(rows[3:])],
    "packed": lambda rows: [packed(rows)],
    "packed in two": lambda rows: [packed(rows[:2]), packed(rows[2:])],
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = get_peft_model(tiny(), SrdeConfig(num_experts=3, num_shared_experts=1)).eval()
    for layer in model.srde.layers.values():
        torch.nn.init.normal_(layer.srde_experts["default"].values, std=0.3)
        torch.nn.init.normal_(layer.srde_router["default"].weight)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gates_are_those_of_a_loop_over_tokens(model, way):
    losses, gates = {}, []
    with torch.no_grad():
        for ids, labels, domain in examples():
            with model.srde.record() as record:
                logits = model(ids[None]).logits[0]
            for t in range(1, len(ids)):
                if labels[t] >= 0:
                    losses.setdefault(domain, []).append(
                        -float(logits[t - 1].double().log_softmax(-1)[labels[t]])
                    )
            gates.append(record.load().numpy())
    found = measure(model, WAYS[way](examples()))
    assert set(found.domains) == set(losses) == {-1, 0, 1, 2}
    for domain, own in losses.items():
        assert found.domains[domain] == (pytest.approx(np.mean(own), abs=1e-5), len(own))
    assert found.loss == pytest.approx(np.mean([v for own in losses.values() for v in own]), abs=1e-5)
    assert found.domain_N.tolist() == DOMAINS
    np.testing.assert_allclose(found.gate_NLE, np.stack(gates), atol=1e-5)


def test_batches_without_domains_and_models_without_experts():
    rows = examples()
    batches = [{k: v for k, v in batch.items() if k != "domain_ids"} for batch in WAYS["padded"](rows)]
    found = measure(tiny().eval(), batches)
    assert set(found.domains) == {-1} and found.gate_NLE is None and found.domain_N.tolist() == []
    assert found.domains[-1] == (found.loss, sum(int((labels[1:] >= 0).sum()) for _, labels, _ in rows))
    assert set(batches[0]) == {"input_ids", "labels", "attention_mask"}  # they are left as they were


def test_lists_of_all_processes_are_joined(model):
    batches = WAYS["one by one"](examples())
    sent = []  # what the first process sends: losses, then gates
    measure(model, batches[:2], gather=lambda items: sent.append(items) or items)
    joined = measure(model, batches[2:], gather=lambda items: sent.pop(0) + items)
    whole = measure(model, batches)
    assert joined.loss == pytest.approx(whole.loss) and joined.domain_N.tolist() == DOMAINS
    assert {d: n for d, (_, n) in joined.domains.items()} == {d: n for d, (_, n) in whole.domains.items()}
    assert np.array_equal(joined.gate_NLE, whole.gate_NLE)


def test_a_measurement_can_be_ended():
    class Ended(Exception):
        pass

    def check():
        raise Ended

    with pytest.raises(Ended):
        measure(tiny(), WAYS["padded"](examples()), check=check)


def test_examples_are_counted_by_rows_or_by_positions():
    ids = torch.zeros(3, 4)
    assert example_numbers(ids, None).tolist() == [[0] * 4, [1] * 4, [2] * 4]
    assert example_numbers(ids, torch.arange(4).expand(3, 4)).tolist() == [[0] * 4, [1] * 4, [2] * 4]
    assert example_numbers(ids[:1], None).tolist() == [[0] * 4]
    assert example_numbers(ids[:1], torch.tensor([[0, 1, 0, 0]])).tolist() == [[0, 0, 1, 2]]


def slow_information(gates, domains):
    """Bits between the domain, drawn evenly, and the expert, of one layer [N, E]."""
    names = sorted(set(domains))
    joint = {}
    for c, e in product(names, range(gates.shape[1])):
        own = [gates[n, e] for n, d in enumerate(domains) if d == c]
        joint[c, e] = sum(own) / len(own) / len(names)
    expert = [sum(joint[c, e] for c in names) for e in range(gates.shape[1])]
    return sum(p * log2(p * len(names) / expert[e]) for (_, e), p in joint.items() if p > 0)


def random_gates(count, layers=2, experts=4, seed=0, sharp=1.0):
    return np.random.default_rng(seed).dirichlet([sharp] * experts, (count, layers))


def test_specialisation_is_the_mutual_information_of_even_domains():
    domains = [0, 0, 0, 0, 0, 3, 3, 5, -1, -1]
    gates = random_gates(10)
    gates[6, :, 1] = 0
    gates[6] /= gates[6].sum(-1, keepdims=True)
    found = specialisation(gates, domains, permutations=5)
    want = [slow_information(gates[:8, layer], domains[:8]) for layer in range(2)]
    assert found.information_L == pytest.approx(want) and found.mean == pytest.approx(np.mean(want))
    assert found.permutations == 5 and found.chance >= 0


def test_experts_that_know_their_domain_have_all_its_bits():
    domains = np.repeat(np.arange(4), 6)
    found = specialisation(np.eye(4)[domains][:, None, :], domains)
    assert found.mean == pytest.approx(2) and found.p_value == pytest.approx(1 / 1000)
    even = specialisation(np.full((24, 1, 4), 0.25), domains)
    assert even.mean == pytest.approx(0, abs=1e-12) and even.p_value == 1


def test_the_p_value_is_the_share_of_orders_that_reach_what_was_found():
    """Few examples: every order can be tried."""
    domains, gates = [0, 0, 1, 1, 1], random_gates(5, layers=1, seed=3)
    seen = [slow_information(gates[:, 0], [domains[n] for n in order]) for order in permutations(range(5))]
    exact = np.mean(np.array(seen) >= slow_information(gates[:, 0], domains) - 1e-12)
    found = specialisation(gates, domains, permutations=4000)
    assert found.p_value == pytest.approx(exact, abs=0.03)
    assert found.chance == pytest.approx(np.mean(seen), rel=0.05)


def test_p_values_are_uniform_where_domains_mean_nothing_and_small_where_they_do():
    domains = np.arange(24) % 3
    null, planted = [], []
    for seed in range(60):
        gates = random_gates(24, seed=seed)
        null.append(specialisation(gates, domains, seed=seed, permutations=99).p_value)
        gates = 0.6 * gates + 0.4 * np.eye(4)[domains][:, None, :]
        planted.append(specialisation(gates, domains, seed=seed, permutations=99).p_value)
    # Kolmogorov-Smirnov: 0.21 is reached by one in a hundred sets of 60
    steps = np.arange(1, 61) / 60
    assert np.abs(np.sort(null) - steps).max() < 0.21
    assert max(planted) <= 0.02


def test_specialisation_repeats_by_seed_and_needs_two_domains():
    gates = random_gates(12)
    domains = np.arange(12) % 2
    assert specialisation(gates, domains, seed=4) == specialisation(gates, domains, seed=4)
    assert specialisation(gates, domains, seed=4).chance != specialisation(gates, domains, seed=5).chance
    assert specialisation(gates, np.zeros(12), seed=4) is None
    assert specialisation(gates, np.full(12, -1)) is None
    assert specialisation(gates, [-1] * 11 + [3]) is None


def test_means_are_weighted_and_start_anew_when_drained():
    means = Means()
    for value, weight in ((1.0, 1.0), (4.0, 0.5), (4.0, 0.5)):
        means.add("b", torch.tensor(value, requires_grad=True), weight)
    means.add("a", torch.tensor(2.0))
    assert list(means.drain().items()) == [("b", 2.5), ("a", 2.0)]
    assert means.drain() == {}
    means.add("a", torch.tensor(3.0))
    assert means.drain(lambda mean: mean * 2) == {"a": 6.0}


def test_means_go_on_from_json_with_the_same_bits():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 1e-3
    whole, first, second = Means(), Means(), Means()
    for value in values:
        whole.add("x", value, 1 / 3)
    for value in values[:17]:
        first.add("x", value, 1 / 3)
    copied = first.copy()
    second.load(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    for value in values[17:]:
        second.add("x", value, 1 / 3)
        copied.add("x", value, 1 / 3)
    assert second.state() == whole.state() == copied.state() != first.state()
    assert second.drain() == whole.drain() and second.state() == {}
