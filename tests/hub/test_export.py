"""`srde export`: SaRDinE folders and merged models, whole or not at all."""

import json
import os

import pytest
import torch
from adapters import fill
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from srde import SaRDinEForCausalLM, SrdeConfig
from srde.artifacts import verify
from srde.cli import main
from srde.errors import ArtifactError, ConfigError
from srde.hub.export import Source, export_merged, export_sardine
from srde.hub.merged import BOUNDS, merge
from srde.tuner.loading import load_adapter, load_base
from srde.tuner.store import save_adapter
from tiny import save_tiny

from peft import get_peft_model  # isort: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_activation_checkpointing` is deprecated:FutureWarning"),
]
NAMES = ["math", "logic", "math", "code"]
IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and an adapter on it."""
    folder = tmp_path_factory.mktemp("export")
    save_tiny(folder / "base")
    config = SrdeConfig(
        num_experts=4, target_sparsity=0.1, initial_sparsity=0.1, expert_names=NAMES, task_type="CAUSAL_LM"
    )
    model = fill(get_peft_model(load_base(str(folder / "base")), config))
    save_adapter(model, folder / "adapter")
    return folder


def routed(place):
    return load_adapter(str(place / "adapter"))[0]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def run(*argv):
    return main(["export", *map(str, argv)])


# ---- SaRDinE ------------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_model_that_says_what_the_adapter_says(place, tmp_path, capsys):
    out = tmp_path / "Mine-4x"
    assert run("--adapter", place / "adapter", "--output_dir", out, "--license", "apache-2.0") == 0
    assert f"SaRDinE model: {out}" in capsys.readouterr().out
    assert verify(out).metadata["kind"] == "sardine"
    assert torch.equal(logits(SaRDinEForCausalLM.from_pretrained(out)), logits(routed(place)))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template and tokenizer.decode(tokenizer("yes no")["input_ids"]) == "yes no"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "sardine" and config["architectures"] == ["SaRDinEForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_sardine.SaRDinEForCausalLM"
    assert str(place) not in (out / "config.json").read_text() + (out / "README.md").read_text()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "| 2 | math |" in card and "# Mine-4x" in card
    assert list(out.glob("*.pt")) == list(out.glob("*.bin")) == []


def test_without_the_base_and_in_shards(place, tmp_path):
    argv = (
        "--adapter",
        place / "adapter",
        "--output_dir",
        tmp_path / "out",
        "--without_base",
        "--max_shard_size",
        "10KB",
    )
    assert run(*argv) == 0
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and all(".srde_" in name for file in files for name in load_file(file))
    assert torch.equal(logits(SaRDinEForCausalLM.from_pretrained(tmp_path / "out")), logits(routed(place)))
    assert run(*argv) == 0  # what srde wrote it may replace
    (tmp_path / "out/mine.txt").write_text("keep me")
    assert run(*argv) == 1 and (tmp_path / "out/mine.txt").read_text() == "keep me"


def test_the_card_shows_what_was_measured(place, tmp_path):
    domains = {
        name: {"rows": 7, "accuracy": 0.5, "accuracy_se": 0.125, "loss": 1.25, "loss_se": 0.5}
        for name in ("math", "code")
    }
    base = {name: one | {"accuracy": None, "loss": 2.5, "loss_se": None} for name, one in domains.items()}
    results = {
        "srde": {"domains": domains, "all": domains["math"]},
        "base": {"domains": base, "all": base["math"]},
        "routing": {"domain_expert": {"math": [0.7, 0.1, 0.1, 0.1], "code": [0.2, 0.1, 0.1, 0.6]}},
    }
    (tmp_path / "eval_results.json").write_text(json.dumps(results))
    export_sardine(
        Source(str(place / "adapter")), tmp_path / "out", eval_results=tmp_path / "eval_results.json"
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "| math | 7 | - | 50.0 % ± 12.5 | 2.500 | 1.250 ± 0.500 |" in card
    assert (
        "| 0 | math |" in card
        and "math (70 %), code (20 %) |" in card
        and "code (60 %), math (10 %) |" in card
    )
    for bad in ("{", "[]", '{"srde": 1}'):
        (tmp_path / "eval_results.json").write_text(bad)
        with pytest.raises(ConfigError, match="eval_results"):
            export_sardine(
                Source(str(place / "adapter")),
                tmp_path / "other",
                eval_results=tmp_path / "eval_results.json",
            )
    assert not (tmp_path / "other").exists()


def test_a_write_that_fails_leaves_the_old_one(place, tmp_path, monkeypatch):
    source = Source(str(place / "adapter"))
    export_sardine(source, tmp_path / "out")
    before = (tmp_path / "out/MANIFEST.json").read_bytes()
    monkeypatch.setattr("srde.hub.export.sardine_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_sardine(source, tmp_path / "out")
    assert (tmp_path / "out/MANIFEST.json").read_bytes() == before and verify(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--expert", "math"], "expert='math': it does not go with --format sardine"),
        (
            ["--format", "merged", "--expert", "0", "--without_base"],
            "without_base=True: it does not go with --format merged",
        ),
        (["--format", "merged"], "a merged model folds in one expert or one mixture"),
        (
            ["--format", "merged", "--expert", "0", "--weights", "0=1"],
            "a merged model folds in one expert or one mixture",
        ),
        (
            ["--format", "merged", "--expert", "chess"],
            "expert='chess': the adapter's experts are numbered 0 to 3, named math",
        ),
        (
            ["--format", "merged", "--weights", "math:1"],
            "an entry is an expert that no other entry names, '=' and a number",
        ),
        (
            ["--format", "merged", "--weights", "math=nan"],
            "an entry is an expert that no other entry names, '=' and a number",
        ),
        (["--push_to_hub", "nobody"], "it must name its owner"),
        (
            ["--push_to_hub", "me/it", "--without_base"],
            "others cannot load a base from a place on this machine",
        ),
    ],
)
def test_wrong_commands(place, tmp_path, argv, message, capsys):
    assert run("--adapter", place / "adapter", "--output_dir", tmp_path / "out", *argv) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_adapter_is_not_written_over(place, tmp_path, capsys):
    save_adapter(routed(place), tmp_path / "mine")
    (tmp_path / "mine/README.md").unlink(
        missing_ok=True
    )  # or the folder is refused for this file that srde did not write
    before = {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}
    for how in ([], ["--format", "merged", "--expert", "0"]):
        assert run("--adapter", tmp_path / "mine", "--output_dir", tmp_path / "mine", *how) == 1
        assert "it is of kind adapter" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()} == before


# ---- merged -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "gates"),
    [
        (["--expert", "code"], [0, 0, 0, 1]),
        (["--expert", "1"], [0, 1, 0, 0]),
        (["--expert", "math"], [0.5, 0, 0.5, 0]),
        (["--weights", "math=0.6,3=0.3,logic=-0.2"], [0.3, -0.2, 0.3, 0.3]),
    ],
    ids=["name", "number", "shared name", "mixture"],
)
def test_a_merged_model_is_plain_and_says_what_the_experts_say(place, tmp_path, choice, gates, capsys):
    assert (
        run("--adapter", place / "adapter", "--output_dir", tmp_path / "out", "--format", "merged", *choice)
        == 0
    )
    assert "largest logit difference" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__module__.startswith("transformers.models.llama") and not hasattr(model, "srde")
    assert not any("srde" in name for name, _ in model.named_modules())
    for file in (tmp_path / "out").iterdir():
        if file.name != "MANIFEST.json":  # which names the format of the folder
            assert b"srde" not in file.read_bytes().lower() and b"sardine" not in file.read_bytes().lower(), (
                file
            )
    reference = load_base(str(place / "base"))  # W + sum of gates times deltas, matrix by matrix
    for name, layer in routed(place).srde.layers.items():
        block = reference.get_submodule(name)
        dense = layer.srde_experts["default"].dense(torch.tensor(gates, dtype=torch.float32))
        for linear, delta in zip((block.gate_proj, block.up_proj, block.down_proj), dense, strict=True):
            linear.weight.data += delta
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=0)
    assert (logits(model) - logits(load_base(str(place / "base")))).abs().max() > 1e-2


def test_a_difference_over_the_bound_is_refused(place, tmp_path, capsys):
    argv = (
        "--adapter",
        place / "adapter",
        "--output_dir",
        tmp_path / "out",
        "--format",
        "merged",
        "--expert",
        "0",
    )
    assert run(*argv, "--max_logit_difference", "0") == 1
    assert (
        "logits may differ from the adapter's by 0" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_a_wrong_merge_is_found(place, monkeypatch):
    model, tokenizer = load_adapter(str(place / "adapter"))
    whole = type(model.base_model).merge_and_unload
    monkeypatch.setattr(type(model.base_model), "merge_and_unload", lambda self, **how: whole(self, expert=1))
    with pytest.raises(ArtifactError, match="logits may differ"):
        merge(model, tokenizer, expert=0)


def test_a_merge_that_forgets_the_experts_is_found_whatever_the_bound(place, monkeypatch):
    model, tokenizer = load_adapter(str(place / "adapter"), "bfloat16")
    for layer in model.srde.layers.values():
        layer.srde_experts["default"].values.data *= 0.1  # a small change: within the bound of bfloat16
    whole = type(model.base_model).merge_and_unload
    monkeypatch.setattr(
        type(model.base_model), "merge_and_unload", lambda self, **how: whole(self, weights=[-1.0, 0, 0, 0])
    )
    with pytest.raises(ArtifactError, match="rounding changed it more than the experts do"):
        merge(model, tokenizer, expert=0)


def test_every_type_has_a_bound_and_bfloat16_keeps_it(place):
    model, tokenizer = load_adapter(str(place / "adapter"), "bfloat16")
    plain, parity = merge(model, tokenizer, expert=2)
    assert plain.dtype == torch.bfloat16 and 0 < parity.largest <= parity.bound == BOUNDS[
        torch.bfloat16
    ] * max(parity.scale, 1)
    assert parity.same_next > 0.5 and parity.positions > 50 and parity.as_json()["dtype"] == "bfloat16"


def test_mixtures_are_read_by_name_and_number():
    config = SrdeConfig(num_experts=4, expert_names=NAMES)
    assert config.mixture("math=0.5, 1=2") == [0.25, 2.0, 0.25, 0.0]
    assert config.mixture("0=0.5,2=-1") == [0.5, 0.0, -1.0, 0.0]
    with pytest.raises(ConfigError, match="no other entry names"):
        config.mixture("0=0.5,math=1")


CONVERTER = """
import sys, pathlib
folder, _, out, _, kind = sys.argv[1:]
assert (pathlib.Path(folder) / "model.safetensors").is_file() and (pathlib.Path(folder) / "tokenizer.json").is_file()
if kind == "f16":
    sys.exit("it knows no such architecture")
pathlib.Path(out).write_text(kind)
"""


def test_gguf_goes_through_llama_cpp_s_converter(place, tmp_path, capsys):
    argv = (
        "--adapter",
        place / "adapter",
        "--output_dir",
        tmp_path / "out",
        "--format",
        "merged",
        "--expert",
        "0",
    )
    assert run(*argv, "--gguf", "q8_0", "--llama_cpp", tmp_path / "llama") == 1
    assert "it must be a folder with llama.cpp's convert_hf_to_gguf.py" in capsys.readouterr().err
    script = (
        tmp_path / "llama/vendor/llama.cpp/convert_hf_to_gguf.py"
    )  # as in llama-cpp-python's source package
    script.parent.mkdir(parents=True)
    script.write_text(CONVERTER)
    assert run(*argv, "--gguf", "f16", "--llama_cpp", tmp_path / "llama") == 1
    assert (
        "did not write it (it knows no such architecture)" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )
    assert run(*argv, "--gguf", "q7", "--llama_cpp", tmp_path / "llama") == 1
    assert run(*argv, "--gguf", "q8_0", "--llama_cpp", tmp_path / "llama") == 0
    assert (tmp_path / "out/model-q8_0.gguf").read_text() == "q8_0"
    assert "model-q8_0.gguf" in {entry.file for entry in verify(tmp_path / "out").files}


@pytest.mark.slow
def test_llama_cpp_says_what_the_merged_model_says(smollm2, tmp_path):
    """Needs llama-cpp-python, and in SRDE_LLAMA_CPP its unpacked source, which has the converter."""
    llama_cpp = pytest.importorskip("llama_cpp")
    if not (source := os.environ.get("SRDE_LLAMA_CPP")):
        pytest.skip("SRDE_LLAMA_CPP does not name the source of llama.cpp")
    config = SrdeConfig(num_experts=2, target_sparsity=0.02, mask_init="random", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(str(smollm2)), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".values" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, tmp_path / "adapter")
    export_merged(Source(str(tmp_path / "adapter")), tmp_path / "out", expert=1, gguf="f32", llama_cpp=source)
    engine = llama_cpp.Llama(str(tmp_path / "out/model-f32.gguf"), n_ctx=256, verbose=False)
    plain, tokenizer = (
        load_base(str(tmp_path / "out"), "float32"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    for question in ("What is 17 + 25?", "Name a colour.", "What is the capital of France?"):
        turns = [{"role": "user", "content": question}]
        got = engine.create_chat_completion(turns, temperature=0, max_tokens=16)["choices"][0]["message"][
            "content"
        ]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = plain.generate(
            **inputs, max_new_tokens=16, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        assert (
            got.strip()
            == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
