"""What one can ask of and tell the routers: `model.srde`."""

import re

import pytest
import torch
from adapters import LAYERS, adapted, config, fill, tokens, trainable

from srde.errors import ConfigError, UsageError


def padded():
    """Tokens [2, 7] and a mask with three padding positions, on the left of the first sequence."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    return tokens(), mask


# ---- recording ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_record_holds_what_each_router_decided(model_type):
    model = adapted(model_type, null_expert=True, num_shared_experts=1)
    seen = {}
    for name, layer in model.srde.layers.items():
        router = layer.srde_router["default"]

        def forward(*args, name=name, plain=router.forward):
            seen[name] = plain(*args)
            return seen[name]

        router.forward = forward
    with model.srde.record() as record:
        model(tokens())
    chosen = record.layers()
    assert list(chosen) == list(model.srde.layers) and len(record.calls) == 1
    for name, (slot_TK, gate_TE) in chosen.items():
        assert slot_TK.shape == (14, 2) and gate_TE.shape == (14, 5)
        assert torch.equal(slot_TK, seen[name].slot_TK) and torch.equal(gate_TE, seen[name].gate_TE)
        assert slot_TK.max() <= 4 and (gate_TE[:, 4] == 1).all()
        for t in range(14):  # the gates are on the chosen slots; slot 4 is the null slot
            used = {e for e in range(4) if gate_TE[t, e] != 0}
            assert used == set(slot_TK[t].tolist()) - {4}
    model(tokens())
    assert len(record.calls) == 1


def test_padding_is_left_out_of_the_record():
    model = adapted()
    ids, mask = padded()
    with model.srde.record() as record:
        model(ids, attention_mask=mask)
    with model.srde.record() as whole:
        model(ids, attention_mask=mask)
        whole.calls[0].mask_T = None
    keep = mask.flatten().bool()
    for name, (slot_TK, gate_TE) in record.layers().items():
        assert len(slot_TK) == 11
        assert torch.equal(slot_TK, whole.layers()[name][0][keep])
        assert torch.equal(gate_TE, whole.layers()[name][1][keep])
    want = torch.stack([gate_TE[keep].mean(0) for _, gate_TE in whole.layers().values()])
    torch.testing.assert_close(record.load(), want)
    assert record.load().shape == (2, 4) and not torch.allclose(whole.load(), want)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids, mask: model(ids, attention_mask=mask),
        lambda model, ids, mask: model(ids, mask),
        lambda model, ids, mask: model.get_base_model()(ids, mask),
        lambda model, ids, mask: model.get_base_model().model(ids, attention_mask=mask),
    ],
    ids=["by name", "by position", "the base by position", "the decoder alone"],
)
def test_padding_is_seen_however_the_model_is_called(call):
    model = adapted()
    with model.srde.record() as record:
        call(model, *padded())
    assert {len(slot_TK) for slot_TK, _ in record.layers().values()} == {11}


def test_a_mask_is_forgotten_when_its_forward_is_over():
    model = adapted()
    ids, mask = padded()
    with model.srde.record() as record:
        model(ids, attention_mask=mask)
        model.get_base_model().model(ids)
        with pytest.raises(IndexError):
            model(ids + 100, attention_mask=mask)
        model.get_base_model().model(ids)
    assert [call.mask_T is None for call in record.calls] == [False, True, True]


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_of_generate_the_prompt_and_then_each_new_token_are_recorded(cache):
    model = adapted()
    ids, mask = padded()
    with model.srde.record() as record:
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, **cache
        )
    sizes = [len(call.routes[LAYERS[0], "default"].gate_TE) for call in record.calls]
    assert sizes == ([14, 16, 18, 20] if "use_cache" in cache else [14, 2, 2, 2])
    if cache:  # a static cache turns the mask into one that is not by position
        return
    slots = record.layers()[LAYERS[1]][0]
    assert len(slots) == 11 + 3 * 2
    # the same tokens in one forward choose the same experts
    longer = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
    positions = (longer.cumsum(1) - 1).clamp(min=0)
    with model.srde.record() as again:
        model(out[:, :-1], attention_mask=longer, position_ids=positions)
    where = longer.bool()
    order = torch.cat([torch.zeros(2, 7), torch.arange(1, 4).expand(2, 3)], dim=1)[where].argsort(stable=True)
    assert torch.equal(again.layers()[LAYERS[1]][0][order], slots)


def test_two_adapters_are_recorded_under_their_names():
    model = adapted()
    model.add_adapter("other", config(num_experts=3, top_k=1))
    fill(model)
    model.base_model.set_adapter(["default", "other"])
    with model.srde.record() as record:
        model(tokens())
    assert len(record.calls) == 1
    assert record.layers("default")[LAYERS[0]][1].shape == (14, 4)
    assert record.layers("other")[LAYERS[0]][1].shape == (14, 3)
    message = "recorded adapters=['default', 'other']: the record must hold exactly one adapter, or one must be named. "
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        record.layers()


def test_a_record_survives_a_change_of_adapter():
    model = adapted()
    model.add_adapter("other", config(num_experts=3))
    fill(model)
    ids, mask = padded()
    with model.srde.record() as record:
        model(ids, attention_mask=mask)
        model.set_adapter("other")
        model(ids[1:, :5], attention_mask=mask[1:, :5])
    assert len(record.calls) == 2
    assert (
        len(record.layers("default")[LAYERS[0]][0]) == 11 and len(record.layers("other")[LAYERS[0]][0]) == 5
    )


def test_an_empty_record_says_so():
    with adapted().srde.record() as record:
        pass
    message = (
        "recorded adapters=[]: the record must hold exactly one adapter, or one must be named. "
        "run the model inside `with model.srde.record()`, and pass adapter=... if several are active."
    )
    with pytest.raises(UsageError, match="^" + re.escape(message) + "$"):
        record.layers()


def test_recorded_routes_carry_gradients():
    model = adapted()
    with model.srde.record() as record:
        model(tokens())
    sum(route.logits_TE.square().sum() for route in record.calls[0].routes.values()).backward()
    routers = [p for name, p in trainable(model).items() if "router" in name]
    assert len(routers) == 2 and all(p.grad.abs().max() > 0 for p in routers)


# ---- forcing -----------------------------------------------------------------------------------------------------------


def forced_one_by_one(model, expert):
    with model.srde.force_experts(expert):
        return model(tokens()).logits


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_one_expert_per_sequence_or_per_token_is_each_expert_alone(granularity):
    model = adapted(granularity=granularity)
    alone = [forced_one_by_one(model, e) for e in range(4)]
    assert all((alone[0] - other).abs().max() > 1e-3 for other in alone[1:])
    free = model(tokens()).logits
    for given in ([2, 0], torch.tensor([2, 0]), torch.tensor([[2] * 7, [0] * 7], dtype=torch.int32)):
        with model.srde.force_experts(given):
            got = model(tokens()).logits
        torch.testing.assert_close(got, torch.stack([alone[2][0], alone[0][1]]), atol=1e-6, rtol=0)
    with model.srde.force_experts([-1, 3]):
        torch.testing.assert_close(
            model(tokens()).logits, torch.stack([free[0], alone[3][1]]), atol=1e-6, rtol=0
        )
    for whole in (-1, [-1, -1]):
        with model.srde.force_experts(whole):
            assert torch.equal(model(tokens()).logits, free)
    assert torch.equal(model(tokens()).logits, free)


def test_per_token_the_gates_are_as_given():
    model = adapted(num_shared_experts=1)
    wanted = torch.tensor([[0, 1, 2, 3, -1, 0, 1], [3, 3, -1, -1, 2, 1, 0]])
    with model.srde.record() as free:
        model(tokens())
    with model.srde.record() as record, model.srde.force_experts(wanted.tolist()):
        model(tokens())
    slot_TK, gate_TE = record.layers()[LAYERS[0]]
    for t, expert in enumerate(wanted.flatten().tolist()):
        if expert < 0:
            assert torch.equal(gate_TE[t], free.layers()[LAYERS[0]][1][t])
        else:
            assert gate_TE[t].tolist() == [float(e == expert) for e in range(4)] + [1]
            assert slot_TK[t].tolist() == [expert, -1]


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_can_be_forced_by_sequence(beams):
    model = adapted()

    def generate(ids):
        return model.generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, num_beams=beams
        )

    rows = []
    for row, expert in enumerate((1, 3)):
        with model.srde.force_experts(expert):
            rows.append(generate(tokens()[row : row + 1]))
    with model.srde.force_experts([1, 3]):
        assert torch.equal(generate(tokens()), torch.cat(rows))


def test_forcing_nests_and_ends_with_an_error():
    model = adapted()
    free, one, two = model(tokens()).logits, forced_one_by_one(model, 1), forced_one_by_one(model, 2)
    with pytest.raises(KeyError), model.srde.force_experts(1):
        with model.srde.force_experts(2):
            assert torch.equal(model(tokens()).logits, two)
        assert torch.equal(model(tokens()).logits, one)
        raise KeyError
    assert torch.equal(model(tokens()).logits, free)


NUMBERED = (
    "routed experts are numbered 0 to 3, and -1 means as routed. name an expert that the active adapter has."
)


@pytest.mark.parametrize(
    ("experts", "value"),
    [(4, 4), (-2, -2), ([0, 9], 9), (torch.tensor([[0], [-5]]), -5), (torch.tensor(7), 7)],
)
def test_experts_that_do_not_exist_cannot_be_forced(experts, value):
    with pytest.raises(ConfigError, match="^" + re.escape(f"forced expert={value}: {NUMBERED}") + "$"):
        with adapted(num_shared_experts=2).srde.force_experts(experts):
            pass


@pytest.mark.parametrize("experts", [[0, 1, 2], [[0] * 6, [1] * 6]])
def test_as_many_experts_as_sequences_or_tokens_are_needed(experts):
    model = adapted()
    given = torch.tensor(experts).numel()
    message = (
        f"forced experts=({given},): one expert per token is needed, and this layer sees 14 tokens. "
        "pass one expert, one per sequence, or one per token of the batch as it is fed."
    )
    with model.srde.force_experts(experts), pytest.raises(UsageError, match="^" + re.escape(message) + "$"):
        model(tokens())
