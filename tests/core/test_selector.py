"""The selector: its choice against plain top-k, its noise against enumeration, its gradient against finite differences."""

from itertools import permutations

import pytest
import torch

from srde.core import LearnedSparseSelector, relaxed_top_k
from srde.errors import ConfigError


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make(size=50, count=10, **settings):
    selector = LearnedSparseSelector(size, count, **settings)
    torch.nn.init.normal_(selector.logits, std=2, generator=seeded(7))
    return selector


@pytest.mark.parametrize("num_experts", [None, 4])
@pytest.mark.parametrize(("size", "count"), [(50, 10), (50, 1), (50, 50), (1, 1)])
def test_the_mask_has_exactly_as_many_ones_as_asked_for_and_the_indices_are_their_places(
    size, count, num_experts
):
    selector = make(size, count, num_experts=num_experts)
    for seed in range(20):
        mask, indices = selector(seeded(seed))
        assert mask.dtype == torch.float32 and indices.dtype == torch.long
        assert mask.shape == selector.logits.shape and indices.shape == (*mask.shape[:-1], count)
        assert set(mask.flatten().tolist()) <= {0.0, 1.0}  # not nearly
        assert (indices.diff(dim=-1) > 0).all()
        assert torch.equal(mask, torch.zeros_like(mask).scatter(-1, indices, 1.0))


@pytest.mark.parametrize("how", ["evaluation", "temperature 0"])
def test_without_noise_the_best_are_chosen(how):
    selector = make(num_experts=3, temperature=0.0 if how == "temperature 0" else 5.0)
    selector.train(how == "temperature 0")
    mask, indices = selector()
    for e, logits in enumerate(selector.logits.tolist()):
        want = sorted(sorted(range(50), key=lambda f: -logits[f])[:10])
        assert indices[e].tolist() == want and mask[e].nonzero().flatten().tolist() == want
    assert mask.requires_grad == (how == "evaluation")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("temperature", [1e-4, 0.1, 1.0, 100.0])
def test_the_soft_mask_adds_up_to_k_whatever_the_logits(scale, temperature):
    z = torch.randn(5, 40, dtype=torch.float64, generator=seeded(0)) * scale
    for k in (1, 7, 39, 40):
        soft = relaxed_top_k(z, k, temperature)
        assert soft.min() >= 0 and soft.max() <= 1
        torch.testing.assert_close(soft.sum(-1), torch.full((5,), float(k), dtype=torch.float64), atol=1e-9, rtol=0)  # fmt: skip
        assert (soft.gather(-1, z.argsort(dim=-1)).diff(dim=-1) >= 0).all()


def test_tied_logits_share_alike_and_an_outlier_takes_one_place():
    torch.testing.assert_close(relaxed_top_k(torch.zeros(8), 2, 0.3), torch.full((8,), 0.25))
    z = torch.tensor([1e6, 0, 0, 0, 0, -1e6], dtype=torch.float64)
    want = torch.tensor([1, 0.25, 0.25, 0.25, 0.25, 0], dtype=torch.float64)
    torch.testing.assert_close(relaxed_top_k(z, 2, 1.0), want)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_gradient_is_that_of_finite_differences_the_threshold_included(k, temperature):
    z = torch.randn(2, 9, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: relaxed_top_k(x, k, temperature), z, eps=1e-5, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(lambda x: relaxed_top_k(x, k, temperature), z.detach()[0])
    off = jacobian - jacobian.diag().diag()
    assert (jacobian.diag() > 0).all() and (off <= 0).all()  # a thing gains at the cost of the others
    torch.testing.assert_close(jacobian.sum(0), torch.zeros(9, dtype=torch.float64), atol=1e-12, rtol=0)


def test_where_all_are_chosen_nothing_has_a_gradient():
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    relaxed_top_k(z, 6, 1.0).square().sum().backward()
    assert torch.isfinite(z.grad).all() and z.grad.abs().max() < 1e-9


@pytest.mark.parametrize("training", [True, False])
def test_the_hard_choice_has_the_soft_ones_gradient(training):
    selector = make(num_experts=3, temperature=0.7).train(training)
    worth = torch.randn(3, 50, generator=seeded(3))
    mask, _ = selector(seeded(5))
    (got,) = torch.autograd.grad((mask * worth).sum(), selector.logits)
    z = selector.logits.detach().clone()
    if training:
        noise = -(-torch.rand(3, 50, generator=seeded(5)).clamp(min=1e-38).log()).log()
        z = z + 0.7 * noise
    z.requires_grad_()
    (want,) = torch.autograd.grad((relaxed_top_k(z, 10, 0.7) * worth).sum(), z)
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_noisy_choices_are_samples_without_replacement(temperature):
    """Every pair's frequency against the sum over the orders in which it can be drawn, by chi-square."""
    logits, draws = torch.tensor([1.0, 0.0, -0.5, 0.7, -2.0]), 20000
    weight = (logits / temperature).double().exp().tolist()
    want = {}
    for first, second in permutations(range(5), 2):
        chance = weight[first] / sum(weight) * weight[second] / (sum(weight) - weight[first])
        pair = tuple(sorted((first, second)))
        want[pair] = want.get(pair, 0.0) + chance
    assert sum(want.values()) == pytest.approx(1)
    selector = LearnedSparseSelector(5, 2, num_experts=draws, temperature=temperature)
    selector.logits.data.copy_(logits)
    _, indices = selector(seeded(0))
    found = torch.zeros(5, 5).index_put((indices[:, 0], indices[:, 1]), torch.ones(draws), accumulate=True)
    chi_square = sum((found[pair].item() - draws * p) ** 2 / (draws * p) for pair, p in want.items())
    assert chi_square < 27.9  # 9 degrees of freedom: one seed in a thousand lies above


def test_experts_side_by_side_choose_as_they_would_alone():
    batched = make(num_experts=4, temperature=0.5)
    worth = torch.randn(4, 50, generator=seeded(3))
    for training in (True, False):
        mask, indices = batched.train(training)(seeded(9))
        (grads,) = torch.autograd.grad((mask * worth).sum(), batched.logits)
        noise = seeded(9)
        for e in range(4):
            single = LearnedSparseSelector(50, 10, temperature=0.5).train(training)
            single.logits.data.copy_(batched.logits[e])
            own, places = single(noise)
            (grad,) = torch.autograd.grad((own * worth[e]).sum(), single.logits)
            assert torch.equal(own, mask[e]) and torch.equal(places, indices[e])
            torch.testing.assert_close(grad, grads[e], atol=1e-7, rtol=1e-5)


def test_a_seed_gives_the_same_choice_whatever_else_is_drawn():
    selector = make()
    torch.manual_seed(0)
    first = selector(seeded(4))[1]
    torch.rand(7)
    assert torch.equal(selector(seeded(4))[1], first)
    assert not torch.equal(selector(seeded(5))[1], first)
    torch.manual_seed(1)
    own = selector()[1]
    torch.manual_seed(1)
    assert torch.equal(selector()[1], own)


def test_climbing_the_gradient_finds_the_best_set():
    """The ten that are worth most, of fifty, from logits of zero, though the noise hides which is which."""
    torch.manual_seed(0)
    selector = LearnedSparseSelector(50, 10)
    worth = torch.rand(50, generator=seeded(2))
    optimizer = torch.optim.Adam(selector.parameters(), lr=0.2)
    for step in range(60):
        selector.temperature = 1.0 - 0.9 * step / 60
        optimizer.zero_grad()
        mask, _ = selector()
        (-(mask * worth).sum()).backward()
        optimizer.step()
    found = set(selector.eval()()[1].tolist())
    assert len(found & set(worth.topk(10).indices.tolist())) >= 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_sparse": 51}, "num_sparse=51: it must be at least 1 and at most num_params=50. choose fewer"),
        ({"num_sparse": 0}, "num_sparse=0: it must be at least 1 and at most num_params=50"),
        ({"temperature": -0.1}, "temperature=-0.1: it must be at least 0. use 1"),
    ],
)
def test_what_cannot_be_chosen_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        LearnedSparseSelector(**{"num_params": 50, "num_sparse": 10} | settings)


def test_its_settings_are_shown():
    want = "LearnedSparseSelector(num_params=50, num_sparse=10, temperature=0.5)"
    assert str(make(temperature=0.5)) == want
