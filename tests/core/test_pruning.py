"""What pruning keeps: the largest changes or the best scores, for both granularities."""

from itertools import product

import pytest
import torch
from reference import build, slow_dense

from srde.core import DELTAS

GRANULARITIES = list(DELTAS)


def make(granularity, sparsity=0.4):
    return build("gated", granularity, sparsity=sparsity)[2]


def entries(delta, where, n):
    """All numbers of one rewritten thing: a neuron's M x D, or the one entry."""
    return delta.values.detach()[:, *where, n] if delta.values.ndim == 4 else delta.values.detach()[*where, n]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_size_of_a_change_is_the_norm_of_its_numbers(granularity):
    delta = make(granularity)
    size = delta.size()
    assert size.shape == delta.index.shape and not size.requires_grad
    for where in product(*map(range, size.shape)):
        want = entries(delta, where[:-1], where[-1]).square().sum().sqrt()
        torch.testing.assert_close(size[where], want)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_expert_keeps_what_is_worth_most_in_its_own_eyes(granularity, scored):
    delta = make(granularity)
    generator = torch.Generator().manual_seed(5)
    score = torch.randn(delta.index.shape, generator=generator, dtype=torch.float64) if scored else None
    kept = delta.prune(0.2, score)
    count = delta.keep(0.2)
    assert kept.shape == (*delta.index.shape[:-1], count) and count < delta.index.shape[-1]
    worth = delta.size() if score is None else score
    before = delta.values.detach().clone(), delta.index.clone()
    for where in product(*map(range, kept.shape[:-1])):
        own = worth[where].tolist()
        best = sorted(range(len(own)), key=lambda n: -own[n])[:count]
        assert kept[where].tolist() == sorted(best)
    assert torch.equal(delta.values, before[0]) and torch.equal(delta.index, before[1])  # it only looks
    delta.shrink(kept)
    for where in product(*map(range, kept.shape[:-1])):
        assert delta.index[where].tolist() == [int(before[1][where][n]) for n in kept[where].tolist()]
        assert (delta.index[where].diff() > 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scores_are_obeyed_even_against_the_sizes(granularity):
    delta = make(granularity)
    kept = delta.prune(0.2, -delta.size())  # the smallest stay
    gone = delta.size().sum() - delta.size().gather(-1, kept).sum()
    assert delta.size().gather(-1, kept).sum() < gone


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_resized_delta_is_a_new_one_in_the_same_parameter(granularity):
    delta = make(granularity)
    parameter, dtype = delta.values, delta.values.dtype
    for sparsity in (0.1, 0.4, 0.05):
        delta.values.grad = torch.ones_like(delta.values)
        delta.resize(sparsity)
        fresh = make(granularity, sparsity)
        assert delta.values is parameter and delta.values.dtype == dtype and delta.values.grad is None
        assert delta.values.shape == fresh.values.shape and delta.index.shape == fresh.index.shape
        assert delta.index.dtype == fresh.index.dtype
        assert not delta.values.any() and not delta.index.any()
        state = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        delta.load_state_dict(state)
        for got, want in zip(slow_dense(delta, 1), slow_dense(fresh, 1), strict=True):
            assert torch.equal(got, want)


def test_whether_experts_overlap_is_looked_up_again_after_a_resize():
    """New masks may lie where older ones lay in memory."""
    delta = make("neuron")
    apart, answers = torch.arange(16).view(4, 4), []
    for masks, look in [(apart, True), (apart, False), (apart * 0, True), (apart, False), (apart, True)]:
        delta.resize(0.2)
        delta.index.copy_(masks)
        answers += [delta.disjoint()] if look else []
    assert answers == [True, False, True]
