"""What does not fit is refused with the reason: an adapter for another base, a tensor too few, too many or ill-shaped."""

import json
import re

import pytest
import torch
from adapters import LOADERS, PEFT_LOADERS, config, fill, load_base, tokens
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from srde.errors import ArtifactError, UsageError
from srde.tuner.fingerprint import check_base, fingerprint
from srde.tuner.store import check_tensors
from tiny import tiny

TENSORS = "adapter_model.safetensors"


def edit(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


# ---- another base ------------------------------------------------------------------------------------------------------


def other_base(folder, seed=4):
    tiny(seed=seed).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_for_another_base_is_refused(base, saved, unsealed, tmp_path, loader):
    other = other_base(tmp_path / "other")
    file = unsealed / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": other}))
    message = (
        f"base model={other!r}: the adapter was trained on other weights ({other}). load that base; to use"
    )
    with pytest.raises(ArtifactError, match="^" + re.escape(message)):
        LOADERS[loader](other, str(unsealed))


def test_an_adapter_may_be_used_on_a_sibling_on_purpose(unsealed, tmp_path):
    other = other_base(tmp_path / "other")
    file = unsealed / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_fingerprint": None}))
    assert PeftModel.from_pretrained(load_base(other), unsealed)(tokens()).logits.isfinite().all()


def test_the_same_base_in_another_dtype_is_the_same_base(base, saved):
    for dtype in (torch.bfloat16, torch.float16):
        assert (
            PeftModel.from_pretrained(load_base(base, dtype=dtype), saved[0])(tokens())
            .logits.isfinite()
            .all()
        )


def test_a_configuration_used_twice_knows_the_second_base(base, tmp_path):
    fields = config()
    get_peft_model(load_base(base), fields)
    other = other_base(tmp_path / "other")
    with pytest.warns(UserWarning, match="base_model_name_or_path` was renamed"):
        model = get_peft_model(load_base(other), fields)
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(load_base(other), tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="trained on other weights"):
        PeftModel.from_pretrained(load_base(base), tmp_path / "adapter")


def test_the_fingerprint_is_of_the_base_and_moves_with_it():
    model = tiny()
    before = fingerprint(model)
    assert len(before) == 48 and before == fingerprint(get_peft_model(model, config()))
    check_base(before, model, None)
    model.model.norm.weight.data *= 1.05
    with pytest.raises(ArtifactError, match=r"^base model=.*base not named"):
        check_base(before, model, None)
    with torch.device("meta"):
        assert fingerprint(tiny()) is None


# ---- tensors that do not fit -------------------------------------------------------------------------------------------

FIRST = "base_model.model.model.layers.0.mlp.srde_experts"
HINT = "load the adapter with the configuration and the base model that it was saved with."
RULE = "the file must hold exactly the adapter's tensors, and 1 is"
DAMAGE = {
    "missing": (
        lambda tensors: tensors.pop(f"{FIRST}.index"),
        f"missing tensors=['{FIRST}.{{name}}.index']: {RULE} missing. {HINT}",
    ),
    "unknown": (
        lambda tensors: tensors.update({f"{FIRST}.extra": torch.zeros(3)}),
        f"unknown tensors=['{FIRST}.extra']: {RULE} unknown. {HINT}",
    ),
    "a layer too many": (
        lambda tensors: tensors.update({f"{FIRST}.index".replace("0", "7"): torch.zeros(3)}),
        f"unknown tensors=['{FIRST.replace('0', '7')}.index']: {RULE} unknown. {HINT}",
    ),
    "ill-shaped": (
        lambda tensors: tensors.update({f"{FIRST}.index": torch.zeros(5, 1, dtype=torch.long)}),
        f"shape of {FIRST}.{{name}}.index=(5, 1): this model and configuration need (5, 2). "
        "load the adapter on the base model that it was made for.",
    ),
}


@pytest.mark.parametrize("loader", PEFT_LOADERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit_are_named(base, unsealed, damage, loader):
    change, message = DAMAGE[damage]
    edit(unsealed, change)
    name = "second" if loader == "PeftModel.load_adapter" else "default"
    with pytest.raises(ArtifactError, match="^" + re.escape(message.format(name=name)) + "$"):
        PEFT_LOADERS[loader](base, str(unsealed))


def test_ill_shaped_tensors_cannot_be_waved_through(base, unsealed):
    edit(unsealed, DAMAGE["ill-shaped"][0])
    with pytest.raises(ArtifactError, match=r"^shape of"):
        PeftModel.from_pretrained(load_base(base), unsealed, ignore_mismatched_sizes=True)


def test_an_adapter_that_did_not_load_leaves_the_others_alone(base, unsealed):
    model = fill(get_peft_model(load_base(base), config()), seed=8).eval()
    want = model(tokens()).logits
    edit(unsealed, DAMAGE["ill-shaped"][0])
    with pytest.raises(ArtifactError):
        model.load_adapter(unsealed, "broken")
    assert torch.equal(model(tokens()).logits, want)
    model.set_adapter("broken")
    with pytest.raises(
        UsageError, match=r"^adapter in model.layers.0.mlp='broken': its tensors were to come from a file"
    ):
        model(tokens())
    model.set_adapter("default")
    model.delete_adapter("broken")
    assert torch.equal(model(tokens()).logits, want)


def test_another_number_of_experts_in_the_configuration_is_an_error(base, unsealed):
    file = unsealed / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": 3}))
    with pytest.raises(
        ArtifactError, match=r"values=\(3, 5, 2, 32\): this model and configuration need \(3, 4, 2, 32\)"
    ):
        PeftModel.from_pretrained(load_base(base), unsealed)


def test_names_are_listed_up_to_three():
    want = {name: torch.zeros(1) for name in "abcde"}
    with pytest.raises(
        ArtifactError, match=re.escape("missing tensors=['a', 'b', 'c']: ") + ".* and 5 are missing"
    ):
        check_tensors(want, {})
