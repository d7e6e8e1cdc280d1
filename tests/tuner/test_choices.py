"""Experts chosen from outside: by name, a few of them, a fixed mixture; frozen and disabled ones."""

import pytest
import torch
from adapters import adapted
from peft import PeftModel

from srde import SrdeConfig
from srde.errors import ConfigError
from tiny import tiny

IDS = torch.arange(1, 21).view(2, 10)


def routed(**settings):
    return adapted(target_sparsity=0.1, initial_sparsity=0.1, **settings)


def chosen(model):
    with model.srde.record() as record, torch.no_grad():
        model(IDS)
    return {e for slots, _ in record.layers().values() for e in slots.flatten().tolist()}


def test_names_and_numbers_mean_experts():
    config = SrdeConfig(num_experts=4, expert_names=["math", "logic", "math", "code"])
    assert config.experts_named("math") == (0, 2) and config.experts_named("3") == (
        3,
    ) == config.experts_named(3)
    assert config.name_of(1) == "logic" and SrdeConfig().name_of(1) == "1"
    with pytest.raises(ConfigError, match=r"'mats'.*numbered 0 to 3, named math, logic, code"):
        config.experts_named("mats")
    with pytest.raises(ConfigError, match="have no names"):
        SrdeConfig().experts_named("math")
    with pytest.raises(ConfigError, match="numbered 0 to 7"):
        SrdeConfig().experts_named(8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expert_names", ["a"]),
        ("expert_names", ["a", "b", "c", ""]),
        ("expert_names", ["a", "b", "c", "3"]),
        ("frozen_experts", [4]),
        ("disabled_experts", [-1]),
        ("disabled_experts", [0, 1, 2, 3]),
        ("frozen_experts", [True]),
    ],
)
def test_what_the_configuration_refuses(field, value):
    with pytest.raises(ConfigError, match=field):
        SrdeConfig(num_experts=4, **{field: value})


def test_restricted_routers_choose_among_the_named(tmp_path):
    model = routed(disabled_experts=[1])
    assert chosen(model) <= {0, 2, 3} and len(chosen(model)) > 1
    with model.srde.restrict_experts([2, 1]):  # what is disabled stays so
        assert chosen(model) - {1, 0, 3} == {2}
        with model.srde.record() as record, torch.no_grad():
            model(IDS)
        assert all((gates[:, [0, 1, 3]] == 0).all() for _, gates in record.layers().values())
    assert chosen(model) > {2}
    with pytest.raises(ConfigError, match="numbered 0 to 3"), model.srde.restrict_experts([4]):
        pass
    with pytest.raises(ConfigError, match="at least one slot"), model.srde.restrict_experts([1]):
        pass
    assert all(
        router.locked == (1,) for layer in model.srde.layers.values() for router in layer.active_routers()
    )


def test_disabled_and_frozen_experts_survive_the_file(tmp_path):
    routed(disabled_experts=[3, 1], frozen_experts=[0]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny().eval(), tmp_path)
    for layer in model.srde.layers.values():
        assert layer.srde_router["default"].locked == (1, 3) and layer.srde_router["default"].frozen == (0,)
    assert chosen(model) <= {0, 2}


@pytest.mark.parametrize("shared", [0, 1])
def test_a_fixed_mixture_is_the_merged_model(shared):
    weights = [0.7, 0.0, 0.3, -0.2]
    model = routed(num_shared_experts=shared)
    with model.srde.force_mixture(weights), torch.no_grad():
        mixed = model(IDS).logits
        alone = model(IDS[:1, :1]).logits  # a token that stands alone takes another path
    with torch.no_grad():
        free = model(IDS).logits
    merged = model.merge_and_unload(weights=weights)
    with torch.no_grad():
        torch.testing.assert_close(mixed, merged(IDS).logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(alone, merged(IDS[:1, :1]).logits, atol=1e-4, rtol=0)
        assert (mixed - free).abs().max() > 1e-2


def test_a_mixture_must_fit():
    model = routed()
    with pytest.raises(ConfigError, match="4 routed experts"), model.srde.force_mixture([1, 2]):
        model(IDS)
