"""The life of an expert in a saved adapter: what is not named keeps its bits, and a kill leaves the old adapter or the new."""

import builtins
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from adapters import config, fill, load_base, tokens
from peft import PeftModel, get_peft_model
from save_killer import WATCHED

from srde.artifacts import MANIFEST_NAME, verify
from srde.artifacts.leftovers import being_written
from srde.errors import ArtifactError, ConfigError, UsageError
from srde.tuner.experts import (
    add_expert,
    choose_masks,
    compare_adapters,
    describe_expert,
    describe_experts,
    freeze_experts,
    name_experts,
    one_expert,
    read_adapter,
    replace_expert,
    switch_experts,
    write_adapter,
)
from srde.tuner.experts.compare import same_bits
from tiny import tiny

NAMES = ["math", "logic", "code", "math"]
KINDS = {
    "neuron": {},
    "element": {"granularity": "element"},
    "null and shared": {"null_expert": True, "num_shared_experts": 1},
    "one layer": {"layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny models by their type."""
    folders = {}
    for kind in ("llama", "opt"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny(kind).save_pretrained(folders[kind])
    return folders


@pytest.fixture
def make(bases, tmp_path):
    """Makes an adapter folder with random numbers, and a file beside them."""

    def made(name="old", kind="llama", seed=0, **settings):
        settings = {"expert_names": NAMES, "initial_sparsity": 0.3} | settings
        model = fill(get_peft_model(load_base(bases[kind]), config(**settings)), seed)
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "run.json").write_text("{}")
        return read_adapter(tmp_path / name)

    return made


def grown(adapter, **kwargs):
    return add_expert(adapter, "medicine", masks=choose_masks(adapter, "magnitude", **kwargs))


def load(bases, folder, kind="llama"):
    return PeftModel.from_pretrained(load_base(bases[kind]), folder).eval()


# ---- reading and writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_read_and_written_bit_for_bit(make, bases, tmp_path, kind):
    old = make(**KINDS[kind])
    write_adapter(old, tmp_path / "new")
    verify(tmp_path / "new")
    assert compare_adapters(old, read_adapter(tmp_path / "new")).identical
    assert torch.equal(*(load(bases, tmp_path / name)(tokens()).logits for name in ("old", "new")))
    left = {path.name for path in (tmp_path / "new").iterdir()}
    assert "tokenizer.json" in left and "run.json" not in left  # the run made the old one


def test_in_place_all_other_files_stay(make, tmp_path):
    old = make()
    write_adapter(freeze_experts(old, [1]), tmp_path / "old")
    assert read_adapter(tmp_path / "old").config.frozen_experts == [1]
    left = {path.name for path in (tmp_path / "old").iterdir()}
    assert left == {"README.md", "tokenizer.json", "run.json", *os.listdir(tmp_path / "old")} and not [
        name for name in left if name.startswith(".")
    ]
    verify(tmp_path / "old")


def test_nothing_that_was_saved_is_overwritten(make):
    old, other = make(), make("other")
    with pytest.raises(
        UsageError, match=r"output_dir='.*other': it exists, and nothing that was saved is overwritten"
    ):
        write_adapter(old, other.folder)


@pytest.mark.parametrize(
    "damage", ["missing", "altered", "other method", "other settings", "truncated", "lost tensor"]
)
def test_what_is_no_whole_adapter_is_refused(make, damage):
    adapter = make()
    folder, file = adapter.folder, adapter.folder / "adapter_config.json"
    if damage == "missing":
        file.unlink()
        (folder / MANIFEST_NAME).unlink()
    elif damage == "altered":
        file.write_text(file.read_text().replace('"top_k": 2', '"top_k": 1'))
    else:
        (folder / MANIFEST_NAME).unlink()
        content = json.loads(file.read_text())
        if damage == "other method":
            file.write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
        elif damage == "other settings":
            file.write_text(json.dumps(content | {"num_experts": 3, "expert_names": None}))
        elif damage == "truncated":
            tensors = folder / "adapter_model.safetensors"
            tensors.write_bytes(tensors.read_bytes()[:-9])
        else:
            from safetensors.torch import load_file, save_file

            tensors = load_file(folder / "adapter_model.safetensors")
            del tensors[next(name for name in tensors if name.endswith("index"))]
            save_file(tensors, folder / "adapter_model.safetensors")
    words = {
        "missing": "it must be a local folder with an adapter_config.json",
        "altered": "sha256=",
        "other method": "it is a PeftType.LORA adapter, not one of srde",
        "other settings": "3 routed and 0 shared experts by neuron have other shapes",
        "truncated": "it cannot be read",
        "lost tensor": "each layer has values, index and router",
    }
    with pytest.raises(ArtifactError, match=words[damage]):
        read_adapter(folder)


class KilledError(BaseException):
    """Not an `Exception`, so that nobody tidies up."""


@pytest.mark.faults
def test_a_kill_in_place_leaves_the_old_adapter_or_the_new(make, tmp_path):
    old = make()
    new = replace_expert(switch_experts(old, [2], on=False), 0, make("other", seed=5), 3)
    outcomes, step = [], 0
    while outcomes[-2:] != ["new", "done"]:
        step += 1
        folder = tmp_path / "killed"
        shutil.copytree(old.folder, folder)
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, step)
            try:
                write_adapter(replace(new, folder=folder), folder)
                done = ["done"]
            except KilledError:
                done = []
        being_written.clear()  # as a new process has it
        found = read_adapter(folder)  # what a reader gets, who finishes what was as good as done
        same = [name for name, one in (("old", old), ("new", new)) if compare_adapters(found, one).identical]
        outcomes += (same or ["a mixture"]) + done
        shutil.rmtree(folder)
    assert len(outcomes) > 30 and outcomes[0] == "old"
    assert set(outcomes[: outcomes.index("new")]) == {"old"}
    assert set(outcomes[outcomes.index("new") : -1]) == {"new"}


def die_at(patch, step):
    """From the `step`-th look at the file system on there is nobody any more, not even to tidy up."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= step:
                raise KilledError
            return function(*args, **kwargs)

        return call

    for name in WATCHED:
        patch.setattr(os, name, counted(getattr(os, name)))
    patch.setattr(builtins, "open", counted(builtins.open))


# ---- one more expert -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["zero", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_adding_an_expert_leaves_every_output_bit_identical(make, bases, tmp_path, kind, source):
    old = make(**KINDS[kind])
    new = grown(old) if source == "zero" else add_expert(old, "medicine", copy_of=1)
    write_adapter(new, tmp_path / "new")
    models = [load(bases, tmp_path / name) for name in ("old", "new")]
    for path in ("masked", "grouped"):
        for ids in (tokens(), tokens(batch=1, length=1), tokens(batch=4, length=40)):
            for model in models:
                model.srde.path = path
            assert torch.equal(*(model(ids).logits for model in models))
    found = compare_adapters(old, read_adapter(tmp_path / "new"))
    assert [one["identical"] for one in found.experts] == [True] * 4 + [False] + [
        True
    ] * new.config.num_shared_experts
    assert not found.tensors and set(found.settings) == {"num_experts", "expert_names", "disabled_experts"}
    assert new.config.expert_names == [*NAMES, "medicine"] and new.config.disabled_experts == [4]


def test_what_keeps_the_outputs_is_that_it_is_switched_off(make, bases, tmp_path):
    old = make()
    write_adapter(switch_experts(add_expert(old, "medicine", copy_of=1), [4], on=True), tmp_path / "new")
    assert not torch.equal(*(load(bases, tmp_path / name)(tokens()).logits for name in ("old", "new")))


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_a_new_expert_has_the_best_places_that_nobody_has(make, granularity, kind):
    old = make(kind=kind, granularity=granularity, mask_init="magnitude")
    all_at_once = make("five", kind=kind, granularity=granularity, num_experts=5, expert_names=None)
    for layer, mask in choose_masks(old, "magnitude").items():
        chosen = mask.view(1, -1) if granularity == "neuron" else mask
        taken = old.layers[layer].index_by_expert
        best = all_at_once.layers[layer].index_by_expert
        for m, row in enumerate(chosen):
            assert not torch.isin(row, taken[:, m]).any() and (row.diff() > 0).all()
            # five experts that were dealt at once take the same places, all together, but for the last round's order
            assert torch.isin(row, best[:, m]).double().mean() > 0.5


def test_masks_at_random_need_no_weights_and_follow_the_seed(make, bases, tmp_path):
    old = make()
    (tmp_path / "config").mkdir()
    shutil.copy(bases["llama"] / "config.json", tmp_path / "config")
    masks = [choose_masks(old, "random", base=str(tmp_path / "config"), seed=seed) for seed in (0, 0, 1)]
    layer = next(iter(old.layers))
    assert torch.equal(masks[0][layer], masks[1][layer]) and not torch.equal(masks[0][layer], masks[2][layer])
    assert not torch.isin(masks[0][layer], old.layers[layer].index).any()


def test_where_no_place_is_free_those_are_shared_that_fewest_have(make):
    old = make(target_sparsity=0.25)  # four experts have all 48 neurons, one each
    for layer, mask in choose_masks(old, "magnitude").items():
        assert len(mask.unique()) == len(mask) == 12 and torch.isin(mask, old.layers[layer].index).all()


def test_another_base_gives_no_masks(make, bases, tmp_path):
    tiny(seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="the adapter was trained on other weights"):
        choose_masks(make(), "magnitude", base=str(tmp_path / "other"))
    with pytest.raises(ArtifactError, match=r"it has no MLP model\.layers\.0\.mlp"):
        choose_masks(make("named"), "random", base=str(bases["opt"]))


def test_a_new_expert_is_never_the_first_choice_when_it_is_switched_on(make, bases, tmp_path):
    old = make(disabled_experts=[3])
    write_adapter(switch_experts(grown(old), [4], on=True), tmp_path / "new")
    model = load(bases, tmp_path / "new")
    with model.srde.record() as record:
        model(tokens(8, 30))
    slots = torch.cat([route.slot_TK for route in record.calls[0].routes.values()])
    assert not (slots[:, 0] == 4).any() and (slots[:, 1] == 4).any()


def test_names_are_asked_for_where_there_are_none(make):
    old = make(expert_names=None)
    with pytest.raises(ConfigError, match=r"names=None: the adapter's 4 experts have no names yet"):
        add_expert(old, "medicine", copy_of=0)
    assert add_expert(old, "m", copy_of=0, names=["a", "b", "c", "d"]).config.expert_names == [
        "a",
        "b",
        "c",
        "d",
        "m",
    ]
    with pytest.raises(ConfigError, match="the experts have names: math, logic, code, math"):
        add_expert(make("named"), "medicine", copy_of=0, names=["a", "b", "c", "d"])
    with pytest.raises(ConfigError, match="expert_names"):
        add_expert(make("number"), "7", copy_of=0)


# ---- frozen, disabled, named ---------------------------------------------------------------------------------------------


def test_frozen_and_disabled_experts_are_so_in_the_model_and_can_be_freed(make, bases, tmp_path):
    old = make()
    changed = switch_experts(freeze_experts(old, [0, 1]), [2], on=False)
    write_adapter(changed, tmp_path / "new")
    for layer in load(bases, tmp_path / "new").srde.layers.values():
        router = layer.srde_router["default"]
        assert router.frozen == (0, 1) and router.locked == (2,)
    undone = switch_experts(freeze_experts(changed, [0, 1], undo=True), [2], on=True)
    assert compare_adapters(old, undone).identical
    with pytest.raises(ConfigError, match="disabled_experts"):
        switch_experts(old, range(4), on=False)


def test_experts_are_named(make):
    old = make(expert_names=None)
    assert name_experts(old, {1: "logic"}).config.expert_names == [
        "expert 0",
        "logic",
        "expert 2",
        "expert 3",
    ]
    named = make("named")
    assert name_experts(named, {3: "algebra"}).config.expert_names == ["math", "logic", "code", "algebra"]
    assert one_expert(named.config, "code") == 2 and one_expert(named.config, "3") == 3
    with pytest.raises(ConfigError, match="expert='math': experts 0, 3 have this name"):
        one_expert(named.config, "math")


# ---- an expert of another adapter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_router", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_replacing_takes_the_very_bits_and_no_others(make, kind, keep_router):
    old, other = make(**KINDS[kind]), make("other", seed=1, **KINDS[kind])
    new = replace_expert(old, 1, other, 3, keep_router=keep_router)
    for layer, tensors in new.layers.items():
        was, given = old.layers[layer], other.layers[layer]
        assert same_bits(tensors.values[:, 1], given.values[:, 3])
        assert same_bits(tensors.index_by_expert[1], given.index_by_expert[3])
        assert same_bits(tensors.weight[1], (was.weight[1] if keep_router else given.weight[3]))
        assert not same_bits(was.values[:, 1], given.values[:, 3])  # the old one is as it was
    found = compare_adapters(old, new)
    assert [one["name"] for one in found.experts if not one["identical"]] == ["logic"]
    assert not found.tensors and not found.settings


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_a_smaller_expert_does_the_same_in_a_larger_ones_place(make, bases, tmp_path, granularity):
    old = make(target_sparsity=0.2, granularity=granularity)
    small = make("small", target_sparsity=0.05, seed=1, granularity=granularity)
    write_adapter(replace_expert(old, 2, small, 0), tmp_path / "new")
    found = read_adapter(tmp_path / "new").layers
    assert all((layer.index_by_expert[2].diff() > 0).all() for layer in found.values())
    model, other = load(bases, tmp_path / "new"), load(bases, tmp_path / "small")
    with model.srde.force_experts(2), other.srde.force_experts(0):
        torch.testing.assert_close(model(tokens()).logits, other(tokens()).logits)
    with pytest.raises(UsageError, match="the experts here rewrite"):
        replace_expert(small, 0, old, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "element"}, "granularity of .*='element': .* has neuron"),
        ({"layers_to_transform": [0]}, "layers of "),
        ({"kind": "opt"}, "layers of "),
    ],
)
def test_an_expert_fits_only_where_it_was_made_for(make, settings, message):
    with pytest.raises(UsageError, match=message):
        replace_expert(make(), 0, make("other", **settings), 0)


def test_an_expert_of_another_base_is_refused(make):
    old, other = make(), make("other")
    for fingerprint, words in (
        ([value + 0.1 for value in old.config.base_fingerprint], "whose weights differ"),
        (None, "one of the two does not know its base's weights"),
    ):
        moved = replace(other, config=replace(other.config, base_fingerprint=fingerprint))
        with pytest.raises(UsageError, match=words):
            replace_expert(old, 0, moved, 0)


# ---- comparing and describing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["value", "sign of zero", "mask", "row", "null slot", "setting"])
def test_one_flipped_number_is_found(make, what):
    old = make(null_expert=True)
    new = replace_expert(old, 0, old, 0)  # a copy
    assert compare_adapters(old, new).identical
    layer = new.layers["base_model.model.model.layers.1.mlp"]
    was = old.layers["base_model.model.model.layers.1.mlp"]
    if what == "value":
        layer.values[2, 1, 0, 3] = torch.nextafter(layer.values[2, 1, 0, 3], torch.tensor(9.0))
    elif what == "sign of zero":
        was.values[2, 1, 0, 3], layer.values[2, 1, 0, 3] = 0.0, -0.0
    elif what == "mask":
        layer.index[1, 1] += 1
    elif what in ("row", "null slot"):
        layer.weight[1 if what == "row" else 4, 0] += 1
    else:
        new = replace(new, config=replace(new.config, top_k=1))
    found = compare_adapters(old, new)
    assert not found.identical
    differ = {one["number"]: one for one in found.experts if not one["identical"]}
    assert list(differ) == ([1] if what in ("value", "sign of zero", "mask", "row") else [])
    if what == "value":
        assert differ[1]["values"] == 1 and 0 < differ[1]["values_change"] < 1e-6 and differ[1]["router"] == 0
    elif what == "mask":
        assert differ[1]["values"] is None and differ[1]["masks"] == pytest.approx(1 / 4)
    elif what == "row":
        assert differ[1]["router"] > 0 == differ[1]["values"]
    elif what == "null slot":
        assert found.tensors == ["base_model.model.model.layers.1.mlp: the null slot's row"]
    elif what == "setting":
        assert found.settings == {"top_k": (2, 1)}


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_experts_are_described(make, granularity):
    old = make(granularity=granularity, num_shared_experts=1, target_sparsity=0.1)
    old = freeze_experts(add_expert(grown(old), "copy", copy_of=0), [0])
    about = {one["name"]: one for one in describe_experts(old) if one["number"] != 3}
    assert about["medicine"]["state"] == ["zero", "disabled"] and about["medicine"]["share"] == 0
    assert about["math"]["state"] == ["trained", "frozen"] and about["shared 0"]["number"] is None
    assert about["math"]["overlap"] == about["copy"]["overlap"] == 1 and about["logic"]["overlap"] == 0
    assert about["math"]["share"] == pytest.approx(0.1)
    norm = sum(layer.values[:, 0].square().sum() for layer in old.layers.values()).sqrt()
    assert about["math"]["norm"] == pytest.approx(float(norm)) and about["medicine"]["norm"] == 0
    first = describe_expert(old, 0)[0]
    assert first["layer"] == "model.layers.0.mlp" and first["overlaps"] == [("copy", 1.0)]
    assert (
        first["changed"]
        == first["rewritten"]
        == old.layers["base_model.model.model.layers.0.mlp"].index_by_expert[0].numel()
    )
    assert describe_expert(old, 4)[0]["changed"] == 0
