"""Who may speak: names, numbers, several, mixtures, the base; and what is refused."""

import pytest
import torch
from adapters import adapted

from srde.errors import ConfigError, UsageError
from srde.infer.route import routed
from tiny import tiny

IDS = torch.arange(6, 26).view(1, 20)


def gates(model, *route):
    with torch.no_grad(), routed(model, *route), model.srde.record() as record:
        model(IDS)
    return {name: gate_TE for name, (_, gate_TE) in record.layers().items()} if record.calls else None


def used(model, *route):
    return {e for gate_TE in gates(model, *route).values() for e in gate_TE.nonzero()[:, 1].tolist()}


@pytest.mark.parametrize(
    ("route", "experts"),
    [
        ((), {0, 1, 2, 3}), (("auto",), {0, 1, 2, 3}), (("code",), {1}), (("3",), {3}), ((None, 2), {2}),
        (("math",), {0, 2}), (("math,logic",), {0, 2, 3}), (("code,logic",), {1, 3}), (("1,1",), {1}),
    ],
    ids=str,
)  # fmt: skip
def test_a_route_lets_exactly_its_experts_speak(named, route, experts):
    assert used(named[0], *route) == experts


def test_several_experts_of_one_name_are_still_chosen_by_the_routers(named):
    for gate_TE in gates(named[0], "math").values():
        assert len({tuple(row) for row in gate_TE.tolist()}) > 5


def test_off_is_the_base_and_nothing_stays_switched(named):
    model, _ = named
    assert gates(model, "off") is None
    with torch.no_grad():
        with routed(model, "off"):
            off = model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, off)
        assert not torch.equal(model(IDS).logits, off)


def test_a_mixture_has_the_gates_that_were_written(named):
    for gate_TE in gates(named[0], "code=0.7, logic=0.3").values():
        assert torch.equal(gate_TE, torch.tensor([0, 0.7, 0, 0.3]).expand(20, 4))
    for gate_TE in gates(named[0], "math=0.5").values():  # a name's share is split among its experts
        assert torch.equal(gate_TE, torch.tensor([0.25, 0, 0.25, 0]).expand(20, 4))
    assert named[0].peft_config["default"].mixture("0=1,3=-0.5") == [1, 0, 0, -0.5]


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (("maths",), "expert='maths': the adapter's experts are numbered 0 to 3, named math, code, logic"),
        (("7",), "expert='7': the adapter's experts are numbered 0 to 3"),
        (("code,",), "expert='': the adapter's experts are numbered"),
        ((None, 4), "expert=4: the adapter's experts are numbered 0 to 3"),
        ((None, -1), "expert=-1: the adapter's experts are numbered 0 to 3"),
        (("code", 1), "route and expert=('code', 1): they exclude each other"),
        (("math=1,0=1",), "an entry is an expert that no other entry names, '=' and a number; '0=1' is none"),
        (("code=much",), "'code=much' is none"),
        (("code=inf",), "'code=inf' is none"),
        (("code=1,code=1",), "'code=1' is none"),
        (("code=1,logic",), "mixture='code=1,logic': an entry is"),
        (("=1",), "expert='': the adapter's experts are numbered"),
    ],
)
def test_what_cannot_be_meant_is_refused(named, route, message):
    with pytest.raises(ConfigError) as error, routed(named[0], *route):
        pass
    assert message in str(error.value)


def test_disabled_experts_are_no_route_but_can_be_forced():
    model = adapted(disabled_experts=[1], expert_names=["math", "code", "math", "logic"])
    with pytest.raises(ConfigError, match="all of its experts are disabled"), routed(model, "code"):
        pass
    assert used(model, None, "code") == {1} == used(model, None, 1)
    assert used(model, "math,code") == {0, 2}


def test_names_of_an_adapter_without_names(named):
    with pytest.raises(
        ConfigError,
        match=r"0 to 3 and have no names\. pass a number, or give them names with `srde experts name`",
    ):
        with routed(adapted(), "math"):
            pass


def test_a_plain_model_can_only_be_left_as_it_is():
    model = tiny()
    with routed(model), routed(model, "auto"):
        pass
    with pytest.raises(UsageError, match="the model has no srde adapter to route"):
        with routed(model, "off"):
            pass
