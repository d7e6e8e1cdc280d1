"""Muon with AdamW: the bits of torch's own two, matrix by matrix; what stays still; what a state brings back."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn

from srde import SrdeConfig
from srde.train.optimizer import MuonWithAdamW, split_parameters
from srde.tuner.prune import prune_adapter
from tiny import tiny

SETTINGS = {"lr": 0.02, "weight_decay": 0.1}
ADAM = {"betas": (0.8, 0.95), "eps": 1e-6}


def parameters(seed=0):
    """Two stacks of matrices, one plain matrix, and two others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4, 5, 8), (2, 6, 3), (4, 7)], [(11,), (3, 2, 2)]
    return [[nn.Parameter(torch.randn(s, generator=generator)) for s in kind] for kind in shapes]


def give_gradients(matrices, rest, seed, silent=()):
    generator = torch.Generator().manual_seed(1000 + seed)
    for parameter in (*matrices, *rest):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for parameter, where in silent:
        parameter.grad[where] = 0


def step_many(optimizer, matrices, rest, seeds):
    for seed in seeds:
        give_gradients(matrices, rest, seed)
        optimizer.step()


def test_every_matrix_moves_as_it_would_alone_and_the_rest_as_under_adamw():
    matrices, rest = parameters()
    optimizer = MuonWithAdamW(matrices, rest, **SETTINGS, momentum=0.9, **ADAM)
    views = [nn.Parameter(m.detach().clone()) for p in matrices for m in p.view(-1, *p.shape[-2:])]
    others = [nn.Parameter(p.detach().clone()) for p in rest]
    muons = [torch.optim.Muon([v], **SETTINGS, momentum=0.9, adjust_lr_fn="match_rms_adamw") for v in views]
    adamw = torch.optim.AdamW(others, **SETTINGS, **ADAM)
    for step in range(5):
        for group in (*optimizer.param_groups, *(m.param_groups[0] for m in muons), *adamw.param_groups):
            group["lr"] = 0.02 / (step + 1)  # as a schedule does
        give_gradients(matrices, rest, step)
        flat = [g for p in matrices for g in p.grad.view(-1, *p.shape[-2:])]
        for one, grad in zip((*views, *others), (*flat, *(p.grad for p in rest)), strict=True):
            one.grad = grad.clone()
        for one in (optimizer, *muons, adamw):
            one.step()
        got = [m for p in matrices for m in p.view(-1, *p.shape[-2:])]
        assert all(torch.equal(a, b) for a, b in zip((*got, *rest), (*views, *others), strict=True))


def test_a_matrix_without_a_gradient_stays_and_so_does_its_momentum():
    matrices, rest = parameters()
    optimizer = MuonWithAdamW(matrices, rest, **SETTINGS)
    step_many(optimizer, matrices, rest, [0])
    momentum = optimizer.state[matrices[0]]["momentum_buffer"]
    before, old = matrices[0].detach().clone(), momentum.clone()
    silent = (slice(None), 2)  # expert 2 of 4, in all three matrices
    give_gradients(matrices, rest, 1, silent=[(matrices[0], silent)])
    optimizer.step()
    changed = (matrices[0].detach() != before).flatten(2).any(-1)
    assert changed.tolist() == [[True, True, False, True]] * 3
    assert ((momentum != old).flatten(2).any(-1)).tolist() == changed.tolist()


def test_what_has_no_gradient_at_all_is_left_alone():
    matrices, rest = parameters()
    optimizer = MuonWithAdamW(matrices, rest, **SETTINGS)
    step_many(optimizer, matrices, rest, [0])
    before = [p.detach().clone() for p in (*matrices, *rest)]
    give_gradients(matrices, rest, 1)
    for parameter in (matrices[1], rest[0]):
        parameter.grad = None
    optimizer.step()
    still = [torch.equal(p, old) for p, old in zip((*matrices, *rest), before, strict=True)]
    assert still == [False, True, False, True, False]
    matrices[0].grad = matrices[2].grad = rest[1].grad = None
    optimizer.step()


@pytest.mark.parametrize("empty", ["matrices", "rest"])
def test_either_kind_may_be_missing(empty):
    matrices, rest = parameters()
    matrices, rest = ([], rest) if empty == "matrices" else (matrices, [])
    optimizer = MuonWithAdamW(matrices, rest, **SETTINGS)
    before = [p.detach().clone() for p in (*matrices, *rest)]
    step_many(optimizer, matrices, rest, [0])
    assert not any(torch.equal(p, old) for p, old in zip((*matrices, *rest), before, strict=True))


def test_a_closure_is_called_with_gradients_and_its_loss_is_given_back():
    matrices, rest = parameters()
    optimizer = MuonWithAdamW(matrices, rest, **SETTINGS)
    before = matrices[0].detach().clone()

    def closure():
        loss = matrices[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == before.square().sum() and not torch.equal(matrices[0], before)


def test_a_loaded_state_goes_on_with_the_same_bits(tmp_path):
    matrices, rest = parameters()
    optimizer = MuonWithAdamW(matrices, rest, **SETTINGS)
    step_many(optimizer, matrices, rest, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    copies = [[nn.Parameter(p.detach().clone()) for p in kind] for kind in (matrices, rest)]
    other = MuonWithAdamW(*copies, lr=9.0)  # the state brings the settings too
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    step_many(optimizer, matrices, rest, range(3, 6))
    step_many(other, *copies, range(3, 6))
    for a, b in zip((*matrices, *rest), (*copies[0], *copies[1]), strict=True):
        assert torch.equal(a, b)


def adapted(**settings):
    torch.manual_seed(0)
    model = get_peft_model(tiny().eval(), SrdeConfig(**{"num_experts": 4, "sparsity": 0.2} | settings)).eval()
    for layer in model.srde.layers.values():
        nn.init.normal_(layer.srde_experts["default"].values, std=0.1)
        nn.init.normal_(layer.srde_router["default"].weight)
    return model


def train(model, optimizer, steps=1):
    ids = torch.arange(6, 38).view(2, 16)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_parameters_are_split_by_what_they_mean(granularity):
    model = adapted(granularity=granularity, modules_to_save=["lm_head"])
    model.add_adapter("other", SrdeConfig(num_experts=2))  # not active, and so not trained
    matrices, rest = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    got = [sorted(names[id(p)] for p in kind) for kind in (matrices, rest)]
    marks = (
        (".srde_router.default.", ".srde_experts.default.")
        if granularity == "neuron"
        else (".srde_router.default.",)
    )
    assert got[0] == sorted(name for name in trained if any(mark in name for mark in marks))
    assert got[1] == sorted(set(trained) - set(got[0])) and any("lm_head" in name for name in got[1])
    assert len(got[0]) == 2 * len(marks) and not any("other" in name for name in (*got[0], *got[1]))


def test_pruning_takes_the_momentum_of_what_stays():
    model = adapted()
    optimizer = MuonWithAdamW(*split_parameters(model), lr=0.01)
    train(model, optimizer, 2)
    deltas = {name: layer.srde_experts["default"] for name, layer in model.srde.layers.items()}
    old = {name: optimizer.state[d.values]["momentum_buffer"].clone() for name, d in deltas.items()}
    routers = [layer.srde_router["default"].weight for layer in model.srde.layers.values()]
    before = [optimizer.state[weight]["momentum_buffer"].clone() for weight in routers]
    kept = prune_adapter(model, 0.1, optimizer=optimizer)
    for name, delta in deltas.items():
        momentum = optimizer.state[delta.values]["momentum_buffer"]
        assert momentum.shape == delta.values.shape == (3, 4, 4, 32)
        for e in range(4):
            assert torch.equal(momentum[:, e], old[name][:, e, kept[name][e]])
    for weight, momentum in zip(routers, before, strict=True):
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum)
    train(model, optimizer, 2)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("how", ["locked", "frozen"])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_held_experts_keep_every_bit_whatever_the_momentum(kind, how, wrapped):
    """Frozen experts are chosen and get gradients, and stay all the same."""
    model = adapted()
    optimizer = MuonWithAdamW(*split_parameters(model), lr=0.05, weight_decay=0.5)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5
        )
    if wrapped:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    train(model, optimizer, 2)  # all have momentum
    for layer in model.srde.layers.values():
        setattr(layer.srde_router["default"], how, (1, 3))
    model.srde.hold_locked(optimizer)
    before = copy.deepcopy(model)
    train(model, optimizer, 2)
    for layer, old in zip(model.srde.layers.values(), before.srde.layers.values(), strict=True):
        moved = (
            (layer.srde_experts["default"].values != old.srde_experts["default"].values).flatten(2).any(-1)
        )
        assert moved.tolist() == [[True, False, True, False]] * 3
        router, was = layer.srde_router["default"].weight, old.srde_router["default"].weight
        assert (router != was).any(1).tolist() == [True, False, True, False]


def test_accelerates_wrapper_changes_nothing():
    models = [adapted(), adapted()]
    for number, model in enumerate(models):
        optimizer = MuonWithAdamW(*split_parameters(model), lr=0.01)
        train(model, Accelerator(cpu=True).prepare(optimizer) if number else optimizer, 3)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


def test_muon_trains_experts():
    model = adapted()
    optimizer = MuonWithAdamW(*split_parameters(model), lr=0.02)
    ids = torch.arange(6, 38).view(2, 16)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
