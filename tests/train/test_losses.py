"""The losses in a trainer: what they add, how accumulation and padding leave them, and what would drop them."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from srde import SrdeConfig
from srde.core import load_balancing_loss, orthogonality_loss, router_z_loss, sparsity_loss
from srde.errors import UsageError
from srde.train.losses import NAMES, SrdeLossMixin, keep_float32
from srde.train.supervision import Supervision
from srde.train.trainer import SrdeTrainer
from tiny import VOCABULARY, tiny, tiny_tokenizer

COEFS = {
    "router_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.2,
    "orthogonality_loss_coef": 0.5,
    "sparsity_loss_coef": 0.7,
}


def adapted(**settings):
    torch.manual_seed(0)
    model = get_peft_model(tiny(), SrdeConfig(num_experts=4, target_sparsity=0.05, **(COEFS | settings)))
    for layer in model.srde.layers.values():
        delta = layer.srde_experts["default"]
        torch.nn.init.normal_(delta.values, std=0.1)
        delta.index.copy_(
            delta.index[:1].expand_as(delta.index)
        )  # overlapping masks, so that every loss is at work
    return model


def rows(count, length=8):
    ids = torch.randint(0, 60, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": i, "labels": i.clone(), "attention_mask": torch.ones_like(i)} for i in ids]


def trainer(model, tmp_path, cls=SrdeTrainer, data=None, **args):
    args = {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.1, "optim": "sgd", **args}
    args = {
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        **args,
    }
    return cls(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **args),
        train_dataset=data or rows(4),
    )


def test_the_loss_is_the_trainers_own_plus_the_weighted_four(tmp_path):
    model = adapted()
    batch = {k: torch.stack([r[k] for r in rows(3)]) for k in rows(1)[0]}
    total = trainer(model, tmp_path).compute_loss(model.train(), dict(batch))
    with model.srde.record() as record:
        want = model(**batch).loss
    routes = list(record.calls[0].routes.values())
    deltas = [layer.srde_experts["default"] for layer in model.srde.layers.values()]
    for name, values in {
        "router_aux_loss": [load_balancing_loss(r, 4) for r in routes],
        "router_z_loss": [router_z_loss(r) for r in routes],
        "orthogonality_loss": [orthogonality_loss(d) for d in deltas],
        "sparsity_loss": [sparsity_loss(d) for d in deltas],
    }.items():
        assert all(v > 0 for v in values)
        want = want + COEFS[f"{name}_coef"] * sum(values) / len(values)
    torch.testing.assert_close(total, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_zero_switches_a_loss_off(name, tmp_path):
    model = adapted(**{f"{name}_coef": 0.0})
    own = trainer(model, tmp_path)
    own.compute_loss(model.train(), {k: torch.stack([r[k] for r in rows(2)]) for k in rows(1)[0]})
    assert set(own.means.drain()) == set(NAMES) - {name}


def test_accumulation_changes_only_rounding(tmp_path):
    """The balance loss is no mean over tokens, so it is left out; the other three must add up to the same step."""
    states = []
    for args in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ):
        model = adapted(router_aux_loss_coef=0.0)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        trainer(model, tmp_path, seed=3, **args).train()
        states.append({n: p.detach() - before[n] for n, p in model.named_parameters() if p.requires_grad})
    for name, change in states[0].items():
        assert change.abs().max() > 0
        torch.testing.assert_close(states[1][name], change, atol=1e-6, rtol=1e-4)


def test_padding_changes_no_loss(tmp_path):
    model = adapted()
    own = trainer(model, tmp_path)
    batch = {k: torch.stack([r[k] for r in rows(2)]) for k in rows(1)[0]}
    fill = {"input_ids": 7, "labels": -100, "attention_mask": 0}
    padded = {k: torch.nn.functional.pad(v, (0, 5), value=fill[k]) for k, v in batch.items()}
    torch.testing.assert_close(own.compute_loss(model.train(), padded), own.compute_loss(model, batch))


def test_every_loss_is_logged_under_its_name(tmp_path):
    own = trainer(adapted(), tmp_path, max_steps=2, logging_steps=1)
    own.train()
    assert set(NAMES) <= set(own.state.log_history[0])


def test_reentrant_checkpointing_is_refused_and_the_other_kind_trains_the_routers(tmp_path):
    settings = {"activation_checkpointing": True, "max_steps": 1}
    with pytest.raises(UsageError, match=r"activation_checkpointing_kwargs=.*'use_reentrant': False"):
        trainer(
            adapted(), tmp_path, activation_checkpointing_kwargs={"use_reentrant": True}, **settings
        ).train()
    changes = []
    for kwargs in ({}, {"activation_checkpointing_kwargs": {"use_reentrant": False}, **settings}):
        model = adapted()
        before = [
            r.weight.detach().clone() for layer in model.srde.layers.values() for r in layer.active_routers()
        ]
        trainer(model, tmp_path, seed=3, **kwargs).train()
        after = [r.weight.detach() for layer in model.srde.layers.values() for r in layer.active_routers()]
        changes.append([a - b for a, b in zip(after, before, strict=True)])
    for plain, checkpointed in zip(*changes, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


def test_a_model_without_experts_trains_as_ever(tmp_path):
    torch.manual_seed(0)
    model = tiny()
    batch = {k: torch.stack([r[k] for r in rows(2)]) for k in rows(1)[0]}
    own = trainer(model, tmp_path).compute_loss(model.train(), dict(batch))
    assert torch.equal(own, trainer(model, tmp_path, cls=Trainer).compute_loss(model, dict(batch)))


def test_what_another_trainer_rounded_is_float32_again():
    model = adapted()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    keep_float32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_mixin_brings_the_losses_into_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class SrdeSFTTrainer(SrdeLossMixin, trl.SFTTrainer): ...

    data = Dataset.from_list([{"prompt": "what is 1", "completion": " the answer is 2"}] * 4)
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, max_length=32, bf16=False,
    )  # fmt: skip
    model = get_peft_model(tiny(vocab_size=VOCABULARY), SrdeConfig(**COEFS))
    own = SrdeSFTTrainer(model, args, train_dataset=data, processing_class=tiny_tokenizer())
    own.train()
    logged = own.state.log_history[0]
    assert logged["router_z_loss"] > 0 and logged["router_aux_loss"] > 0


def supervised(tmp_path, steps, **settings):
    """Rows of domains 0, 1 and 5 for four experts: domain 5 belongs to expert 1."""
    model = adapted(**dict.fromkeys(COEFS, 0.0) | settings)
    data = rows(6)
    for row, domain in zip(data, (0, 1, 5, 0, 1, 5), strict=True):
        row["domain_ids"] = torch.full_like(row["input_ids"], domain)
    own = trainer(model, tmp_path, data=data, max_steps=3, optim="adamw_torch", remove_unused_columns=False)
    own.supervision = Supervision(steps, 4)
    return model, own


def test_supervision_trains_only_the_experts_of_the_domains_at_hand(tmp_path):
    model, own = supervised(tmp_path, steps=3)
    deltas = [layer.srde_experts["default"] for layer in model.srde.layers.values()]
    before = [delta.values.detach().clone() for delta in deltas]
    own.train()
    for delta, old in zip(deltas, before, strict=True):
        moved = (delta.values.detach() != old).flatten(2).any(-1).any(0)
        assert moved.tolist() == [True, True, False, False]


def test_after_supervision_tokens_are_routed(tmp_path):
    model, own = supervised(tmp_path, steps=0)
    delta = next(iter(model.srde.layers.values())).srde_experts["default"]
    before = delta.values.detach().clone()
    own.train()
    assert (delta.values.detach() != before).flatten(2).any(-1).any(0).count_nonzero() > 2


def test_supervision_teaches_the_routers_whose_tokens_are_whose(tmp_path):
    model, own = supervised(tmp_path, steps=60)
    own.args.max_steps = 60

    def right():
        with model.srde.record() as record, torch.no_grad():
            for row in own.train_dataset[:3]:
                model(input_ids=row["input_ids"][None])
        best = torch.stack([slots.view(3, 8, 2)[:, :, 0] for slots, _ in record.layers().values()])
        return (best == torch.tensor([0, 1, 1]).view(1, 3, 1)).float().mean()

    before = right()
    own.train()
    assert before < 0.5 and right() > 0.75


def test_evaluation_takes_the_domains_off_the_batch(tmp_path):
    model, own = supervised(tmp_path, steps=3)
    batch = {k: torch.stack([r[k] for r in own.train_dataset]) for k in own.train_dataset[0]}
    plain = {k: v for k, v in batch.items() if k != "domain_ids"}
    assert torch.equal(own.compute_loss(model.eval(), batch), own.compute_loss(model, plain))
