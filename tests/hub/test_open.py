"""Opening what a user names: adapters and SaRDinE models alike."""

import pytest
import torch
from adapters import fill, tokens
from peft import PeftModel, get_peft_model

from srde import SaRDinEForCausalLM, SrdeConfig
from srde.errors import ArtifactError, ConfigError, UsageError
from srde.hub.export import Source, export_sardine
from srde.hub.open import experts_config, open_model
from srde.tuner.loading import load_base
from srde.tuner.store import save_adapter
from tiny import save_tiny, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open")
    save_tiny(folder / "base")
    config = SrdeConfig(
        num_experts=3,
        target_sparsity=0.1,
        initial_sparsity=0.1,
        task_type="CAUSAL_LM",
        expert_names=["a", "b", "c"],
    )
    save_adapter(fill(get_peft_model(load_base(str(folder / "base")), config)), folder / "adapter")
    export_sardine(Source(str(folder / "adapter")), folder / "sardine")
    return folder


@pytest.mark.parametrize(("name", "kind"), [("adapter", PeftModel), ("sardine", SaRDinEForCausalLM)])
def test_adapters_and_models_open_alike(place, name, kind):
    model, tokenizer = open_model(str(place / name))
    assert isinstance(model, kind) and not model.training and tokenizer.padding_side == "left"
    assert experts_config(model).experts_named("b") == (1,) and experts_config(model).num_experts == 3
    wanted, _ = open_model(str(place / "adapter"))
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, wanted(tokens()).logits)
    half, _ = open_model(str(place / name), "bfloat16")
    assert half.dtype == torch.bfloat16


@pytest.mark.quant
@pytest.mark.parametrize("name", ["adapter", "sardine"])
def test_both_open_quantised(place, name):
    model, _ = open_model(str(place / name), "float32", quantization="nf4")
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    with torch.no_grad():
        assert torch.isfinite(model(tokens()).logits).all()


def test_a_damaged_model_is_refused(place, tmp_path):
    export_sardine(Source(str(place / "adapter")), tmp_path / "made")
    file = tmp_path / "made/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.safetensors"):
        open_model(str(tmp_path / "made"))


def test_an_exported_model_is_no_adapter(place):
    from srde.tuner.experts import read_adapter
    from srde.tuner.loading import load_adapter

    for read in (read_adapter, load_adapter):
        with pytest.raises(
            ArtifactError, match="it is a sardine model that srde export wrote, not an adapter"
        ):
            read(str(place / "sardine"))


def test_what_is_neither_is_refused(place, tmp_path):
    with pytest.raises(ArtifactError, match=r"adapter_config.json"):
        open_model(str(place / "base"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"adapter_config.json"):
        open_model(str(tmp_path))
    with pytest.raises(ConfigError, match="dtype"):
        open_model(str(place / "sardine"), "int3")
    with pytest.raises(UsageError, match="no experts"):
        experts_config(tiny())


@pytest.mark.security
def test_no_code_of_a_folder_is_run(place, tmp_path):
    from transformers import AutoModelForCausalLM

    export_sardine(Source(str(place / "adapter")), tmp_path / "made")
    (tmp_path / "made/MANIFEST.json").unlink()
    for file in (tmp_path / "made").glob("*.py"):
        file.write_text(
            f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n" + file.read_text()
        )
    model, _ = open_model(str(tmp_path / "made"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert type(model) is type(again) is SaRDinEForCausalLM
    again.save_pretrained(tmp_path / "again")
    assert ".touch()" not in (tmp_path / "again/modeling_sardine.py").read_text()
    assert not (tmp_path / "ran").exists()
