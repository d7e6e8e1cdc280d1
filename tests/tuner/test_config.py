import re

import pytest
from peft import PeftConfig, PeftType

from srde import SrdeConfig
from srde.errors import ConfigError
from srde.tuner.config import config_fields


def test_the_defaults_are_those_of_the_founding_notes():
    config = SrdeConfig()
    assert (config.num_experts, config.top_k) == (8, 2)
    assert (config.initial_sparsity, config.target_sparsity) == (0.05, 0.01)
    assert (config.granularity, config.mask_init) == ("neuron", "magnitude")
    assert (config.null_expert, config.num_shared_experts, config.layers_to_transform) == (False, 0, None)
    coefs = {name: getattr(config, name) for name in config_fields() if name.endswith("_coef")}
    assert coefs == {
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.001,
        "orthogonality_loss_coef": 0.001,
        "sparsity_loss_coef": 0.01,
    }
    assert config.peft_type is PeftType.SRDE and config.peft_type == "SRDE"


SHARE = "a sparsity is the share of weights an expert rewrites, above 0 and at most 1. use 0.01 for 1 %."
WHOLE = "it must be a whole number of at least"
COEF = "a loss weight is a finite number of at least 0. use 0 to switch it off."
LAYER = "it must be a layer number or a list of them, counted from 0. leave it out for all layers."
BAD = [
    (
        {"top_k": 9},
        "top_k=9: a token can use at most num_experts=8 experts. "
        "set top_k to 8 or fewer, or raise num_experts.",
    ),
    ({"num_experts": 1}, "top_k=2: a token can use at most num_experts=1 experts."),
    ({"num_experts": 0}, f"num_experts=0: {WHOLE} 1. use 1 or more."),
    ({"num_experts": 4.0}, f"num_experts=4.0: {WHOLE} 1."),
    ({"top_k": 0}, f"top_k=0: {WHOLE} 1."),
    ({"top_k": True}, f"top_k=True: {WHOLE} 1."),
    ({"num_shared_experts": -1}, f"num_shared_experts=-1: {WHOLE} 0. use 0 or more."),
    ({"mask_seed": -3}, f"mask_seed=-3: {WHOLE} 0."),
    ({"target_sparsity": 0}, f"target_sparsity=0: {SHARE}"),
    ({"target_sparsity": 0.0}, f"target_sparsity=0.0: {SHARE}"),
    ({"initial_sparsity": 1.01}, f"initial_sparsity=1.01: {SHARE}"),
    ({"initial_sparsity": -0.1}, f"initial_sparsity=-0.1: {SHARE}"),
    ({"target_sparsity": "1%"}, f"target_sparsity='1%': {SHARE}"),
    ({"initial_sparsity": float("nan")}, f"initial_sparsity=nan: {SHARE}"),
    ({"sparsity": 2}, f"sparsity=2: {SHARE}"),
    (
        {"target_sparsity": 0.2},
        "target_sparsity=0.2: training prunes, so the target cannot lie above initial_sparsity=0.05. "
        "raise initial_sparsity to at least the target, or lower the target.",
    ),
    ({"router_aux_loss_coef": -0.1}, f"router_aux_loss_coef=-0.1: {COEF}"),
    ({"router_z_loss_coef": float("inf")}, f"router_z_loss_coef=inf: {COEF}"),
    ({"sparsity_loss_coef": None}, f"sparsity_loss_coef=None: {COEF}"),
    ({"granularity": "row"}, "granularity='row': it must be one of neuron, element. pick one of them."),
    ({"mask_init": "best"}, "mask_init='best': it must be one of random, magnitude, gradient, learned."),
    ({"layers_to_transform": []}, f"layers_to_transform=[]: {LAYER}"),
    ({"layers_to_transform": -1}, f"layers_to_transform=-1: {LAYER}"),
    ({"layers_to_transform": [0, "1"]}, f"layers_to_transform=[0, '1']: {LAYER}"),
    ({"layers_to_transform": True}, f"layers_to_transform=True: {LAYER}"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_a_bad_field_is_named_with_value_rule_and_fix(fields, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        SrdeConfig(**fields)


def test_the_edges_are_allowed():
    SrdeConfig(num_experts=1, top_k=1, initial_sparsity=1, target_sparsity=1, layers_to_transform=0)
    SrdeConfig(initial_sparsity=0.05, target_sparsity=0.05, num_experts=2, top_k=2)


def test_the_present_sparsity_is_the_target_unless_it_is_said():
    assert SrdeConfig(target_sparsity=0.02).current_sparsity == 0.02
    assert SrdeConfig(sparsity=0.03).current_sparsity == 0.03
    assert SrdeConfig(num_experts=5, num_shared_experts=2).experts_in_all == 7


def test_every_field_survives_the_file(tmp_path):
    fields = {
        "num_experts": 5,
        "top_k": 3,
        "initial_sparsity": 0.5,
        "target_sparsity": 0.25,
        "sparsity": 0.3,
        "granularity": "element",
        "mask_init": "random",
        "mask_seed": 7,
        "null_expert": True,
        "num_shared_experts": 1,
        "router_temperature": 1.5,
        "router_aux_loss_coef": 0.1,
        "router_z_loss_coef": 0.2,
        "orthogonality_loss_coef": 0.3,
        "sparsity_loss_coef": 0.4,
        "expert_names": ["math", "logic", "math", "code", "medicine"],
        "frozen_experts": [1],
        "disabled_experts": [0, 3],
        "layers_to_transform": [1, 2],
        "target_modules": ["mlp"],
        "modules_to_save": ["lm_head"],
        "base_fingerprint": [1.5, -2.0],
    }
    config = SrdeConfig(**fields)
    assert fields.keys() == config_fields().keys() - {"init_weights"}
    assert all(getattr(SrdeConfig(), name) != value for name, value in fields.items())
    config.save_pretrained(str(tmp_path))
    for read in (SrdeConfig.from_pretrained(str(tmp_path)), PeftConfig.from_pretrained(str(tmp_path))):
        assert type(read) is SrdeConfig
        assert {name: getattr(read, name) for name in fields} == fields


def test_only_the_saved_copy_says_that_the_weights_come_from_a_file(tmp_path):
    config = SrdeConfig()
    config.save_pretrained(str(tmp_path))
    assert config.init_weights
    assert not SrdeConfig.from_pretrained(str(tmp_path)).init_weights


def test_a_bad_value_in_a_file_is_refused_like_one_in_code(tmp_path):
    SrdeConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"top_k": 2', '"top_k": 20'))
    with pytest.raises(ConfigError, match="top_k=20: a token can use at most num_experts=8 experts"):
        SrdeConfig.from_pretrained(str(tmp_path))


def test_every_field_of_ours_has_help():
    assert all(len(text) > 10 and text.endswith(".") for text in config_fields().values())
