"""The router's temperature: how even the shares are, never which experts are chosen."""

import pytest
import torch

from srde.core import Router

x = torch.randn(30, 8, generator=torch.Generator().manual_seed(3))


def route(temperature, **settings):
    torch.manual_seed(0)
    router = Router(8, 4, 2, temperature=temperature, **settings)
    torch.nn.init.normal_(router.weight)
    return router, router(x)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("temperature", [0.25, 2.0, 10.0])
def test_shares_are_the_softmax_of_the_divided_logits_of_the_chosen(temperature, null):
    router, found = route(temperature, null_expert=null)
    for t in range(len(x)):
        logits = [float(row @ x[t]) for row in router.weight.detach()]
        best = sorted(range(len(logits)), key=lambda e: -logits[e])[:2]
        assert found.slot_TK[t].tolist() == best
        want = (torch.tensor([logits[e] for e in best]) / temperature).softmax(0)
        torch.testing.assert_close(found.share_TK[t], want)


def test_temperature_1_gives_the_bits_of_a_router_without_one():
    router, one = route(1.0)
    torch.testing.assert_close(one.logits_TE, x @ router.weight.t())
    other = route(3.0)[0]
    other.temperature = 1.0
    again = other(x)
    assert torch.equal(again.logits_TE, one.logits_TE) and torch.equal(again.gate_TE, one.gate_TE)


def test_warmer_is_more_even_and_locks_hold():
    entropy = []
    for temperature in (0.5, 1.0, 4.0):
        router, found = route(temperature)
        share = found.share_TK.detach()
        entropy.append(float(-(share * share.log()).sum(1).mean()))
        assert torch.equal(found.slot_TK, route(1.0)[1].slot_TK)
        router.lock([1])
        assert 1 not in router(x).slot_TK and torch.isfinite(router(x).gate_TE).all()
    assert entropy[0] < entropy[1] < entropy[2] < 0.6932  # log 2
