"""Masks by gradient: the neurons or entries that the loss would most like to change, against plain autograd."""

import pytest
import torch
from adapters import LAYERS, adapted, config, tokens, trainable
from peft import get_peft_model

from srde import calibrate_masks
from srde.errors import UsageError
from srde.tuner.weights import dense_weights
from tiny import tiny

KINDS = ["llama", "gpt2", "phi3", "opt"]


def batches():
    """Two batches; the second has padding, which has no label."""
    ids, mask = tokens(3, 9, seed=5), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    return [
        {"input_ids": tokens(), "labels": tokens()},
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)},
    ]


def saliency(model_type, granularity):
    """Squared gradients of the loss by the base's own weights, summed over batches: per neuron [F], or per entry."""
    base = tiny(model_type).eval()
    layers = get_peft_model(tiny(model_type), config()).srde.layers
    total = {}
    for batch in batches():
        base.zero_grad()
        base(**batch).loss.backward()
        for name, layer in layers.items():
            block, layout = base.get_submodule(name), layer.layout
            for child in (*layout.ups, layout.down):
                weight = getattr(block, child).weight
                weight.data = weight.grad.square()
            matrices = [m.clone() for m in dense_weights(block, layout)]
            total[name] = [a + b for a, b in zip(total.get(name, [0] * 3), matrices, strict=False)]
        base.load_state_dict(tiny(model_type).state_dict())
    if granularity == "element":
        return {name: [m.flatten() for m in matrices] for name, matrices in total.items()}
    return {name: [sum(m.sum(1) for m in ups) + down.sum(0)] for name, (*ups, down) in total.items()}


@pytest.mark.parametrize("granularity", ["neuron", "element"])
@pytest.mark.parametrize("model_type", KINDS)
def test_the_masks_are_where_autograd_says_the_loss_moves_most(model_type, granularity):
    model = get_peft_model(tiny(model_type), config(granularity=granularity, mask_init="gradient"))
    assert all((layer.srde_experts["default"].index == -1).all() for layer in model.srde.layers.values())
    calibrate_masks(model, batches())
    for name, scores in saliency(model_type, granularity).items():
        index = model.srde.layers[name].srde_experts["default"].index
        for score, chosen_EN in zip(scores, index if granularity == "element" else [index], strict=True):
            best = score.sort(descending=True).values[: chosen_EN.numel()]
            torch.testing.assert_close(score[chosen_EN.flatten().long()].sort(descending=True).values, best)
            sums = score[chosen_EN.long()].sum(
                1
            )  # dealt out like cards: all experts are worth about the same
            assert sums.max() < 3 * sums.min()


def test_planted_neurons_are_found():
    base = tiny()
    planted = {LAYERS[0]: [3, 11, 17, 40], LAYERS[1]: [0, 8, 9, 47]}
    for name, neurons in planted.items():
        base.get_submodule(name).down_proj.weight.data[:, neurons] *= 30  # what these neurons say counts more
    model = get_peft_model(base, config(num_experts=2, mask_init="gradient"))
    calibrate_masks(model, batches())
    found = {name: layer.srde_experts["default"].index for name, layer in model.srde.layers.items()}
    assert {name: sorted(index.flatten().tolist()) for name, index in found.items()} == planted


def test_calibrating_leaves_nothing_behind():
    base = tiny()
    want = base.eval()(tokens()).logits
    model = get_peft_model(base, config(mask_init="gradient", modules_to_save=["lm_head"])).train()
    head = next(p for name, p in trainable(model).items() if "lm_head" in name)
    head.grad = torch.full_like(head, 7.0)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in trainable(model).items() if p is head
    }
    calibrate_masks(model, batches())
    assert model.training and (head.grad == 7).all()
    assert all(p.grad is None for p in model.parameters() if p is not head)
    hooks = ("_forward_hooks", "_backward_hooks", "_forward_pre_hooks")
    for layer in model.srde.layers.values():
        assert not layer.disable_adapters
        assert not any(getattr(module, kind) for module in layer.modules() for kind in hooks)
    assert torch.equal(model.eval()(tokens()).logits, want)
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert sum(p.grad.abs().sum() for name, p in trainable(model).items() if "values" in name) > 0


def test_any_adapter_can_be_calibrated_before_it_is_trained():
    model = adapted()
    before = model(tokens()).logits
    model.add_adapter("other", config())
    magnitude = model.srde.layers[LAYERS[0]].srde_experts["other"].index.clone()
    calibrate_masks(model, batches(), adapter="other")
    assert not torch.equal(model.srde.layers[LAYERS[0]].srde_experts["other"].index, magnitude)
    assert torch.equal(model(tokens()).logits, before)


def test_what_cannot_be_calibrated_is_refused():
    message = "^adapter='default': its deltas are not zero any more, and new masks would move them elsewhere. calibrate"
    with pytest.raises(UsageError, match=message):
        calibrate_masks(adapted(), batches())
    model = get_peft_model(tiny(), config(mask_init="gradient"))
    with pytest.raises(
        UsageError, match=r"^batches='none': choosing masks by gradient needs at least one batch. pass some"
    ):
        calibrate_masks(model, [])
    with pytest.raises(
        UsageError, match=r"^adapter='math': the model has no such srde adapter; it has default. name one"
    ):
        calibrate_masks(model, batches(), adapter="math")
    with pytest.raises(UsageError, match="has seen none yet"):
        model(tokens())
