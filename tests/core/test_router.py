import pytest
import torch

from srde.core import Router
from srde.errors import ConfigError, UsageError


@pytest.fixture
def x():
    return torch.randn(30, 8, generator=torch.Generator().manual_seed(3))


def make(**kwargs):
    torch.manual_seed(0)
    router = Router(8, 4, 2, **kwargs)
    torch.nn.init.normal_(router.weight)
    return router


def test_gates_are_the_softmax_over_the_chosen(x):
    router = make()
    route = router(x)
    for t in range(len(x)):
        logits = [float(router.weight.detach()[e] @ x[t]) for e in range(4)]
        best = sorted(range(4), key=lambda e: -logits[e])[:2]
        assert route.slot_TK[t].tolist() == best
        want = torch.zeros(4)
        want[best] = torch.tensor([logits[e] for e in best]).softmax(0)
        torch.testing.assert_close(route.gate_TE[t], want)


def test_logits_are_float32_even_in_autocast(x):
    router = make()
    want = router(x.bfloat16()).logits_TE
    with torch.autocast("cpu", torch.bfloat16):
        route = router(x.bfloat16())
    assert route.logits_TE.dtype == torch.float32
    assert torch.equal(route.logits_TE, want)


def test_locked_experts_are_never_chosen_and_get_exactly_no_gradient(x):
    router = make()
    router.lock([0, 3])
    route = router(x)
    assert set(route.slot_TK.flatten().tolist()) == {1, 2}
    route.gate_TE[:, 1].sum().backward()
    assert router.weight.grad[[0, 3]].abs().max() == 0 and router.weight.grad[[1, 2]].abs().max() > 0
    router.lock([])
    assert set(router(x).slot_TK.flatten().tolist()) == {0, 1, 2, 3}


def test_one_open_expert_of_top_2_takes_the_whole_gate(x):
    router = make()
    router.lock([0, 1, 2])
    torch.testing.assert_close(router(x).gate_TE, torch.tensor([[0.0, 0, 0, 1]]).expand(30, 4))


def test_the_null_slot_takes_its_share_and_has_no_column(x):
    router = make(null_expert=True)
    route = router(x)
    null = (route.slot_TK == 4).any(1)
    assert null.any() and not null.all()
    assert route.gate_TE.shape == (30, 4)
    assert (route.gate_TE[null].sum(1) < 1 - 1e-6).all()
    torch.testing.assert_close(route.gate_TE[~null].sum(1), torch.ones(int((~null).sum())))


def test_shared_experts_are_always_on(x):
    route = make(num_shared=2)(x)
    assert route.gate_TE.shape == (30, 6) and (route.gate_TE[:, 4:] == 1).all()


def test_forcing_by_token_leaves_free_tokens_alone(x):
    router = make(num_shared=1)
    free = router(x)
    forced = torch.full((30,), -1)
    forced[5], forced[6] = 3, 0
    route = router(x, forced)
    assert route.gate_TE[5].tolist() == [0, 0, 0, 1, 1] and route.gate_TE[6].tolist() == [1, 0, 0, 0, 1]
    assert route.slot_TK[5].tolist() == [3, -1]
    keep = forced < 0
    assert torch.equal(route.gate_TE[keep], free.gate_TE[keep])


def test_forcing_reaches_a_locked_expert(x):
    router = make()
    router.lock([3])
    assert (router(x, 3).gate_TE[:, 3] == 1).all()


def test_forced_experts_must_fit_the_tokens(x):
    with pytest.raises(
        UsageError, match=r"forced experts=\(7,\): one expert per token is needed, .*30 tokens"
    ):
        make()(x, torch.zeros(7, dtype=torch.long))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([4], "locked expert=4: routed experts are numbered 0 to 3"),
        ([0, 1, 2, 3], "at least one slot must stay open"),
    ],
)
def test_impossible_locks_are_refused(experts, message):
    with pytest.raises(ConfigError, match=message):
        make().lock(experts)


def test_groups_list_each_pair_once_sorted_by_expert(x):
    route = make(num_shared=1)(x)
    pairs = [(e, t) for e in range(5) for t in range(30) if route.gate_TE[t, e] != 0]
    assert list(zip(route.groups.expert_P.tolist(), route.groups.token_P.tolist(), strict=True)) == pairs
    assert route.groups.counts == [sum(e == i for e, _ in pairs) for i in range(5)]
