"""The SaRDinE model: the adapter's logits, whatever way it is saved and loaded."""

import pytest
import torch
from accelerate import dispatch_model
from adapters import adapted, fill, tokens
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from srde import SaRDinEConfig, SaRDinEForCausalLM, SrdeConfig
from srde.errors import ArtifactError, ConfigError, UsageError
from srde.hub.convert import from_adapter
from tiny import MODELS, SPECIAL, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = tokens()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def generated(model, **options):
    model.generation_config.pad_token_id = 0
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    return model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)


@pytest.fixture
def folder(tmp_path):
    """A SaRDinE folder with the base inside, and the logits of the adapter that it was made of."""
    model = adapted()
    before = logits(model)
    from_adapter(model).save_pretrained(tmp_path / "made")
    return tmp_path / "made", before


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma3_text", "phi3", "gpt2", "opt"])
def test_saved_and_loaded_it_is_the_adapter_to_the_bit(kind, tmp_path):
    model = adapted(kind)
    before, text = logits(model), generated(model)
    made = from_adapter(model)
    assert torch.equal(logits(made), before)
    made.save_pretrained(tmp_path)
    read = SaRDinEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(read), before)
    assert torch.equal(generated(read), text)
    assert torch.equal(generated(read, use_cache=False), text)
    assert not any(p.requires_grad for p in read.parameters()) and not read.training


@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "element"},
        {"null_expert": True, "num_shared_experts": 2},
        {"layers_to_transform": 1, "router_temperature": 1.7},
        {"disabled_experts": [1], "frozen_experts": [0], "expert_names": ["math", "logic", "math", "code"]},
        {"top_k": 4, "target_sparsity": 0.2, "initial_sparsity": 0.2},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_kind_of_expert(settings, tmp_path):
    model = adapted(**settings)
    before = logits(model)
    from_adapter(model).save_pretrained(tmp_path)
    read = SaRDinEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(read), before)
    if names := settings.get("expert_names"):
        assert read.config.expert_names == names and read.config.experts_named("math") == (0, 2)
        assert all(
            r.locked == (1,) and r.frozen == (0,)
            for layer in read.srde.layers.values()
            for r in layer.active_routers()
        )


def test_switched_off_it_is_the_base_and_experts_can_be_forced(folder):
    read = SaRDinEForCausalLM.from_pretrained(folder[0])
    with read.disable_adapter():
        assert torch.equal(logits(read), logits(tiny().eval()))
    model = adapted()
    for expert in (0, 3):
        with read.srde.force_experts(expert), model.srde.force_experts(expert):
            assert torch.equal(logits(read), logits(model))
    with read.srde.record() as record:
        logits(read)
    assert record.load().shape == (2, 4)
    assert torch.equal(logits(read), folder[1])


def test_in_bfloat16_the_experts_stay_float32(folder, tmp_path):
    read = SaRDinEForCausalLM.from_pretrained(folder[0], dtype=torch.bfloat16)
    kinds = {name: t.dtype for name, t in read.state_dict().items()}
    experts = {kind for name, kind in kinds.items() if ".srde_" in name}
    assert experts == {torch.float32, torch.int64} and {
        kinds[n] for n in kinds.keys() - read.expert_tensors()
    } == {torch.bfloat16}
    tiny().save_pretrained(tmp_path / "base")
    adapted().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert torch.equal(logits(read), logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()))


def test_sharded_and_saved_again(folder, tmp_path):
    read = SaRDinEForCausalLM.from_pretrained(folder[0])
    read.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert torch.equal(logits(SaRDinEForCausalLM.from_pretrained(tmp_path / "again")), folder[1])
    assert (tmp_path / "again/modeling_sardine.py").read_text() == (
        folder[0] / "modeling_sardine.py"
    ).read_text()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("sizes", [("5GB", "2KB"), ("2KB", "5GB")])
def test_a_second_save_in_other_shards_is_the_one_that_is_read(alone, folder, inside, sizes, tmp_path):
    read = SaRDinEForCausalLM.from_pretrained(folder[0] if inside else alone[0] / "made")
    read.save_pretrained(tmp_path / "twice", max_shard_size=sizes[0])
    for layer in read.srde.layers.values():
        layer.srde_experts["default"].values.data *= -1
    read.save_pretrained(tmp_path / "twice", max_shard_size=sizes[1])
    assert torch.equal(logits(SaRDinEForCausalLM.from_pretrained(tmp_path / "twice")), logits(read))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("size", ["5GB", "9KB"])
def test_tied_embeddings_are_saved_once_and_stay_tied(inside, size, tmp_path):
    tied = {"tie_word_embeddings": True}
    tiny(**tied).save_pretrained(tmp_path / "base")
    model = fill(get_peft_model(tiny(**tied), SrdeConfig(num_experts=4))).eval()
    before = logits(model)
    made = from_adapter(model, base_inside=inside, base_name=str(tmp_path / "base"))
    made.save_pretrained(tmp_path / "made", max_shard_size=size)
    read = SaRDinEForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.equal(logits(read), before) and read.config.tie_word_embeddings
    assert read.get_output_embeddings().weight is read.get_input_embeddings().weight
    read.save_pretrained(tmp_path / "again", max_shard_size=size)
    assert torch.equal(logits(SaRDinEForCausalLM.from_pretrained(tmp_path / "again")), before)


def test_the_auto_classes_know_it(folder):
    assert type(AutoConfig.from_pretrained(folder[0])) is SaRDinEConfig
    read = AutoModelForCausalLM.from_pretrained(
        folder[0]
    )  # without trust_remote_code: the class is the library's
    assert type(read) is SaRDinEForCausalLM and torch.equal(logits(read), folder[1])


def test_the_configuration_answers_for_the_base(folder):
    config = SaRDinEConfig.from_pretrained(folder[0])
    assert config.get_text_config().model_type == "llama"
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (64, 32, 2)
    assert config.mlps == {f"model.layers.{n}.mlp": 0 for n in range(2)} and len(config.layouts) == 1
    assert SaRDinEConfig(num_experts=3).num_experts_per_tok == 2


def test_a_new_model_has_zero_experts():
    config = SaRDinEConfig(base_config=tiny().config.to_dict(), num_experts=4, sparsity=0.1)
    made = SaRDinEForCausalLM(config).eval()
    before = logits(made)
    with made.disable_adapter():
        assert torch.equal(logits(made), before)
    delta = made.srde.layers["model.layers.0.mlp"].srde_experts["default"]
    assert delta.disjoint() and delta.index.shape == (4, 4)


# ---- the base elsewhere -----------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    """A folder of experts alone, their base, and the logits."""
    tiny().save_pretrained(tmp_path / "base")
    model = adapted()
    before = logits(model)
    made = from_adapter(model, base_inside=False, base_name=str(tmp_path / "base"))
    made.save_pretrained(tmp_path / "made")
    return tmp_path, before


def test_without_the_base_it_is_loaded_from_where_it_is(alone):
    folder, before = alone
    size = sum(file.stat().st_size for file in (folder / "made").glob("*.safetensors"))
    assert size < 0.5 * (folder / "base/model.safetensors").stat().st_size
    read = SaRDinEForCausalLM.from_pretrained(folder / "made")
    assert torch.equal(logits(read), before)
    read.save_pretrained(folder / "again", max_shard_size="2KB")
    assert len(list((folder / "again").glob("*.safetensors"))) > 1
    (folder / "base").rename(folder / "moved")
    with pytest.raises(OSError, match="base"):
        SaRDinEForCausalLM.from_pretrained(folder / "again")
    moved = SaRDinEForCausalLM.from_pretrained(
        folder / "again", base_model_name_or_path=str(folder / "moved")
    )
    assert torch.equal(logits(moved), before)
    half = SaRDinEForCausalLM.from_pretrained(
        folder / "again", base_model_name_or_path=str(folder / "moved"), dtype=torch.bfloat16
    )
    assert half.dtype == torch.bfloat16 and {t.dtype for t in half.expert_tensors().values()} == {
        torch.float32,
        torch.int64,
    }


def test_the_base_can_be_taken_in_later(alone):
    folder, before = alone
    read = SaRDinEForCausalLM.from_pretrained(folder / "made")
    read.config.base_inside = True
    read.save_pretrained(folder / "whole")
    (folder / "base").rename(folder / "gone")
    assert torch.equal(logits(SaRDinEForCausalLM.from_pretrained(folder / "whole")), before)


def test_another_base_is_refused(alone):
    folder, _ = alone
    tiny(seed=5).save_pretrained(folder / "other")
    with pytest.raises(ArtifactError, match="trained on other weights"):
        SaRDinEForCausalLM.from_pretrained(folder / "made", base_model_name_or_path=str(folder / "other"))


def test_experts_that_name_no_base_are_refused(alone):
    config = SaRDinEConfig.from_pretrained(alone[0] / "made")
    config.base_model_name_or_path = None
    with pytest.raises(ArtifactError, match="base_model_name_or_path"):
        SaRDinEForCausalLM.from_pretrained(alone[0] / "made", config=config)


def test_a_base_that_has_changed_is_not_left_out(alone):
    read = SaRDinEForCausalLM.from_pretrained(alone[0] / "made")
    read.resize_token_embeddings(80)
    with pytest.raises(UsageError, match="its vocabulary"):
        read.save_pretrained(alone[0] / "again")
    read.config.base_inside = True
    read.save_pretrained(alone[0] / "again")
    assert logits(SaRDinEForCausalLM.from_pretrained(alone[0] / "again")).shape[-1] == 80
    read = SaRDinEForCausalLM.from_pretrained(alone[0] / "made")
    read.base.lm_head.requires_grad_()
    with pytest.raises(UsageError, match=r"base.lm_head.weight"):
        read.save_pretrained(alone[0] / "other")


@pytest.mark.parametrize("inside", [True, False])
def test_settings_are_given_as_for_any_model(folder, alone, inside):
    place = folder[0] if inside else alone[0] / "made"
    read = SaRDinEForCausalLM.from_pretrained(
        place, use_cache=False, output_hidden_states=True, attn_implementation="eager"
    )
    assert read.base.config.use_cache is False and read.base.config._attn_implementation == "eager"
    with torch.no_grad():
        out = read(IDS)
    assert out.past_key_values is None and len(out.hidden_states) == 3
    own = SaRDinEConfig.from_pretrained(place)
    one = SaRDinEForCausalLM.from_pretrained(place, config=own, num_experts_per_tok=1)
    assert own.num_experts_per_tok == 2
    assert {r.top_k for layer in one.srde.layers.values() for r in layer.active_routers()} == {1}


def test_it_generates_from_embeddings(folder):
    read = SaRDinEForCausalLM.from_pretrained(folder[0])
    read.generation_config.pad_token_id = 0
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    text = read.generate(inputs_embeds=read.get_input_embeddings()(IDS), **given)
    assert torch.equal(text, read.generate(IDS, **given)[:, IDS.shape[1] :])


# ---- damaged and unfit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_tensors_that_do_not_fit_are_refused(alone, folder, inside, damage):
    from safetensors.torch import load_file, save_file

    place = folder[0] if inside else alone[0] / "made"
    tensors = load_file(place / "model.safetensors")
    name = "base.model.layers.1.mlp.srde_experts.default.values"
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        tensors[name.replace("layers.1", "layers.7")] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:, :, :1].contiguous()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ArtifactError, RuntimeError), match=damage if damage != "shape" else "shape|size"):
        SaRDinEForCausalLM.from_pretrained(place)


def test_what_cannot_be_one_model_is_refused():
    with pytest.raises(UsageError, match="no srde adapter"):
        from_adapter(tiny())
    with pytest.raises(UsageError, match="modules_to_save"):
        from_adapter(get_peft_model(tiny(), SrdeConfig(modules_to_save=["lm_head"])))
    with pytest.raises(UsageError, match="no such srde adapter"):
        from_adapter(adapted(), "other")


# ---- where and how the base lies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_layers_on_disk(inside, granularity, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = adapted(granularity=granularity)
    before = logits(model)
    from_adapter(model, base_inside=inside, base_name=str(tmp_path / "base")).save_pretrained(
        tmp_path / "made"
    )
    prefix = "base.model" if inside else "model"
    places = {f"{prefix}.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")}
    places |= {f"{prefix}.layers.1": "disk", prefix.removesuffix("model") + "lm_head": "cpu"}
    read = SaRDinEForCausalLM.from_pretrained(
        tmp_path / "made", device_map=places, offload_folder=tmp_path / "off"
    )
    assert any(p.is_meta for p in read.parameters())
    assert torch.equal(logits(read), before)
    assert torch.equal(generated(read), generated(adapted(granularity=granularity)))
    assert read.hf_device_map["base.model.layers.1"] == "disk"


def test_device_map_auto(folder):
    assert torch.equal(logits(SaRDinEForCausalLM.from_pretrained(folder[0], device_map="auto")), folder[1])


def test_deltas_that_are_offloaded_come_back_for_the_layer_that_is_not_a_block(tmp_path):
    model = from_adapter(adapted("opt"))
    before = logits(model)
    names = {name.split(".layers.")[0] for name in model.srde.layers}
    (root,) = names
    places = {"": "cpu"} | {f"base.{root}.layers.1": "disk"}
    model = dispatch_model(model, places, offload_dir=str(tmp_path), main_device="cpu")
    assert torch.equal(logits(model), before)


@pytest.mark.quant
@pytest.mark.parametrize("inside", [True, False])
def test_a_quantised_base(inside, tmp_path):
    from transformers import BitsAndBytesConfig

    tiny().save_pretrained(tmp_path / "base")
    model = adapted()
    before = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    from_adapter(model, base_inside=inside, base_name=str(tmp_path / "base")).save_pretrained(
        tmp_path / "made"
    )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    read = SaRDinEForCausalLM.from_pretrained(tmp_path / "made", quantization_config=nf4, dtype=torch.float32)
    block = read.srde.layers["model.layers.0.mlp"]
    assert (
        type(block.base_layer.gate_proj).__name__ == "Linear4bit"
        and block.srde_experts["default"].values.dtype == torch.float32
    )
    with read.disable_adapter():
        own = (logits(read) - plain).abs().max()  # the base's own error
    assert 0 < (logits(read) - before).abs().max() < 3 * own
    assert generated(read).shape == (2, IDS.shape[1] + 6)


@pytest.mark.quant
def test_an_int8_base(folder):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    read = SaRDinEForCausalLM.from_pretrained(
        folder[0], quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    assert 0 < (logits(read) - folder[1]).abs().max() < 0.1


# ---- what else users do with a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_a_base_of_several_modalities(inside, tmp_path):
    from transformers import AutoModelForImageTextToText, Mistral3Config

    torch.manual_seed(0)
    text = {"model_type": "mistral", **MODELS["mistral"], **SPECIAL}
    vision = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 32, "image_size": 28, "patch_size": 14}
    base = AutoModelForImageTextToText.from_config(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
    ).eval()
    base.save_pretrained(tmp_path / "base")
    model = fill(get_peft_model(base, SrdeConfig(num_experts=4, target_sparsity=0.05))).eval()
    before, written = logits(model), generated(model)
    from_adapter(model, base_inside=inside, base_name=str(tmp_path / "base")).save_pretrained(
        tmp_path / "made"
    )
    read = SaRDinEForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.equal(logits(read), before) and torch.equal(generated(read), written)


def test_lora_on_a_sardine_model(folder):
    from peft import LoraConfig

    read = get_peft_model(
        SaRDinEForCausalLM.from_pretrained(folder[0]),
        LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    ).eval()
    changed = logits(read)
    assert (changed - folder[1]).abs().max() > 1e-3
    with read.disable_adapter():
        assert torch.equal(logits(read), folder[1])
    torch.testing.assert_close(logits(read.merge_and_unload()), changed, atol=1e-5, rtol=0)


def test_loading_information_and_variants_with_the_base_elsewhere(alone):
    read, info = SaRDinEForCausalLM.from_pretrained(alone[0] / "made", output_loading_info=True)
    assert info["missing_keys"] == set()
    read.save_pretrained(alone[0] / "again", variant="fp32")
    assert (alone[0] / "again/model.fp32.safetensors").is_file()
    again = SaRDinEForCausalLM.from_pretrained(alone[0] / "again", variant="fp32")
    assert torch.equal(logits(again), alone[1])


def test_settings_that_trainers_set_reach_the_base(folder):
    read = SaRDinEForCausalLM.from_pretrained(folder[0])
    read.config.use_cache = False
    read.config.pad_token_id = read.config.eos_token_id = read.config.bos_token_id = 5
    assert (
        read.base.config.use_cache is False and read.base.config.pad_token_id == 5 == read.config.pad_token_id
    )
    with torch.no_grad():
        assert read(IDS).past_key_values is None
    assert "use_cache" not in {key for key in read.config.to_dict() if key != "base_config"}


@pytest.mark.security
@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "model.bin"])
@pytest.mark.parametrize("inside", [True, False])
def test_an_index_may_not_lead_out_of_the_folder(alone, folder, name, inside):
    import json

    place = folder[0] if inside else alone[0] / "made"
    (place / "model.safetensors").rename(alone[0] / "secret.safetensors")
    name = name.replace("/secret", f"{alone[0]}/secret") if name.startswith("/") else name
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": name}})
    )
    with pytest.raises(ArtifactError, match="files of the same folder"):
        SaRDinEForCausalLM.from_pretrained(place)


@pytest.mark.security
def test_a_configuration_that_promises_too_much_makes_no_room(alone):
    import json
    import resource

    file = alone[0] / "made/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": 3_000_000}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match="the configuration says"):
        SaRDinEForCausalLM.from_pretrained(alone[0] / "made")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", "8"), ("num_experts", 0), ("num_experts_per_tok", 5), ("num_experts_per_tok", 0), ("sparsity", 2),
        ("router_temperature", 0), ("granularity", "x"), ("expert_names", ["a"]), ("disabled_experts", [99]),
        ("disabled_experts", [0, 1, 2, 3]), ("mlps", {"model.layers.0.mlp": 7}), ("num_shared_experts", -1),
        ("layouts", [{"x": 1}]), ("layouts", "abc"), ("expert_names", [1, 2, 3, 4]), ("base_config", None),
    ],
)  # fmt: skip
def test_configurations_that_no_model_has_are_refused(folder, field, value):
    import json

    file = folder[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises((ConfigError, StrictDataclassFieldValidationError), match=field):
        SaRDinEForCausalLM.from_pretrained(folder[0])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["__class__", "model.layers.9.mlp", "model.layers.0.self_attn"])
def test_modules_that_the_base_has_not_are_refused(folder, alone, inside, name):
    import json

    file = (folder[0] if inside else alone[0] / "made") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mlps": {name: 0}}))
    with pytest.raises(ArtifactError, match=r"the base has no such module|are missing"):
        SaRDinEForCausalLM.from_pretrained(file.parent)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"x": 5}}'])
def test_an_index_that_is_none_is_refused(folder, alone, inside, content):
    place = folder[0] if inside else alone[0] / "made"
    (place / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ArtifactError, match="it must map names of tensors to files"):
        SaRDinEForCausalLM.from_pretrained(place)


def test_a_truncated_file_of_experts_is_named(alone):
    file = alone[0] / "made/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model.safetensors.*it is damaged"):
        SaRDinEForCausalLM.from_pretrained(alone[0] / "made")


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("damage", ["nan", "negative", "far"])
def test_damaged_numbers_are_refused(folder, alone, inside, damage):
    from safetensors.torch import load_file, save_file

    place = folder[0] if inside else alone[0] / "made"
    tensors = load_file(place / "model.safetensors")
    kind = "values" if damage == "nan" else "index"
    tensors[f"base.model.layers.1.mlp.srde_experts.default.{kind}"].view(-1)[3] = {
        "nan": float("nan"),
        "negative": -1,
        "far": 10**9,
    }[damage]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"experts of model.layers.1.mlp"):
        SaRDinEForCausalLM.from_pretrained(place)
