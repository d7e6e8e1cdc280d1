import pytest
import torch
from reference import Gated, build

from srde.core import DELTAS, count_rewritten, deal, gradient_scores, magnitude_scores, random_scores


def test_the_best_are_dealt_round_robin_and_nobody_shares():
    score = torch.tensor([5.0, 1, 9, 7, 3, 8, 2, 6])
    assert deal(score, 2, 3).tolist() == [[0, 2, 3], [4, 5, 7]]  # ranks 0 2 4 and 1 3 5


def test_when_there_are_not_enough_each_expert_fills_up_with_the_best_it_lacks():
    score = torch.arange(5, 0, -1.0)
    dealt = deal(score, 3, 3)
    assert dealt.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert all(len(set(row)) == 4 for row in deal(torch.rand(7), 3, 4).tolist())


@pytest.mark.parametrize(
    ("sparsity", "size", "want"), [(0.01, 1536, 15), (0.07, 100, 7), (0.001, 64, 1), (1, 64, 64)]
)
def test_an_expert_rewrites_at_most_its_share_and_at_least_one(sparsity, size, want):
    assert count_rewritten(sparsity, size) == want


def test_a_neurons_magnitude_is_the_norm_of_all_its_weights():
    block, layout, delta, _ = build("gated", "neuron", experts=2, sparsity=0.1)
    weights = [getattr(block, n).weight.detach() for n in (*layout.ups, layout.down)]
    delta.set_masks(magnitude_scores(weights))
    norms = [sum(w[f].norm() ** 2 for w in weights[:-1]) + weights[-1][:, f].norm() ** 2 for f in range(20)]
    best = sorted(range(20), key=lambda f: -norms[f])[:4]
    assert sorted(delta.index.flatten().tolist()) == sorted(best)


def test_an_entrys_magnitude_is_its_own():
    block, layout, delta, _ = build("gated", "element", experts=2, sparsity=0.1)
    weights = [getattr(block, n).weight.detach() for n in (*layout.ups, layout.down)]
    delta.set_masks(magnitude_scores(weights))
    for m, w in enumerate(weights):
        want = w.abs().flatten().topk(delta.index[m].numel()).indices
        assert sorted(delta.index[m].flatten().tolist()) == sorted(want.tolist())
        assert (delta.index[m].diff(dim=1) > 0).all()


def test_gradient_scores_are_the_squared_weight_gradient():
    block = Gated(6, 20)
    x = torch.randn(11, 6, requires_grad=True)
    seen = {}
    hook = block.up_proj.register_full_backward_hook(lambda _m, _i, out: seen.update(grad=out[0]))
    block(x).square().sum().backward()
    hook.remove()
    torch.testing.assert_close(gradient_scores(x, seen["grad"]), block.up_proj.weight.grad.square())


@pytest.mark.parametrize("granularity", DELTAS)
def test_random_masks_repeat_by_seed_and_differ_by_seed(granularity):
    def masks(seed):
        _, _, delta, _ = build("gated", granularity)
        weights = [torch.zeros(20, 6), torch.zeros(20, 6), torch.zeros(6, 20)]
        delta.set_masks(random_scores(weights, torch.Generator().manual_seed(seed)))
        return delta.index.clone()

    assert torch.equal(masks(1), masks(1)) and not torch.equal(masks(1), masks(2))
