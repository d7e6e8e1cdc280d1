"""Each loss against its definition written out in loops, and against Transformers where it has the same one."""

import pytest
import torch
from reference import build
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from srde.core import (
    Route,
    Router,
    load_balancing_loss,
    orthogonality_loss,
    router_supervision_loss,
    router_z_loss,
    sparsity_loss,
)


def routed(experts=5, top_k=2, tokens=40, **kwargs):
    torch.manual_seed(0)
    router = Router(8, experts, top_k, **kwargs)
    torch.nn.init.normal_(router.weight)
    return router, torch.randn(tokens, 8)


def test_load_balancing_equals_transformers_over_k():
    router, x = routed()
    route = router(x)
    want = load_balancing_loss_func((route.logits_TE,), num_experts=5, top_k=2) / 2
    torch.testing.assert_close(load_balancing_loss(route, 5), want)


def test_load_balancing_with_padding_equals_transformers_over_k():
    router, x = routed()
    route, mask = router(x), (torch.arange(40) % 7 > 1).long()
    want = load_balancing_loss_func((route.logits_TE,), 5, 2, attention_mask=mask.view(4, 10)) / 2
    torch.testing.assert_close(load_balancing_loss(route, 5, mask.view(4, 10)), want)


def test_load_balancing_is_one_when_even_and_e_when_collapsed():
    even = torch.full((6, 3), -20.0)
    even[torch.arange(6), torch.arange(6) % 3] = 20
    by_turns = Route(even, torch.arange(6).view(6, 1) % 3, torch.ones(6, 1), 3)
    assert load_balancing_loss(by_turns, 3).item() == pytest.approx(1)
    one = torch.tensor([[20.0, -20, -20]]).expand(6, 3)
    all_first = Route(one, torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1), 3)
    assert load_balancing_loss(all_first, 3).item() == pytest.approx(3)


def test_the_null_slot_and_locked_experts_carry_no_load():
    router, x = routed(null_expert=True)
    router.lock([1])
    route = router(x)
    assert route.gate_TE.shape == (40, 5) and (route.gate_TE[:, 1] == 0).all()
    probs = route.logits_TE[:, :5].softmax(-1).mean(0)
    used = (route.gate_TE != 0).float().sum(0)
    want = 4 * sum(used[e] / used.sum() * probs[e] for e in (0, 2, 3, 4))
    torch.testing.assert_close(load_balancing_loss(route, 5), want)


@pytest.mark.parametrize("loss", [lambda r, m: load_balancing_loss(r, 5, m), router_z_loss])
def test_padding_changes_no_router_loss(loss):
    router, x = routed()
    padded = torch.cat([x, torch.randn(9, 8) * 100])
    mask = torch.cat([torch.ones(40), torch.zeros(9)])
    torch.testing.assert_close(loss(router(padded), mask), loss(router(x), None))
    assert not torch.allclose(loss(router(padded), None), loss(router(x), None))


def test_z_loss_is_the_mean_squared_log_sum_exp():
    router, x = routed()
    logits = router(x).logits_TE
    want = sum(torch.log(sum(torch.exp(v) for v in row)) ** 2 for row in logits) / len(logits)
    torch.testing.assert_close(router_z_loss(router(x)), want)


@pytest.mark.parametrize("granularity", ["neuron", "element"])
@pytest.mark.parametrize("locked", [(), (1,)])
def test_orthogonality_is_the_mean_cosine_between_pairs(granularity, locked):
    _, _, delta, _ = build("gated", granularity, sparsity=0.5)
    if granularity == "element":
        delta.index[:, 1] = delta.index[:, 0]
    keep = [e for e in range(4) if e not in locked]
    sizes = [sum(c.square() for c in (m.flatten() for m in _per_position(delta, e))) for e in keep]
    cosines = [
        torch.dot(a, b) / (a.norm() * b.norm())
        for i, a in enumerate(sizes)
        for j, b in enumerate(sizes)
        if i != j
    ]
    torch.testing.assert_close(orthogonality_loss(delta, locked), sum(cosines) / len(cosines))
    orthogonality_loss(delta, locked).backward()
    assert torch.isfinite(delta.values.grad).all() and delta.values.grad.abs().max() > 0
    if locked:
        assert delta.values.grad[:, 1].abs().max() == 0


def _per_position(delta, e):
    """Size of expert e's change at every position, as one vector: neurons, or entries of all matrices."""
    if delta.values.ndim == 4:
        flat = torch.zeros(delta.intermediate_size, dtype=delta.values.dtype)
        size = delta.values[:, e].detach().square().sum((0, 2)).sqrt()
        return [flat.index_add(0, delta.index[e], size)]
    one = torch.zeros(delta.num_experts, dtype=delta.values.dtype)
    one[e] = 1
    return [torch.cat([m.flatten() for m in delta.dense(one)])]


def test_orthogonality_is_zero_for_disjoint_masks_and_one_for_equal_ones():
    _, _, delta, _ = build("gated", "neuron", sparsity=0.2)
    assert delta.disjoint() and orthogonality_loss(delta).item() == 0
    _, _, delta, _ = build("gated", "neuron", overlap=True)
    delta.values.data[:] = delta.values.data[:, :1]
    assert orthogonality_loss(delta).item() == pytest.approx(1)


def test_orthogonality_of_untouched_experts_is_zero_and_has_finite_gradients():
    _, _, delta, _ = build("gated", "neuron", overlap=True)
    torch.nn.init.zeros_(delta.values)
    loss = orthogonality_loss(delta)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(delta.values.grad).all()


def test_sparsity_is_the_mean_magnitude_of_the_open_experts():
    _, _, delta, _ = build("gated", "neuron")
    want = sum(delta.values[:, e].abs().sum() for e in (0, 2, 3)) / (delta.values[:, :3].numel())
    torch.testing.assert_close(sparsity_loss(delta, (1,)), want)
    sparsity_loss(delta, (1,)).backward()
    assert delta.values.grad[:, 1].abs().max() == 0 and delta.values.grad[:, 0].abs().max() > 0


def test_router_supervision_is_the_cross_entropy_over_labelled_tokens():
    router, x = routed(null_expert=True)
    expert = torch.arange(40) % 6 - 1
    logits = router(x).logits_TE[:, :5].log_softmax(-1)
    want = -sum(logits[t, e] for t, e in enumerate(expert.tolist()) if e >= 0) / int((expert >= 0).sum())
    torch.testing.assert_close(router_supervision_loss(router(x), 5, expert), want)
    assert router_supervision_loss(router(x), 5, torch.full((40,), -1)).item() == 0
