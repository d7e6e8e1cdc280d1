"""`srde plan` as a command: what it prints and writes, what it loads, what it says to bad input."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest
import torch
from real import config_of
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from srde import SrdeConfig
from srde.cli import main
from srde.errors import ConfigError, UnsupportedModelError
from srde.plan import Request, make_plan
from srde.plan.base import build_base, read_config
from srde.plan.table import as_table, headline

TINY_TEXT = {
    "model_type": "ministral3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "pad_token_id": 0,
}  # fmt: skip
TINY_EYES = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip
MINISTRAL = "docs/examples/ministral-3-14b/config.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    config_of("llama").save_pretrained(folder)
    return folder


def test_it_prints_a_table_and_writes_json(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a plan loads no weights")
    )
    out = tmp_path / "plan.json"
    flags = ["--batch_size", "1", "4", "--max_length", "16", "--target_sparsity", "0.05", "--json", str(out)]
    assert main(["plan", "--model_name_or_path", str(llama / "config.json"), *flags]) == 0
    text = capsys.readouterr().out
    assert "srde 5%" in text and "LoRA" in text and "total 4x16, NF4" in text
    figures = json.loads(out.read_text())
    assert [(run["batch_size"], run["length"]) for run in figures["base"]["runs"]] == [(1, 16), (4, 16)]
    assert [adapter["kind"] for adapter in figures["adapters"]] == ["srde", "lora"]
    assert figures["settings"]["initial_sparsity"] == figures["settings"]["target_sparsity"] == 0.05


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_table_fits_80_columns(llama, checkpointing):
    plan = make_plan(Request(str(llama), SrdeConfig(), lengths=(16,)))
    console = Console(width=80, record=True, file=StringIO())
    console.print(as_table(plan, checkpointing))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert any(line.strip().startswith("total 1x16, bf16" + ", ckpt" * checkpointing) for line in lines)
    assert "2 MLPs of 3 matrices 64 x 512" in headline(plan)


@pytest.mark.slow
def test_what_grows_with_the_batch_grows_with_the_batch(llama):
    plan = make_plan(
        Request(
            str(llama), SrdeConfig(initial_sparsity=0.01), batch_sizes=(1, 3), lengths=(16,), packing=False
        )
    )
    one, three = plan.adapters[0].runs
    assert three.kv_bytes == 3 * one.kv_bytes
    assert three.step.activation_bytes == pytest.approx(3 * one.step.activation_bytes, rel=0.1)
    base, adapter = plan.base, plan.adapters[0]
    assert plan.train_bytes(one, adapter, "plain", True) < plan.train_bytes(one, adapter, "plain", False)
    assert plan.serve_bytes(one, adapter, "nf4") < plan.serve_bytes(one, adapter, "int8")
    assert (
        plan.serve_bytes(base.runs[0], None, "plain") == base.weights.plain + base.runs[0].prefill_peak_bytes
    )


def test_a_model_of_several_modalities(tmp_path):
    config = AutoConfig.for_model("mistral3", text_config=TINY_TEXT, vision_config=TINY_EYES)
    config.save_pretrained(tmp_path)
    plan = make_plan(
        Request(str(tmp_path), SrdeConfig(initial_sparsity=0.05, target_sparsity=0.05), lengths=(16,))
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert plan.base.architecture == "Mistral3ForConditionalGeneration"
    assert plan.base.parameters == model.num_parameters()
    assert (plan.base.mlps, plan.base.hidden_size) == (2, 64)
    text = (
        sum(p.nbytes for p in model.get_decoder().parameters()) - model.get_input_embeddings().weight.nbytes
    )
    assert plan.base.decode_bytes == text + model.get_output_embeddings().weight.nbytes
    assert plan.adapters[0].trainable_parameters == 2 * (8 * 3 * 6 * 64 + 8 * 64)


def test_ministral_3_14b_is_as_its_makers_say(request):
    base = build_base(read_config(str(request.config.rootpath / MINISTRAL)), torch.bfloat16)
    assert base.num_parameters() == 13_506_073_600  # "13.5B language model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"model_type": "llama",\n "hidden_size": }',
            r"config.json:2': it is not JSON: Expecting value.*whole and unedited",
        ),
        ("[1, 2]", "a model's configuration is a JSON object with a model_type"),
        ('{"hidden_size": 8}', "a model's configuration is a JSON object with a model_type"),
        ('{"model_type": "lama"}', "cannot read its configuration: .*does not recognize this architecture"),
        (
            '{"model_type": "llama", "hidden_size": "abc"}',
            "cannot read its configuration: .*'hidden_size' expected int",
        ),
        (
            '{"model_type": "gpt2", "n_embd": 65, "n_head": 4}',
            "its configuration does not build: .*divisible",
        ),
        (
            '{"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}',
            "cannot read its configuration: .*custom code",
        ),
    ],
)
def test_bad_configurations(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        make_plan(Request(str(tmp_path), SrdeConfig()))


def test_bad_names(tmp_path):
    for name in ("./nowhere", "/nowhere/at/all", "nowhere.json", "a/b/c"):
        with pytest.raises(
            ConfigError, match=f"model_name_or_path='{name}': there is no such file or folder"
        ):
            read_config(name)
    with pytest.raises(ConfigError, match="the folder holds no config"):
        read_config(str(tmp_path))
    with pytest.raises(ConfigError, match="it is no local path, and the hub gave no configuration"):
        read_config("nobody/nothing")


def test_models_that_cannot_carry_experts(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match="model_type='t5': Transformers has no causal language model of this"
    ):
        make_plan(Request(str(tmp_path), SrdeConfig()))
    AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1, vocab_size=64).save_pretrained(
        tmp_path
    )
    with pytest.raises(UnsupportedModelError, match="no MLP of this model can carry experts"):
        make_plan(Request(str(tmp_path), SrdeConfig()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_kk", "3"], "argument='--top_kk': srde plan has no such flag. the nearest is --top_k."),
        (["--qqq"], "argument='--qqq': srde plan has no such flag. see srde plan --help."),
        (["--top_k", "9"], "top_k=9: a token can use at most num_experts=8 experts"),
        (["--target_sparsity", "5"], "a sparsity is the share of weights an expert rewrites"),
        (["--layers_to_transform", "7"], "layer 7 has no MLP; the model has them in layers 0 to 1"),
        (["--batch_size", "0"], "batch_size=0: it must be a whole number of at least 1. use 1 or more."),
        (
            ["--max_length", "4096"],
            "max_length=4096: the model has positions for 2048 tokens. use 2048 or less.",
        ),
    ],
)
def test_bad_flags(llama, capsys, flags, message):
    assert main(["plan", "--model_name_or_path", str(llama), *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_flag_without_its_value(capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--model_name_or_path"])
    assert end.value.code == 2
    assert "expected one argument" in capsys.readouterr().err


@pytest.mark.slow
def test_the_guide_shows_what_the_command_prints(request, capsys, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("COLUMNS", "100")
    guide = Path("docs/guides/plan.md").read_text()
    command = re.search(r"^\$ srde (plan .+)$", guide, flags=re.MULTILINE)[1]
    assert main(command.split()) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.split("\nk, M, G, B")[0].splitlines()]
    assert "\n".join(printed).rstrip() in guide
