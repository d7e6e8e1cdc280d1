"""The tuner on whole models: which MLPs it takes, zero deltas, several adapters, folding, taking out."""

import copy
import re

import pytest
import torch
from adapters import LAYERS, adapted, config, fill, tensors, tokens, trainable
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from srde.core import count_rewritten
from srde.errors import ConfigError, UnsupportedModelError
from tiny import GATED, MODELS, tiny

GRANULARITIES = ["neuron", "element"]
HIDDEN, INTERMEDIATE, NUM_LAYERS = 32, 48, 2


# ---- counts and places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"null_expert": True, "num_shared_experts": 2, "num_experts": 5},
        {"layers_to_transform": 1, "sparsity": 0.2},
    ],
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt"])
def test_the_number_of_trained_parameters_is_exact(model_type, granularity, fields, capsys):
    settings = config(granularity=granularity, **fields)
    base = tiny(model_type)
    total = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, settings)

    matrices = 3 if model_type in GATED else 2
    share = settings.current_sparsity
    rewritten = count_rewritten(share, INTERMEDIATE) * HIDDEN
    if granularity == "element":
        rewritten = count_rewritten(share, INTERMEDIATE * HIDDEN)
    router = (settings.num_experts + settings.null_expert) * HIDDEN
    layers = 1 if "layers_to_transform" in fields else NUM_LAYERS
    want = layers * (matrices * settings.experts_in_all * rewritten + router)

    assert model.get_nb_trainable_parameters() == (want, total + want)
    model.print_trainable_parameters()
    line = f"trainable params: {want:,d} || all params: {total + want:,d} || trainable%: {100 * want / (total + want):.4f}\n"
    assert capsys.readouterr().out == line


def test_counts_are_right_without_weights():
    with torch.device("meta"):
        model = get_peft_model(tiny(), config())
        assert model(tokens().to("meta")).logits.shape == (2, 7, 64)
    want = adapted().get_nb_trainable_parameters()
    assert model.get_nb_trainable_parameters() == want


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, LAYERS),
        ({"layers_to_transform": 0}, LAYERS[:1]),
        ({"layers_to_transform": [1, 0]}, LAYERS),
        ({"target_modules": ["layers.1.mlp"]}, LAYERS[1:]),
        ({"target_modules": ["mlp"]}, LAYERS),
        ({"target_modules": r".*\.0\.mlp"}, LAYERS[:1]),
        ({"target_modules": ["mlp"], "layers_to_transform": [1]}, LAYERS[1:]),
    ],
)
def test_the_mlps_can_be_named(fields, want):
    assert list(adapted(**fields).srde.layers) == want


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layers_to_transform": 7},
            "layers_to_transform=7: layer 7 has no MLP; the model has them in layers 0 to 1.",
        ),
        (
            {"layers_to_transform": [0, 3, 2]},
            "layers_to_transform=[0, 3, 2]: layer 2 has no MLP; the model has them in layers 0 to 1. "
            "name layers that exist, or leave it out for all.",
        ),
        (
            {"target_modules": ["q_proj"]},
            "target_modules=['q_proj']: no MLP matches; the model has model.layers.0.mlp, model.layers.1.mlp. "
            "use names, name endings or a regular expression of these, or leave it out for all.",
        ),
        (
            {"target_modules": ["mlp"] * 2 + ["p"], "layers_to_transform": 5},
            "layers_to_transform=5: layer 5 has no MLP",
        ),
    ],
)
def test_places_that_do_not_exist_are_named(fields, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        get_peft_model(tiny(), config(**fields))


def test_a_model_without_mlps_is_told_what_was_looked_at():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x):
            return self.down(self.up(x) + self.gate(x))

    message = (
        "model='Sequential': no MLP of this model can carry experts: one or two D -> F matrices, an activation and one "
        "F -> D matrix are needed. Looked at:\n"
    )
    looked = "  {0}: Odd: up 8->24, gate 8->24, down 24->8; its forward is not act(x W) W'"
    with pytest.raises(UnsupportedModelError) as error:
        get_peft_model(nn.Sequential(Odd(), Odd()), config(task_type=None))
    assert str(error.value) == message + looked.format(0) + "\n" + looked.format(1)
    with pytest.raises(UnsupportedModelError) as error:
        get_peft_model(nn.Sequential(*[Odd() for _ in range(7)]), config(task_type=None))
    assert str(error.value).endswith(looked.format(4) + "\n  and 2 more")
    with pytest.raises(UnsupportedModelError) as error:
        get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(8, 8))), config(task_type=None))
    assert str(error.value) == message + "  no module whose linear children fit together, among: Sequential"


@pytest.mark.parametrize("text", ["mistral", "ministral3"])
def test_of_several_modalities_only_the_text_decoder_gets_experts(text):
    vision = {"model_type": "pixtral", "image_size": 16, "patch_size": 8, "head_dim": 8}
    vision |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    parts = {"text_config": {"model_type": text, **MODELS[text]}, "vision_config": vision}
    base = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("mistral3", image_token_index=5, **parts)
    ).eval()
    before = base(input_ids=tokens()).logits
    model = get_peft_model(base, config())
    assert list(model.srde.layers) == [f"model.language_model.layers.{n}.mlp" for n in range(2)]
    assert torch.equal(model(input_ids=tokens()).logits, before)
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[0, :3] = 0
    with fill(model).srde.record() as record:
        assert not torch.equal(model(input_ids=tokens(), attention_mask=padding).logits, before)
    assert {len(slot_TK) for slot_TK, _ in record.layers().values()} == {11}


# ---- zero deltas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("model_type", MODELS)
def test_zero_deltas_leave_every_bit_and_others_do_not(model_type, granularity, dtype):
    base = tiny(model_type).to(dtype).eval()
    calls = [{}, {"logits_to_keep": 1}, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}]
    if model_type in {"opt", "gpt2"}:
        calls[1] = {"use_cache": False}
    want = [base(tokens(), **call).logits for call in calls]
    weights = tensors(base)

    model = get_peft_model(base, config(granularity=granularity, num_shared_experts=1)).eval()
    for path in (None, "masked", "grouped"):
        model.srde.path = path
        for call, logits in zip(calls, want, strict=True):
            assert torch.equal(model(tokens(), **call).logits, logits)
            with torch.no_grad():
                assert torch.equal(model(tokens(), **call).logits, logits)
    model.srde.path = None

    changed = fill(model)(tokens()).logits
    assert (changed - want[0]).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, want[0])
    assert torch.equal(model(tokens()).logits, changed)
    plain = model.unload()
    assert torch.equal(plain(tokens()).logits, want[0]) and not hasattr(plain, "srde")
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "phi3"])
def test_in_training_dropouts_draw_the_same_numbers(model_type):
    base = tiny(model_type).train()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3

    def run(model):
        torch.manual_seed(3)
        return model(tokens()).logits

    want = run(base)
    assert not torch.equal(base(tokens()).logits, want)
    assert torch.equal(run(get_peft_model(base, config()).train()), want)


def test_without_its_head_a_model_works_too():
    base = tiny().model.eval()
    want = base(tokens()).last_hidden_state
    model = get_peft_model(base, config(task_type=None)).eval()
    assert torch.equal(model(tokens()).last_hidden_state, want)
    assert not torch.equal(fill(model)(tokens()).last_hidden_state, want)


# ---- several adapters --------------------------------------------------------------------------------------------------


@pytest.fixture
def two():
    """Adapters `default` and `other` with different settings, on different layers; `default` is active."""
    model = adapted(layers_to_transform=[0, 1])
    model.add_adapter("other", config(num_experts=3, top_k=1, granularity="element", layers_to_transform=1))
    return fill(model, seed=2)


def test_adapters_side_by_side_do_not_touch_each_other(two):
    assert {n: sorted(layer.srde_experts) for n, layer in two.srde.layers.items()} == {
        LAYERS[0]: ["default"],
        LAYERS[1]: ["default", "other"],
    }
    assert len(trainable(two)) == 4 and all(".default." in name for name in trainable(two))
    first = two(tokens()).logits
    two.set_adapter("other")
    second = two(tokens()).logits
    assert not torch.equal(first, second)
    assert {n.split(".srde_")[0][-5] for n in trainable(two)} == {"1"} and all(
        ".other." in n for n in trainable(two)
    )
    two.delete_adapter("default")
    assert torch.equal(two(tokens()).logits, second) and list(two.peft_config) == ["other"]
    assert not any(".default." in name for name in two.state_dict())
    two.add_adapter("default", config(layers_to_transform=[0]))
    two.set_adapter("default")
    assert torch.equal(two(tokens()).logits, tiny().eval()(tokens()).logits)


def test_two_active_adapters_add_up(two):
    two.double()
    two.base_model.set_adapter(["default", "other"])
    assert len(trainable(two)) == 6
    with two.srde.force_experts(2), two.srde.record() as record:
        both = two(tokens()).logits
    assert record.layers("default").keys() == set(LAYERS) and record.layers("other").keys() == {LAYERS[1]}
    merged = copy.deepcopy(two).merge_and_unload(expert=2)
    torch.testing.assert_close(merged(tokens()).logits, both, atol=1e-10, rtol=0)
    only = two.merge_and_unload(expert=2, adapter_names=["other"])
    assert not torch.allclose(only(tokens()).logits, both)


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute"
)  # PEFT's, for any second adapter
def test_disabling_and_enabling_in_transformers_own_way():
    model = tiny().eval()
    want = model(tokens()).logits
    model.add_adapter(config(), "one")
    model.add_adapter(config(num_experts=3), "two")
    assert model.active_adapters() == ["two"] and torch.equal(model(tokens()).logits, want)
    changed = fill(model)(tokens()).logits
    model.set_adapter("one")
    assert not torch.equal(model(tokens()).logits, changed)
    model.disable_adapters()
    assert torch.equal(model(tokens()).logits, want)
    model.enable_adapters()
    model.delete_adapter(["two", "one"])
    assert torch.equal(model(tokens()).logits, want)


def test_a_deep_copy_is_independent():
    model = adapted()
    want = model(tokens()).logits
    twin = copy.deepcopy(model)
    assert twin.srde is not model.srde and torch.equal(twin(tokens()).logits, want)
    with twin.srde.force_experts(1), twin.srde.record() as record:
        assert torch.equal(model(tokens()).logits, want) and not record.calls
        assert not torch.equal(twin(tokens()).logits, want) and len(record.calls) == 1
    fill(twin, seed=9)
    twin.srde.lock([0])
    assert torch.equal(model(tokens()).logits, want)
    twin.unload()
    assert torch.equal(model(tokens()).logits, want)
