"""Mask learning: gains against autograd on the experts' own deltas, planted neurons, and going on from a saved state."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from srde import SrdeConfig, calibrate_masks
from srde.core import relaxed_top_k
from srde.train.masks import LAST_TEMPERATURE, STEP_SIZE, MaskLearner
from tiny import tiny

KINDS = ["llama", "gpt2", "phi3", "opt"]


def adapted(model_type="llama", base=None, **settings):
    """A model without dropout whose routers tell tokens apart."""
    settings = {"num_experts": 3, "mask_init": "learned", "sparsity": 0.1} | settings
    model = get_peft_model(tiny(model_type).eval() if base is None else base, SrdeConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(4)
    for layer in model.srde.layers.values():
        torch.nn.init.normal_(layer.srde_router["default"].weight, generator=generator)
    return model


def batch(rows, length, padding=0):
    ids = torch.randint(6, 64, (rows, length + padding), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, length:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def slow_gate(router, x, e, forced):
    """The gate of expert e for one token."""
    if e >= router.num_experts:  # shared
        return 1.0
    if forced is not None:
        return float(forced == e)
    logits = router.weight.detach() @ x / router.temperature
    best = logits.topk(router.top_k).indices.tolist()
    return float(logits[best].softmax(0)[best.index(e)]) if e in best else 0.0


class SlowExpert:
    """One expert of one MLP of the plain base: ``x W' + g_t x Delta'`` in each linear layer, Delta zero and trained."""

    def __init__(self, layer, block, e, forced):
        self.router, self.e, self.forced = layer.srde_router["default"], e, forced
        layout = layer.layout
        width, neurons = layout.hidden_size, layout.intermediate_size
        first = getattr(block, layout.ups[0]) if layout.loose else block  # OPT's MLP has no module of its own
        first.register_forward_pre_hook(self.route)
        self.ups = [
            torch.zeros(neurons * (2 if layout.fused else 1), width, requires_grad=True) for _ in layout.ups
        ]
        self.down = torch.zeros(width, neurons, requires_grad=True)
        for name, delta in zip((*layout.ups, layout.down), (*self.ups, self.down), strict=True):
            getattr(block, name).register_forward_hook(partial(self.add, delta))

    def route(self, _module, args):
        x_TD = args[0].detach().flatten(0, -2)
        forced_T = [None] * len(x_TD) if self.forced is None else self.forced.tolist()
        gates = [slow_gate(self.router, x, self.e, f) for x, f in zip(x_TD, forced_T, strict=True)]
        self.gate_T1 = torch.tensor(gates).unsqueeze(1)

    def add(self, delta, _module, args, out):
        x_TI = args[0].flatten(0, -2)
        return out + (self.gate_T1 * F.linear(x_TI, delta)).view(out.shape)

    def gains(self):
        """Squared norms of the gradients by each neuron's own weights [F]."""
        halves = [half for up in self.ups for half in up.grad.split(self.down.shape[1])]
        return sum(half.square().sum(1) for half in halves) + self.down.grad.square().sum(0)


def slow_gains(model, inputs, forced=None):
    """Layer -> [E, F], one expert at a time."""
    found = {name: [] for name in model.srde.layers}
    for e in range(next(iter(model.srde.layers.values())).srde_experts["default"].num_experts):
        plain = copy.deepcopy(model).unload().requires_grad_(False)
        experts = {
            n: SlowExpert(layer, plain.get_submodule(n), e, forced) for n, layer in model.srde.layers.items()
        }
        plain(**inputs).loss.backward()
        for name, expert in experts.items():
            found[name].append(expert.gains())
    return {name: torch.stack(rows) for name, rows in found.items()}


def assert_same_gains(got_EF, want_EF):
    largest = want_EF.amax()
    torch.testing.assert_close(got_EF / largest, want_EF / largest, atol=1e-5, rtol=1e-3)


def heard(model, inputs, forced=None):
    learner = MaskLearner(model, start=0, end=10)
    before = [model.srde.layers[name].disable_adapters for name in model.srde.layers]
    with learner.listening():
        if forced is None:
            model(**inputs).loss.backward()
        else:
            with model.srde.force_experts(forced):
                model(**inputs).loss.backward()
    assert before == [layer.disable_adapters for layer in model.srde.layers.values()]
    assert all(p.grad is None for p in model.parameters())
    return learner.gains


@pytest.mark.parametrize("tokens", ["few", "many"])
@pytest.mark.parametrize("model_type", KINDS)
def test_gains_are_the_gradients_by_each_experts_own_weights(model_type, tokens):
    """Few tokens and many take two ways to the same norms."""
    model = adapted(model_type, num_shared_experts=1, router_temperature=1.5)
    inputs = batch(2, 4) if tokens == "few" else batch(4, 40)
    del inputs["attention_mask"]
    got, want = heard(model, inputs), slow_gains(model, inputs)
    assert set(got) == set(want) == set(model.srde.layers)
    for name in want:
        assert got[name].shape == (4, 48) and (want[name].amax(1) > 0).all()
        assert_same_gains(got[name], want[name])


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_forced_tokens_count_for_their_expert_alone(model_type):
    model, inputs = adapted(model_type), batch(3, 8)
    forced = torch.tensor([0, 2, 0])
    got, want = heard(model, inputs, forced), slow_gains(model, inputs, forced.repeat_interleave(8))
    for name in want:
        assert not got[name][1].any() and not want[name][1].any()  # nobody's tokens: nothing is heard
        assert_same_gains(got[name], want[name])


def test_padding_says_nothing():
    model = adapted()
    padded = batch(1, 9, padding=6)
    plain = {name: value[:, :9] for name, value in padded.items()}
    got, want = heard(model, padded), heard(model, plain)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-7 * float(want[name].max()), rtol=1e-3)


def test_what_is_heard_adds_up_until_the_update():
    model = adapted()
    learner = MaskLearner(model, start=0, end=10)
    parts = [heard(model, batch(2, 6)), heard(model, batch(3, 6))]
    with learner.listening():
        for rows in (2, 3):
            model(**batch(rows, 6)).loss.backward()
    for name, gain in learner.gains.items():
        torch.testing.assert_close(gain, parts[0][name] + parts[1][name])
    learner.update(0)
    assert not learner.gains
    model(**batch(2, 6)).logits.sum()
    assert not learner.gains  # nobody listens outside


def test_one_update_is_one_step_along_the_selectors_gradient():
    """By hand: noise of the step's seed, the threshold's gradient, gains of mean 1; an expert that heard nothing stays."""
    model = adapted()
    learner = MaskLearner(model, start=2, end=10, seed=3)
    names = list(learner.selectors)
    gain = torch.rand(3, 48, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[1.0], [1e-6], [0.0]]
    )
    start = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    for name in names:
        learner.selectors[name].logits.data.copy_(start)
        learner.gains[name] = gain.square()
    learner.update(4)
    temperature = 1 + (LAST_TEMPERATURE - 1) * (4 - 2) / (10 - 2)
    for number, name in enumerate(names):
        seed = (3 * 1_000_003 + 4) * 10_007 + number
        uniform = torch.rand(3, 48, generator=torch.Generator().manual_seed(seed))
        z = (start - temperature * (-uniform.log()).log()).requires_grad_()
        unit = gain / gain.mean(1, keepdim=True).clamp(min=1e-30)
        count = learner.layers[0].srde_experts["default"].index.shape[1]
        (ascent,) = torch.autograd.grad((relaxed_top_k(z, count, temperature) * unit).sum(), z)
        want = start + STEP_SIZE / 8 * ascent
        torch.testing.assert_close(learner.selectors[name].logits.detach(), want, atol=1e-5, rtol=1e-5)
        assert (
            torch.equal(learner.selectors[name].logits[2], start[2]) and ascent[:2].abs().amax(1).min() > 1e-3
        )


def test_importance_is_how_far_a_neuron_lies_above_the_border():
    model = adapted()
    learner = MaskLearner(model, start=0, end=10)
    for seed, selector in enumerate(learner.selectors.values()):
        torch.nn.init.normal_(selector.logits, generator=torch.Generator().manual_seed(seed))
    learner.finish()
    for name, importance in learner.importance().items():
        logits = learner.selectors[name].logits.detach()
        index = model.srde.layers[name].srde_experts["default"].index
        assert importance.shape == index.shape == (3, 4)
        for e in range(3):
            border = sorted(logits[e].tolist())[-4]
            assert importance[e].tolist() == pytest.approx([float(logits[e, f]) - border for f in index[e]])


EXPERTS, REWRITTEN, NEURONS, VOCABULARY = 4, 3, 96, 128


def planted(seed=0):
    """A base, the neurons that were changed in each layer for each domain, and the four changed models.

    Every change is small and random, of neurons drawn at random: neither base nor changed neurons stand out by their size.
    """
    base = tiny(
        seed=seed, hidden_size=64, head_dim=16, intermediate_size=NEURONS, vocab_size=VOCABULARY
    ).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    targets, neurons = [copy.deepcopy(base) for _ in range(EXPERTS)], []
    for number in range(2):
        dealt = torch.randperm(NEURONS, generator=generator)[: EXPERTS * REWRITTEN].view(EXPERTS, REWRITTEN)
        neurons.append([set(own.tolist()) for own in dealt])
        for target, own in zip(targets, dealt, strict=True):
            mlp = target.model.layers[number].mlp
            for weight in (mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data.t()):
                weight[own] += 0.3 * weight.std() * torch.randn(REWRITTEN, 64, generator=generator)
    return base, neurons, targets


def taught(targets, rows, seed):
    """Random tokens, their domains, and what the domains' models say to them."""
    ids = torch.randint(0, VOCABULARY, (EXPERTS * rows, 16), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        parts = zip(targets, ids.split(rows), strict=True)
        want = torch.cat([target(own).logits for target, own in parts]).softmax(-1)
    return ids, torch.arange(EXPERTS).repeat_interleave(rows), want


def recall(model, neurons, together):
    """The share of planted neurons that the masks hold: of each expert's own, or of all."""
    hits = 0
    for layer, dealt in zip(model.srde.layers.values(), neurons, strict=True):
        for own, index in zip(dealt, layer.srde_experts["default"].index, strict=True):
            held = layer.srde_experts["default"].index if together else index
            hits += len(own & set(held.flatten().tolist()))
    return hits / (2 * EXPERTS * REWRITTEN)


def test_planted_neurons_are_found_by_the_experts_of_their_domains():
    """Random masks would hold 3 of 96 of each expert's; magnitude knows nothing of them."""
    base, neurons, targets = planted()
    model = adapted(base=base, num_experts=EXPERTS, top_k=1, sparsity=REWRITTEN / NEURONS)
    assert recall(model, neurons, together=True) < 0.3  # until they are learned, the masks are by magnitude
    learner = MaskLearner(model, start=0, end=40)
    for step in range(40):
        ids, domains, want = taught(targets, 2, seed=step)
        with model.srde.force_experts(domains), learner.listening():
            F.cross_entropy(model(ids).logits.flatten(0, 1), want.flatten(0, 1)).backward()
        learner.update(step)
    learner.finish()
    assert recall(model, neurons, together=False) > 0.8
    # the choice has settled: what is rewritten lies clear of what is not
    for selector in learner.selectors.values():
        best = selector.logits.detach().sort(dim=1, descending=True).values
        assert (best[:, REWRITTEN - 1] - best[:, REWRITTEN] > 0).all()


def test_planted_neurons_of_all_domains_are_found_by_gradient():
    base, neurons, targets = planted()
    base.loss_function = lambda logits, labels, **_: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(0, 1)
    )
    settings = {"num_experts": EXPERTS, "top_k": 1, "sparsity": REWRITTEN / NEURONS}
    model = adapted(base=base, mask_init="gradient", **settings)
    ids, _, want = taught(targets, 40, seed=0)
    calibrate_masks(model, [{"input_ids": ids, "labels": want}])
    assert recall(model, neurons, together=True) > 0.75
    assert recall(model, neurons, together=False) < 0.5  # dealt out like cards: whose they are it cannot know


def test_learning_goes_on_from_a_saved_state_with_the_same_bits():
    def learn(model, learner, steps):
        for step in steps:
            with learner.listening():
                model(**batch(2 + step % 3, 6)).loss.backward()
            learner.update(step)

    model = adapted()
    whole = MaskLearner(model, start=0, end=8, seed=5)
    learn(model, whole, range(8))
    first = MaskLearner(model, start=0, end=8, seed=5)
    learn(model, first, range(3))
    state = {name: value.clone() for name, value in first.state_dict().items()}
    second = MaskLearner(model, start=0, end=8, seed=5)
    second.load_state_dict(state)
    torch.rand(3)  # the noise is the step's own
    learn(model, second, range(3, 8))
    for name, logits in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], logits) and logits.any()
    other = MaskLearner(model, start=0, end=8, seed=6)
    learn(model, other, range(8))
    assert not all(
        torch.equal(other.state_dict()[name], logits) for name, logits in whole.state_dict().items()
    )
    second.finish()
    masks = [layer.srde_experts["default"].index.clone() for layer in model.srde.layers.values()]
    whole.finish()
    assert all(
        torch.equal(layer.srde_experts["default"].index, own)
        for layer, own in zip(model.srde.layers.values(), masks, strict=True)
    )
