"""Folding: one expert or a fixed mixture becomes the base's own weights; everything else is refused with the reason."""

import re

import pytest
import torch
from adapters import LAYERS, adapted, config, fill, tensors, tokens
from peft import get_peft_model

from srde.core import Route
from srde.errors import ConfigError, UsageError
from tiny import tiny

KINDS = ["llama", "gpt2", "phi3", "opt", "gpt_neox"]
GRANULARITIES = ["neuron", "element"]


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model_type", KINDS)
def test_a_folded_expert_is_the_forced_one(model_type, granularity, dtype, close):
    model = adapted(model_type, dtype=dtype, granularity=granularity, num_shared_experts=1, null_expert=True)
    model.srde.path = "grouped"
    with model.srde.force_experts(2):
        want = model(tokens()).logits
    assert (model(tokens()).logits - want).abs().max() > 1e-3
    merged = model.merge_and_unload(expert=2)
    assert type(merged) is type(tiny(model_type)) and not hasattr(merged, "srde")
    assert not any("srde" in name or "base_layer" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(tokens()).logits, want, atol=close, rtol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model_type", KINDS)
def test_a_folded_mixture_is_the_model_with_these_gates_for_every_token(model_type, granularity, monkeypatch):
    model = adapted(model_type, dtype=torch.float64, granularity=granularity, num_shared_experts=1)
    gates = [0.5, 0.0, -0.25, 2.0]
    for layer in model.srde.layers.values():
        router = layer.srde_router["default"]

        def fixed(x_TD, forced_T, router=router):
            share_TK = torch.tensor(gates, dtype=x_TD.dtype).expand(len(x_TD), -1)
            slot_TK = torch.arange(4).expand(len(x_TD), -1)
            return Route(router._logits(x_TD), slot_TK, share_TK, num_routed=4, num_shared=1)

        monkeypatch.setattr(router, "forward", fixed)
    want = model(tokens()).logits
    merged = model.merge_and_unload(weights=gates, safe_merge=True)
    torch.testing.assert_close(merged(tokens()).logits, want, atol=1e-10, rtol=0)


def test_folding_changes_the_rewritten_neurons_and_nothing_else():
    model = adapted()
    before = tensors(tiny())
    rows = {name: layer.srde_experts["default"].index[3] for name, layer in model.srde.layers.items()}
    after = model.merge_and_unload(expert=3).state_dict()
    for name, tensor in before.items():
        layer, _, matrix = name.removesuffix(".weight").rpartition(".")
        if layer not in rows:
            assert torch.equal(after[name], tensor)
            continue
        changed = (after[name] != tensor).any(dim=0 if matrix == "down_proj" else 1)
        assert changed.nonzero().flatten().tolist() == rows[layer].tolist()


def test_folding_into_bfloat16_rounds_once():
    model = adapted(dtype=torch.bfloat16)
    delta = model.srde.layers[LAYERS[0]].srde_experts["default"].dense(torch.tensor([0, 1.0, 0, 0]))[0]
    want = (tiny().bfloat16().model.layers[0].mlp.gate_proj.weight.float() + delta).bfloat16()
    merged = model.merge_and_unload(expert=1)
    assert torch.equal(merged.model.layers[0].mlp.gate_proj.weight, want)


REFUSED = (
    "merge: srde experts are chosen per token, so there is no one weight that equals the adapter. "
    "Fold one expert with merge_and_unload(expert=i), a fixed mixture with merge_and_unload(weights=[...]), "
    "or keep the adapter and get the base back with unload()."
)


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True, adapter_names=["default"]),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.merge_adapter(["default"]),
        lambda model: model.srde.layers[LAYERS[0]].merge(),
    ],
)
def test_a_plain_merge_is_refused_with_the_reason(merge):
    model = adapted()
    want = model(tokens()).logits
    with pytest.raises(UsageError, match="^" + re.escape(REFUSED) + "$"):
        merge(model)
    assert torch.equal(model(tokens()).logits, want)


ROUTED = "routed experts are numbered 0 to 3. name an expert that the adapter has."
MIXTURE = "a mixture has one finite gate for each of the 4 routed experts. use 0 for experts to leave out."


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"expert": 4}, ConfigError, f"expert=4: {ROUTED}"),
        ({"expert": -1}, ConfigError, f"expert=-1: {ROUTED}"),
        ({"expert": "math"}, ConfigError, f"expert='math': {ROUTED}"),
        ({"weights": [1, 0, 0]}, ConfigError, f"weights=[1, 0, 0]: {MIXTURE}"),
        ({"weights": [1, 0, 0, float("nan")]}, ConfigError, f"weights=[1, 0, 0, nan]: {MIXTURE}"),
        (
            {"expert": 1, "weights": [1, 0, 0, 0]},
            UsageError,
            "expert and weights=(1, [1, 0, 0, 0]): they exclude each other. give one of them.",
        ),
    ],
)
def test_what_cannot_be_folded_is_named(arguments, error, message):
    model = adapted(num_shared_experts=1)
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        model.merge_and_unload(**arguments)
    assert model.srde.layers


def test_a_safe_merge_folds_only_finite_numbers():
    model = adapted()
    model.srde.layers[LAYERS[1]].srde_experts["default"].values.data[1, 2] = float("inf")
    message = (
        "merged weight of model.layers.1.mlp.up_proj='not finite': safe_merge=True folds only finite numbers. "
        "find out where training diverged, and use an earlier checkpoint."
    )
    with pytest.raises(UsageError, match="^" + re.escape(message) + "$"):
        model.merge_and_unload(expert=2, safe_merge=True)


def test_a_safe_merge_of_finite_numbers_is_the_merge():
    plain, safe = (adapted().merge_and_unload(expert=0, safe_merge=safe) for safe in (False, True))
    assert all(torch.equal(t, safe.state_dict()[n]) for n, t in plain.state_dict().items())


def test_a_folded_base_can_be_adapted_again():
    merged = adapted().merge_and_unload(expert=1).eval()
    want = merged(tokens()).logits
    model = get_peft_model(merged, config()).eval()
    assert torch.equal(model(tokens()).logits, want) and not torch.equal(fill(model)(tokens()).logits, want)
