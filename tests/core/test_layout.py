"""The architectures of the issue, as tiny random Transformers models, and modules made to mislead."""

import pytest
import torch
from reference import Gated, Plain
from torch import nn

from srde.core import find_mlps, try_layout
from srde.core.layout import _fit
from tiny import GATED, MODELS, tiny


@pytest.mark.parametrize("model_type", MODELS)
def test_every_layer_is_found_and_re_run_to_the_bit(model_type):
    model = tiny(model_type)
    found = find_mlps(model)
    assert len(found.layouts) == 2
    for name, layout in found.layouts.items():
        block = model.get_submodule(name)
        assert (layout.hidden_size, layout.intermediate_size) == (32, 48)
        assert layout.num_matrices == (3 if model_type in GATED else 2)
        assert layout.fused == (model_type == "phi3")
        assert layout.loose == (model_type == "opt")
        if not layout.loose:
            assert layout.tried
            x = torch.randn(2, 3, 32)
            assert torch.equal(layout.run(block.eval(), x), block(x))


def test_looking_changes_neither_the_model_nor_the_random_state():
    model = tiny("gpt2").eval()
    model.transformer.h[1].train()
    training = [m.training for m in model.modules()]
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    find_mlps(model)
    assert torch.equal(torch.rand(1), want)
    assert [m.training for m in model.modules()] == training


def test_the_trial_finds_the_gate_whatever_the_names():
    class Swapped(Gated):
        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    assert try_layout(Gated(8, 24), _fit(Gated(8, 24))).ups == ("gate_proj", "up_proj")
    block = Swapped(8, 24)
    assert try_layout(block, _fit(block)).ups == ("up_proj", "gate_proj")


@pytest.mark.parametrize("place", ["hidden", "output"])
def test_the_trial_finds_where_the_dropout_acts(place):
    class Dropping(Plain):
        def __init__(self):
            super().__init__(8, 24)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            h = self.act(self.fc_in(x))
            return self.fc_out(self.dropout(h)) if place == "hidden" else self.dropout(self.fc_out(h))

    block = Dropping()
    assert try_layout(block, _fit(block)).dropout_on == place


def test_on_the_meta_device_shapes_alone_decide():
    with torch.device("meta"):
        model = tiny("llama")
    layouts = find_mlps(model).layouts
    assert len(layouts) == 2 and not any(layout.tried for layout in layouts.values())


def test_what_computes_something_else_is_rejected_with_what_was_seen():
    class Odd(Gated):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    model = nn.Sequential(Odd(8, 24), nn.Linear(8, 8))
    found = find_mlps(model)
    assert not found.layouts
    assert found.rejected == {
        "0": "Odd: gate_proj 8->24, up_proj 8->24, down_proj 24->8; its forward is not act(x W) W'"
    }


def test_attention_and_projections_are_not_mistaken_for_mlps():
    names = set(find_mlps(tiny("opt")).layouts)
    assert names == {"model.decoder.layers.0", "model.decoder.layers.1"}
