"""Properties 1 to 3 of the architecture: bit-identity at zero, forced = merged, every path = the slow loop."""

from itertools import product

import pytest
import torch
from reference import Gated, build, slow_dense, slow_mlp

from srde.core import NeuronDelta, Route, Router, choose_path, contract, expand, routed_mlp, try_layout
from srde.core.layout import _fit

KINDS = ["gated", "plain"]
GRANULARITIES = ["neuron", "element"]
PATHS = ["masked", "grouped"]
VARIANTS = {
    "plain": {},
    "null": {"null": True},
    "shared": {"shared": 2},
    "overlap": {"overlap": True},
    "top_1": {"top_k": 1},
    "all": {"top_k": 4, "null": True, "shared": 1},
    "crowded": {"sparsity": 0.5, "experts": 5},
}


def run(block, layout, x, delta, route, path):
    return routed_mlp(block, layout, x, [(delta, route)], path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_all_gradients_equal_the_slow_loop(kind, granularity, path, variant):
    block, layout, delta, router = build(kind, granularity, **VARIANTS[variant])
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    params = [x, delta.values, router.weight]

    def grads(y):
        return torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape).cos()).sum(), params)

    x_TD = x.view(-1, 6)
    route = router(x_TD)
    fast = run(block, layout, x, delta, route, path)
    slow = slow_mlp(block, layout, x_TD, [delta], [router(x_TD).gate_TE]).view(fast.shape)
    torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-10)
    for name, got, want in zip(["x", "values", "router"], grads(fast), grads(slow), strict=True):
        # with top-1 the softmax over the chosen is 1 whatever the logits: the task does not move the router
        assert (want.abs().max() > 1e-6) == (name != "router" or router.top_k > 1)
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_in_place_inference_equals_the_recorded_forward(granularity, path):
    block, layout, delta, router = build("gated", granularity)
    x = torch.randn(7, 6, dtype=torch.float64)
    recorded = run(block, layout, x, delta, router(x), path)
    with torch.no_grad():
        torch.testing.assert_close(
            run(block, layout, x, delta, router(x), path), recorded, atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_deltas_give_the_bits_of_the_base(kind, granularity, path, tokens, dtype):
    block, layout, delta, router = build(kind, granularity, d=32, f=80)
    block, delta, router = block.to(dtype), delta.float(), router.float()
    torch.nn.init.zeros_(delta.values)
    x = torch.randn(tokens, 32).to(dtype)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            assert torch.equal(run(block, layout, x, delta, router(x), path), block(x))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_forced_to_one_expert_equals_the_merged_dense_mlp(kind, granularity, path):
    block, layout, delta, router = build(kind, granularity, shared=1)
    x = torch.randn(9, 6, dtype=torch.float64)
    got = run(block, layout, x, delta, router(x, 2), path)
    gate_E = torch.tensor([0, 0, 1, 0, 1.0])
    for name, change in zip((*layout.ups, layout.down), delta.dense(gate_E), strict=True):
        getattr(block, name).weight.data += change
    torch.testing.assert_close(got, block(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dense_is_the_weighted_sum_of_the_entries(granularity):
    _, _, delta, _ = build("gated", granularity, overlap=True)
    gate_E = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    parts = [slow_dense(delta, e) for e in range(4)]
    for m, got in enumerate(delta.dense(gate_E)):
        want = sum(g * part[m] for g, part in zip(gate_E, parts, strict=True))
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_two_adapters_add_up(granularity, path):
    block, layout, first, router = build("gated", granularity)
    _, _, second, other = build("gated", granularity, seed=1, top_k=1)
    x = torch.randn(5, 6, dtype=torch.float64)
    routes = [router(x), other(x)]
    got = routed_mlp(block, layout, x, list(zip([first, second], routes, strict=True)), path)
    want = slow_mlp(block, layout, x, [first, second], [r.gate_TE for r in routes])
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_token_does_not_change_its_neighbours(granularity, path):
    block, layout, delta, router = build("gated", granularity)
    x = torch.randn(6, 6, dtype=torch.float64)
    other = x.clone()
    other[3] = torch.randn(6)
    a, b = (run(block, layout, z, delta, router(z), path) for z in (x, other))
    keep = [0, 1, 2, 4, 5]
    torch.testing.assert_close(a[keep], b[keep], atol=1e-12, rtol=0)
    assert not torch.allclose(a[3], b[3])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_pruned_delta_equals_the_same_delta_with_the_smallest_values_at_zero(granularity):
    block, layout, delta, router = build("gated", granularity, sparsity=0.4)
    x = torch.randn(6, 6, dtype=torch.float64)
    kept = delta.prune(0.2)
    masked = torch.zeros_like(delta.values)
    for where in product(*map(range, kept.shape[:-1])):
        for position in kept[where].tolist():
            at = (slice(None), *where, position) if granularity == "neuron" else (*where, position)
            masked[at] = delta.values.data[at]
    full, delta.values.data = delta.values.data, masked
    want = run(block, layout, x, delta, router(x), "masked")
    delta.values.data = full
    parameter = delta.values
    delta.shrink(kept)
    assert (
        delta.values is parameter
        and delta.values.shape[-1 if granularity == "element" else 2] * 2
        == full.shape[-1 if granularity == "element" else 2]
    )
    torch.testing.assert_close(run(block, layout, x, delta, router(x), "grouped"), want, atol=1e-12, rtol=0)


def test_the_masked_path_compiles_without_a_graph_break():
    block, layout, delta, router = build("gated", "neuron")
    block, delta, router = block.float(), delta.float(), router.float()

    def step(x):
        return run(block, layout, x, delta, router(x.view(-1, 6)), None)

    x = torch.randn(8, 6)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("forced", [None, 1])
def test_a_lone_token_uses_its_own_experts_and_equals_the_slow_loop(variant, forced):
    block, layout, delta, router = build("gated", "neuron", **VARIANTS[variant])
    for _ in range(5):
        x = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
        route = router(x, forced)
        narrow = forced is None and variant not in ("null", "all")
        assert (route.lone_experts is not None) == narrow
        fast = run(block, layout, x, delta, route, "masked")
        slow = slow_mlp(block, layout, x, [delta], [router(x, forced).gate_TE])
        torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-10)
        got, want = (torch.autograd.grad(y.square().sum(), [x, delta.values]) for y in (fast, slow))
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_no_tokens_at_all_are_fine():
    block, layout, delta, router = build("gated", "neuron")
    x = torch.zeros(0, 6, dtype=torch.float64)
    for path in PATHS:
        assert run(block, layout, x, delta, router(x), path).shape == (0, 6)


def test_split_calls_equal_the_whole():
    """What a loose layout (OPT) does in two places equals what a block does in one."""
    block, layout, delta, router = build("plain", "neuron")
    x = torch.randn(5, 6, dtype=torch.float64)
    experts: list[tuple[object, Route]] = [(delta, router(x))]
    h = block.act(expand([block.fc_in(x)], x, experts)[0])
    torch.testing.assert_close(contract(block.fc_out(h), h, experts), routed_mlp(block, layout, x, experts))


@pytest.mark.parametrize(
    ("rewritten", "tokens", "recording", "want"),
    [
        (60, 512, False, "masked"),
        (70, 512, False, "grouped"),
        (70, 512, True, "masked"),
        (200, 512, True, "grouped"),
        (200, 8, False, "masked"),
    ],
)
def test_the_path_follows_the_cost_rule(rewritten, tokens, recording, want):
    delta, router = NeuronDelta(4, 1000, 3, 8, rewritten / 1000), Router(4, 8, 2)
    with torch.set_grad_enabled(recording):
        assert choose_path(delta, router(torch.randn(tokens, 4))) == want
        assert choose_path(delta, router(torch.randn(tokens, 4)), "grouped") == "grouped"


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [2, 6, 7])
def test_one_more_locked_expert_changes_no_bit(experts, dtype, tokens):
    """At widths where one more row in a product would change how it rounds."""
    torch.manual_seed(0)
    width, hidden = 256, 1024
    block = Gated(width, hidden).to(dtype).requires_grad_(False)
    layout = try_layout(block, _fit(block))
    x = torch.randn(tokens, width, dtype=dtype)
    small, large = Router(width, experts, 2), Router(width, experts + 1, 2)
    few, many = NeuronDelta(width, hidden, 3, experts, 0.02), NeuronDelta(width, hidden, 3, experts + 1, 0.02)
    for delta in (few, many):
        delta.set_masks([torch.rand(hidden, width), torch.rand(hidden, width), torch.rand(width, hidden)])
    many.index[:experts] = few.index
    few.values.data.normal_(std=0.05)
    many.values.data[:, :experts] = few.values.data
    many.values.data[:, experts] = float("nan")  # nothing of it may be used
    large.weight.data[:experts] = small.weight.data
    large.lock([experts])
    with torch.no_grad():
        before = routed_mlp(block, layout, x, [(few, small(x))])
        after = routed_mlp(block, layout, x, [(many, large(x))])
    assert torch.equal(before, after) and not torch.equal(before, block(x))
