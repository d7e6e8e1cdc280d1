"""Saving and loading: no way of loading changes a bit; what is sealed, and what is not."""

import shutil

import pytest
import torch
from adapters import LAYERS, LOADERS, adapted, config, fill, load_base, tokens, trainable
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from srde.artifacts import MANIFEST_NAME, verify
from srde.errors import UsageError
from srde.tuner.store import ADAPTER_FILES
from tiny import tiny

TENSORS = "adapter_model.safetensors"


# ---- nothing is lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "other", "srde_math"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_loaded_adapter_gives_the_very_logits(base, saved, loader, name):
    folder, want = saved
    model = LOADERS[loader](base, folder, name)
    assert torch.equal(model.eval()(tokens()).logits, want)


@pytest.mark.parametrize("loader", LOADERS)
def test_also_on_a_base_in_bfloat16_and_with_entries(base, tmp_path, loader):
    model = get_peft_model(
        load_base(base, dtype=torch.bfloat16), config(granularity="element", null_expert=True)
    )
    want = fill(model).eval()(tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = LOADERS[loader](base, str(tmp_path), dtype=torch.bfloat16)
    assert torch.equal(loaded.eval()(tokens()).logits, want)
    kept = [p for n, p in loaded.named_parameters() if ".srde_" in n]
    assert kept and {p.dtype for p in kept} == {torch.float32}


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "phi3"])
@pytest.mark.parametrize("loader", LOADERS)
def test_also_on_other_kinds_of_mlps(tmp_path, loader, model_type):
    tiny(model_type).save_pretrained(tmp_path / "base")
    model = fill(get_peft_model(load_base(tmp_path / "base"), config())).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = LOADERS[loader](tmp_path / "base", str(tmp_path / "adapter"))
    assert torch.equal(loaded.eval()(tokens()).logits, model(tokens()).logits)


def test_masks_are_always_saved_and_come_from_the_file(base, tmp_path):
    model = get_peft_model(load_base(base), config(mask_init="random", mask_seed=5))
    model.save_pretrained(tmp_path)
    names = {name.split("mlp.")[1] for name in load_file(tmp_path / TENSORS)}
    assert names == {"srde_experts.index", "srde_experts.values", "srde_router.weight"}
    loaded = PeftModel.from_pretrained(load_base(base), tmp_path)
    for name in LAYERS:
        index = model.srde.layers[name].srde_experts["default"].index
        assert torch.equal(loaded.srde.layers[name].srde_experts["default"].index, index)
        assert not torch.equal(
            index, get_peft_model(load_base(base), config()).srde.layers[name].srde_experts["default"].index
        )


def test_a_second_adapter_goes_into_its_own_folder(base, tmp_path):
    model = adapted()
    model.add_adapter("other", config(num_experts=3))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST_NAME, "README.md", *ADAPTER_FILES, "other"]
    for folder in (tmp_path, tmp_path / "other"):
        assert {entry.file for entry in verify(folder).files} == set(ADAPTER_FILES)
    assert (
        PeftModel.from_pretrained(load_base(base), tmp_path / "other").peft_config["default"].num_experts == 3
    )


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(base, saved):
    model = PeftModel.from_pretrained(load_base(base), saved[0])
    assert not trainable(model)
    model = PeftModel.from_pretrained(load_base(base), saved[0], is_trainable=True)
    assert len(trainable(model)) == 4
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in trainable(model).values())


def test_modules_to_save_are_saved_whole(base, tmp_path):
    model = fill(get_peft_model(load_base(base), config(modules_to_save=["norm", "embed_tokens"]))).eval()
    for name, parameter in trainable(model).items():
        if "modules_to_save" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "both")
    want = model(tokens()).logits
    for loader in ("PeftModel.from_pretrained", "model.load_adapter"):
        assert torch.equal(LOADERS[loader](base, str(tmp_path / "both"))(tokens()).logits, want)


def test_a_trained_copy_of_the_embeddings_is_no_other_base(base, tmp_path):
    first = get_peft_model(load_base(base), config(modules_to_save=["norm", "embed_tokens"]))
    for name, parameter in trainable(first).items():
        if "modules_to_save" in name:
            parameter.data.normal_()
    second = fill(get_peft_model(load_base(base), config())).eval()
    second.save_pretrained(tmp_path)
    first.load_adapter(tmp_path, "second")
    first.set_adapter("second")
    assert torch.equal(first.eval()(tokens()).logits, second(tokens()).logits)


@pytest.mark.parametrize("again", [False, True])
def test_what_transformers_saves_loads_everywhere_also_over_an_older_one(base, tmp_path, again):
    model = load_base(base)
    model.add_adapter(config())
    if again:
        fill(get_peft_model(load_base(base), config(top_k=1)), seed=3).save_pretrained(tmp_path)
    fill(model).save_pretrained(tmp_path)
    for loader in LOADERS.values():
        assert torch.equal(loader(base, str(tmp_path)).eval()(tokens()).logits, model(tokens()).logits)


# ---- the seal ----------------------------------------------------------------------------------------------------------


def test_a_pickle_is_never_sealed(base, saved, unsealed):
    model = PeftModel.from_pretrained(load_base(base), saved[0])
    message = (
        "adapter file='.*adapter_model.bin': srde adapters hold no pickle. save with safe_serialization=True"
    )
    with pytest.raises(UsageError, match=message):
        model.save_pretrained(unsealed, safe_serialization=False)
    assert not (unsealed / MANIFEST_NAME).exists()


def test_a_configuration_saved_alone_takes_the_seal_off(base, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    assert verify(tmp_path / "copy")
    config(num_shared_experts=1, top_k=1).save_pretrained(str(tmp_path / "copy"))
    assert not (tmp_path / "copy" / MANIFEST_NAME).exists()
    assert PeftModel.from_pretrained(load_base(base), tmp_path / "copy").peft_config["default"].top_k == 1


def test_files_beside_the_adapter_are_no_concern_of_the_seal(base, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("changed")
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    assert torch.equal(
        PeftModel.from_pretrained(load_base(base), tmp_path / "copy")(tokens()).logits, saved[1]
    )
