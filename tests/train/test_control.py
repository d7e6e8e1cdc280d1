"""What a run changes when: what each phase trains, to the bit; locks, pruning, temperature, and its saved state."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from srde import SrdeConfig
from srde.core import NeuronDelta
from srde.train.control import Controller, Settings
from srde.train.phases import plan_phases
from srde.train.record import Record
from srde.train.runner import RunTrainer
from srde.train.schedules import LinearSchedule, SparsitySchedule, UnlockSchedule, unlock_span
from srde.train.stop import StopSignal
from srde.train.supervision import Supervision
from tiny import tiny

# warm-up 0-2, masks 2-4, pre-training 4-6, delta training 6-8, joint 8-10
PHASES = plan_phases(10, warm_up=2, mask_learning=2, pretraining=2, delta_training=4)
UNSUPERVISED = plan_phases(12, warm_up=1, mask_learning=2, delta_training=3)


def adapted(filled=False, **settings):
    torch.manual_seed(0)
    settings = {"num_experts": 4, "mask_init": "learned", "initial_sparsity": 0.2, "sparsity": 0.2} | settings
    model = get_peft_model(tiny().eval(), SrdeConfig(**settings)).eval()
    for layer in model.srde.layers.values():
        nn.init.normal_(layer.srde_router["default"].weight)
        if filled:
            nn.init.normal_(layer.srde_experts["default"].values, std=0.1)
    return model


def settings(phases=PHASES, **given):
    plain = {
        "sparsity": SparsitySchedule(0.2, 0.2, start=phases.first_trained),
        "temperature": LinearSchedule(1.0, 1.0, 0, 1),
        "unlock": UnlockSchedule("none", 4, *unlock_span(phases)),
        "mask_init": "learned",
    }
    return Settings(phases, **plain | given)


def rows():
    ids = torch.randint(6, 64, (24, 8), generator=torch.Generator().manual_seed(1))
    return [
        {"input_ids": row, "labels": row.clone(), "domain_ids": torch.full_like(row, number % 4)}
        for number, row in enumerate(ids)
    ]


def first_batches():
    return [default_data_collator(rows()[:12]), default_data_collator(rows()[12:])]


class Probe(TrainerCallback):
    """Remembers, for each step, the phase, what changed in it, and what the routers were told."""

    def __init__(self, model, controller):
        self.model, self.controller, self.steps = model, controller, []

    def look(self):
        found = {"head": next(p for n, p in self.model.named_parameters() if "lm_head.modules_to_save" in n)}
        for number, layer in enumerate(self.model.srde.layers.values()):
            delta, router = layer.srde_experts["default"], layer.srde_router["default"]
            found |= {
                f"values {number}": delta.values,
                f"index {number}": delta.index,
                f"router {number}": router.weight,
            }
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def on_step_begin(self, args, state, control, **kwargs):
        router = next(iter(self.model.srde.layers.values())).srde_router["default"]
        told = {"locked": router.locked, "frozen": router.frozen, "temperature": router.temperature}
        self.steps.append({"phase": self.controller.phase.name, **told})
        self.before = self.look()

    def on_step_end(self, args, state, control, **kwargs):
        now = self.look()
        self.steps[-1]["change"] = {
            n: now[n] - old for n, old in self.before.items() if now[n].shape == old.shape
        }


def run(tmp_path, given, *, model=None, table=None, muon=False, **args):
    model = adapted(modules_to_save=["lm_head"]) if model is None else model
    events = []
    phases = given.phases
    forced = phases.named("expert_pretraining")
    supervision = Supervision(forced.end, 4, start=forced.start, table=table) if forced else None
    controller = Controller(
        model,
        given,
        batches=first_batches,
        expert_of=supervision.experts if supervision else None,
        say=lambda *event: events.append(event),
    )
    probe = Probe(model, controller)
    args = {
        "max_steps": phases.max_steps,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 4,
    } | args
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
        lr_scheduler_type="constant", remove_unused_columns=False, logging_strategy="no", **args,
    )  # fmt: skip
    arguments.use_muon = muon
    trainer = RunTrainer(
        model=model, args=arguments, train_dataset=rows(), data_collator=default_data_collator, controller=controller,
        record=Record(tmp_path, phases.max_steps, 100), stop=StopSignal(), identity={}, callbacks=[probe],
    )  # fmt: skip
    trainer.supervision = supervision
    trainer.train()
    return model, controller, probe.steps, events


@pytest.mark.parametrize("way", ["adamw", "muon", "unclipped", "accumulated"])
def test_each_phase_trains_what_it_says_and_not_one_bit_more(tmp_path, way):
    """With weight decay, momentum and a module to save beside the experts."""
    args = {
        "adamw": {},
        "muon": {"muon": True},
        "unclipped": {"max_grad_norm": 0.0},
        "accumulated": {"gradient_accumulation_steps": 2},
    }
    _, _, steps, _ = run(tmp_path, settings(), **args[way])
    want = {
        "warm_up": "",
        "mask_learning": "",
        "expert_pretraining": "hvr",
        "delta_training": "hv",
        "joint": "hvr",
    }
    assert [step["phase"] for step in steps] == [name for name in want for _ in range(2)]
    for number, step in enumerate(steps):
        changed = {name for name, change in step["change"].items() if change.any()}
        kinds = {"h": ["head"], "v": ["values 0", "values 1"], "r": ["router 0", "router 1"]}
        expected = {name for kind in want[step["phase"]] for name in kinds[kind]}
        # while all values are zero, and learned masks' first gradient comes, routers have no gradient but the labels'
        assert changed == expected, number


def test_masks_are_given_when_their_phase_ends_and_never_again(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    before = [layer.srde_experts["default"].index.clone() for layer in model.srde.layers.values()]
    _, controller, steps, events = run(tmp_path, settings(prune_by="importance"), model=model)
    after = [layer.srde_experts["default"].index for layer in model.srde.layers.values()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert controller.learner is None and {
        n: v.shape for n, v in controller.importance.items()
    } == dict.fromkeys(model.srde.layers, (4, 9))
    assert not any(step["change"][f"index {n}"].any() for step in steps for n in (0, 1))
    assert [(name, step) for name, step, _ in events] == [("phase", step) for step in (0, 2, 4, 6, 8)]
    assert events[1][2] == "mask_learning, steps 2 to 4"


def test_masks_are_learned_on_the_tokens_of_the_experts_domains(tmp_path):
    """All domains belong to expert 2: the others hear nothing, and nothing is more important to them than the rest."""
    _, controller, _, _ = run(tmp_path, settings(prune_by="importance"), table=((2,),) * 4)
    for importance in controller.importance.values():
        assert importance.any(1).tolist() == [False, False, True, False]


def test_without_pretraining_closed_experts_are_locked(tmp_path):
    """Three experts of four are opened one by one; nobody is chosen, moved or taught before."""
    phases = UNSUPERVISED
    given = settings(phases, unlock=UnlockSchedule("linear", 4, 3, 9))
    _, _, steps, events = run(tmp_path, given)
    for number, step in enumerate(steps[3:], start=3):
        opened = given.unlock.at(number)
        assert step["locked"] == tuple(range(opened, 4)) and step["frozen"] == ()
        for layer in (0, 1):
            assert not step["change"][f"values {layer}"][:, opened:].any()
            assert not step["change"][f"router {layer}"][opened:].any()
            assert step["change"][f"values {layer}"][:, 0].any()
    assert all(step["locked"] == () for step in steps[:3])  # masks are learned for all
    assert [(step, text) for name, step, text in events if name == "unlock"] == [
        (3, "1 of 4 experts are open"), (5, "2 of 4 experts are open"), (7, "3 of 4 experts are open"),
        (9, "4 of 4 experts are open"),
    ]  # fmt: skip


@pytest.mark.parametrize("muon", [False, True])
def test_after_pretraining_closed_experts_are_frozen_and_still_chosen(tmp_path, muon):
    given = settings(unlock=UnlockSchedule("linear", 4, 6, 10))
    model, _, steps, _ = run(tmp_path, given, muon=muon, per_device_train_batch_size=24)
    assert [step["frozen"] for step in steps] == [()] * 6 + [(1, 2, 3)] * 2 + [(2, 3), (3,)]
    assert all(step["locked"] == () for step in steps)
    for step in steps[4:6]:  # all learn side by side, and have momentum
        assert step["change"]["values 0"].flatten(2).any(-1).all()
    for number, step in enumerate(steps[6:], start=6):
        opened = given.unlock.at(number)
        for layer in (0, 1):
            assert not step["change"][f"values {layer}"][:, opened:].any()
            assert not step["change"][f"router {layer}"][opened:].any()
            assert step["change"][f"values {layer}"][:, :opened].any()
    with torch.no_grad(), model.srde.record() as record:
        model(input_ids=first_batches()[0]["input_ids"])
    chosen = set(torch.cat([slots for slots, _ in record.layers().values()]).flatten().tolist())
    assert 3 in chosen


def test_the_routers_have_the_temperature_of_the_step(tmp_path):
    given = settings(temperature=LinearSchedule(3.0, 1.0, 4, 8))
    _, controller, steps, _ = run(tmp_path, given)
    assert [step["temperature"] for step in steps] == [3, 3, 3, 3, 3, 2.5, 2, 1.5, 1, 1]
    assert controller.router_temperature == 1


@pytest.mark.parametrize("prune_by", ["magnitude", "taylor", "importance"])
def test_sparsity_falls_as_scheduled_while_values_train(tmp_path, prune_by):
    phases = UNSUPERVISED
    given = settings(phases, sparsity=SparsitySchedule(0.2, 0.05, start=3), prune_by=prune_by)
    model, controller, _, events = run(tmp_path, given)
    assert controller.sparsity == pytest.approx(0.05)
    for layer in model.srde.layers.values():
        delta = layer.srde_experts["default"]
        assert delta.index.shape == (4, 2) and delta.values.shape == (3, 4, 2, 32)
        assert delta.values.abs().amax((0, 2, 3)).min() > 0
    cuts = [step for name, step, _ in events if name == "prune"]
    assert cuts == sorted(set(cuts)) and cuts[0] > 3 and cuts[-1] <= 11
    assert {v.shape for v in controller.importance.values()} == (
        set() if prune_by == "magnitude" else {(4, 2)}
    )


# ---- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(model, **given):
    given = {
        "sparsity": SparsitySchedule(0.2, 0.1, begin=0, end=0.5, cuts=1),
        "mask_init": "magnitude",
    } | given
    phases = plan_phases(10, warm_up=0, learn_masks=False, delta_training=0)
    return Controller(model, settings(phases, **given), batches=first_batches)


def at(step):
    return None, TrainerState(global_step=step), TrainerControl()


def prune(controller):
    """The cut that falls after step 5 of 10; which positions of each layer's index stay."""
    before = {layer.name: layer.srde_experts["default"].index.clone() for layer in controller.layers}
    controller.on_step_end(*at(5))
    assert controller.sparsity == pytest.approx(0.1)
    kept = {}
    for layer in controller.layers:
        now = layer.srde_experts["default"].index
        kept[layer.name] = (before[layer.name].unsqueeze(-1) == now.unsqueeze(-2)).any(-1)
        assert (kept[layer.name].sum(-1) == now.shape[-1]).all()
    return kept


def best(score):
    """Where the best half of each expert lies, one by one."""
    keep = torch.zeros_like(score, dtype=torch.bool)
    for where in torch.cartesian_prod(*map(torch.arange, score.shape[:-1])).view(-1, score.ndim - 1).tolist():
        own = score[*where].tolist()
        for n in sorted(range(len(own)), key=lambda n: -own[n])[: len(own) // 2]:
            keep[(*where, n)] = True
    return keep


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_by_magnitude_the_largest_changes_stay(granularity):
    model = adapted(filled=True, granularity=granularity, mask_init="magnitude")
    controller = by_hand(model)
    values = {
        layer.name: layer.srde_experts["default"].values.detach().clone() for layer in controller.layers
    }
    for name, kept in prune(controller).items():
        size = values[name].square().sum((0, 3)) if granularity == "neuron" else values[name].abs()
        assert torch.equal(kept, best(size))


def backward(model, seed):
    model.zero_grad()
    ids = torch.randint(6, 64, (4, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_by_taylor_what_the_loss_would_miss_most_stays(granularity):
    """A running mean of |sum over a neuron's weights of value x gradient|."""
    model = adapted(filled=True, granularity=granularity, mask_init="magnitude")
    controller = by_hand(model, prune_by="taylor")
    score = {}
    for step in range(4):
        backward(model, step)
        controller.on_pre_optimizer_step(*at(step))
        for layer in controller.layers:
            values = layer.srde_experts["default"].values
            product = values.detach() * values.grad
            new = (
                product.sum((0, 3)).abs()
                if isinstance(layer.srde_experts["default"], NeuronDelta)
                else product.abs()
            )
            score[layer.name] = new if step == 0 else 0.9 * score[layer.name] + 0.1 * new
    for name in score:
        torch.testing.assert_close(controller.importance[name], score[name])
    kept = prune(controller)
    for name in score:
        assert torch.equal(kept[name], best(score[name]))
        assert torch.equal(controller.importance[name].flatten(), score[name][kept[name]])  # it shrinks along
    assert not controller.sparsity > controller.settings.sparsity.target
    controller.on_pre_optimizer_step(*at(6))  # nothing more will be cut: nothing is followed
    for name in score:
        assert torch.equal(controller.importance[name].flatten(), score[name][kept[name]])


def test_a_taylor_score_does_not_fade_while_an_expert_has_no_gradient():
    """A frozen expert is pruned by what was known of it, however long ago."""
    model = adapted(filled=True, mask_init="magnitude")
    controller = by_hand(model, prune_by="taylor")
    backward(model, 0)
    controller.on_pre_optimizer_step(*at(0))
    known = {name: score[2].clone() for name, score in controller.importance.items()}
    for layer in controller.layers:
        layer.srde_experts["default"].values.grad[:, 2] = 0
    for step in range(1200):
        controller.on_pre_optimizer_step(*at(step % 5))
    for name, kept in prune(controller).items():
        assert torch.equal(kept[2], best(known[name][None])[0])


def test_by_importance_changes_count_by_how_sure_mask_learning_was():
    model = adapted(filled=True, mask_init="magnitude")
    controller = by_hand(model, prune_by="importance")
    generator = torch.Generator().manual_seed(0)
    importance = {layer.name: 3 * torch.randn(4, 9, generator=generator) for layer in controller.layers}
    controller.importance = dict(importance)
    want = {
        layer.name: layer.srde_experts["default"].values.detach().square().sum((0, 3)).sqrt()
        / (1 + (-importance[layer.name]).exp())
        for layer in controller.layers
    }
    sizes = {layer.name: layer.srde_experts["default"].size() for layer in controller.layers}
    for name, kept in prune(controller).items():
        assert torch.equal(kept, best(want[name])) and not torch.equal(kept, best(sizes[name]))
        assert torch.equal(controller.importance[name].flatten(), importance[name][kept])


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_warm_start_and_gradient_masks_come_once_at_the_end_of_the_warm_up(start):
    """A run that goes on from a checkpoint written at that border has not had them yet; one from later has."""
    phases = plan_phases(10, warm_up=2, learn_masks=False, delta_training=2)
    model = adapted(mask_init="gradient")
    events = []
    given = settings(phases, warm_start="kmeans", mask_init="gradient")
    controller = Controller(model, given, batches=first_batches, say=lambda *event: events.append(event))
    routers = [layer.srde_router["default"].weight.detach().clone() for layer in controller.layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller.on_train_begin(*at(start), optimizer=optimizer)
    for step in range(start, 5):
        controller.on_step_begin(*at(step))
        done = start <= 2 <= step
        for layer, before in zip(controller.layers, routers, strict=True):
            assert (layer.srde_experts["default"].index >= 0).all() == done
            assert (not torch.equal(layer.srde_router["default"].weight, before)) == done
    assert [step for name, step, _ in events if name == "warm_start"] == ([2] if start <= 2 else [])


def test_the_state_goes_to_another_controller_with_the_same_bits():
    model, other = adapted(), adapted()
    given = settings(prune_by="importance")
    first = Controller(model, given, batches=first_batches)
    assert set(first.tensors()) == {f"mask.{name}" for name in model.srde.layers}

    def learn(controller, steps):
        for step in steps:
            controller.on_step_begin(*at(step))
            with controller.learner.listening():
                backward(controller.model, step)
            controller.on_step_end(*at(step + 1))

    first.on_step_begin(*at(0))
    learn(first, [2])
    assert first.learner.temperature.at(3) < 1  # the update is step 2's, not that of the step after it
    assert {selector.temperature for selector in first.learner.selectors.values()} == {1.0}
    second = Controller(other, given, batches=first_batches)
    second.load_tensors({name: value.clone() for name, value in first.tensors().items()})
    for controller in (first, second):
        learn(controller, [3])
        controller.on_step_begin(*at(4))
        assert controller.learner is None
    for a, b in zip(first.layers, second.layers, strict=True):
        assert torch.equal(a.srde_experts["default"].index, b.srde_experts["default"].index)
    saved = first.tensors()
    assert set(saved) == {f"importance.{name}" for name in model.srde.layers}
    assert all(torch.equal(saved[name], value) for name, value in second.tensors().items())
    third = Controller(adapted(), given, batches=first_batches)
    third.load_tensors(saved)
    assert third.learner is None  # the masks are in the adapter, and are not learned anew
    assert (
        all(torch.equal(saved[name], value) for name, value in third.tensors().items())
        and len(third.tensors()) == 2
    )


def test_what_a_phase_does_not_train_has_no_gradient_left():
    model = adapted(filled=True, modules_to_save=["lm_head"])
    controller = Controller(model, settings(), batches=first_batches)

    def left(step, locked=(), frozen=()):
        controller.on_step_begin(*at(step))
        for layer in controller.layers:
            layer.srde_router["default"].locked, layer.srde_router["default"].frozen = locked, frozen
        backward(model, 0)
        controller.drop_inactive_gradients()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert left(0) == {} and left(3) == {}
    assert {"router" in name for name in left(7)} == {False} and any("lm_head" in name for name in left(7))
    grads = left(9, locked=(1,), frozen=(2,))
    for name, grad in grads.items():
        if "router" in name:
            assert grad.abs().amax(1)[[1, 2]].max() == 0 < grad.abs().amax(1)[[0, 3]].min()
        elif "values" in name:
            size = grad.abs().amax((0, 2, 3))
            assert size[[1, 2]].max() == 0 < size[[0, 3]].min()


def test_experts_are_opened_in_the_first_third_of_what_routes():
    assert unlock_span(plan_phases(10000)) == (600, 600 + 9400 // 3)
    assert unlock_span(plan_phases(10000, pretraining=None)) == (1100, 1100 + 8900 // 3)
    only = plan_phases(100, warm_up=0, learn_masks=False, pretraining=100)
    assert unlock_span(only) == (100, 101)
