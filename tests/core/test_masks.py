import pytest
import torch
from reference import Gated, build

from srde.core import DELTAS, count_rewritten, deal, draft, gradient_scores, magnitude_scores, random_scores


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


def slow_draft(score, count):
    """Turn by turn, looking at every score each time; then each expert's own best, as far as it lacks some."""
    experts, size = score.shape
    score, chosen, turns = score.tolist(), [[] for _ in range(experts)], min(count, size // experts)
    for turn in range(turns):
        for e in range(experts) if turn % 2 == 0 else range(experts - 1, -1, -1):
            free = [f for f in range(size) if not any(f in own for own in chosen)]
            chosen[e].append(max(free, key=lambda f: (score[e][f], -f)))
    for e, own in enumerate(chosen):
        while len(own) < count:
            own.append(max((f for f in range(size) if f not in own), key=lambda f: (score[e][f], -f)))
    return [sorted(own) for own in chosen]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("experts", "size", "count"),
    [(3, 30, 4), (4, 20, 5), (3, 20, 6), (2, 7, 7), (3, 7, 5), (5, 4, 2), (1, 9, 3), (4, 11, 1)],
)
def test_experts_draft_in_turn_what_they_score_best(experts, size, count, ties):
    for seed in range(5):
        score = torch.randn(experts, size, generator=torch.Generator().manual_seed(seed))
        score = score.round() if ties else score
        drafted = draft(score, count)
        assert drafted.tolist() == slow_draft(score, count)
        assert drafted.dtype == torch.long and all(len(set(own)) == count for own in drafted.tolist())
        if experts * count <= size:
            assert len(drafted.unique()) == experts * count
        else:
            assert len(drafted.unique()) >= size // experts * experts


def test_who_begins_changes_from_round_to_round():
    score = torch.arange(6, 0, -1.0).expand(2, -1)
    assert draft(score, 3).tolist() == [[0, 3, 4], [1, 2, 5]]


def test_an_expert_that_has_learned_nothing_takes_the_first_that_are_free():
    score = torch.tensor([[0.0, 0, 0, 0, 0, 0], [9.0, 8, 0, 0, 0, 0]])
    assert draft(score, 2).tolist() == [[0, 3], [1, 2]]  # ties go to the lower number
    assert draft(torch.zeros(3, 6), 2).tolist() == [[0, 5], [1, 4], [2, 3]]


def test_a_delta_takes_the_masks_its_experts_chose():
    _, _, delta, _ = build("gated", "neuron", experts=4, sparsity=0.2)
    score = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    delta.set_own_masks(score)
    assert torch.equal(delta.index, draft(score, 4)) and delta.disjoint()
