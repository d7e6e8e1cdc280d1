"""`srde train` from the command line to the saved adapter."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
)

from srde.artifacts import verify
from srde.cli import main
from srde.data.quickstart import build_quickstart
from srde.train.arguments import parse
from srde.tuner.loading import load_adapter
from tiny import VOCABULARY, save_tiny, tiny_tokenizer

QUICK = [
    "--max_steps",
    "4",
    "--max_length",
    "256",
    "--logging_steps",
    "1",
    "--disable_tqdm",
    "true",
    "--use_cpu",
    "true",
]
SMALL = ["--num_experts", "3", "--initial_sparsity", "0.25", "--target_sparsity", "0.1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_quickstart(tmp_path_factory.mktemp("data"), train_per_domain=6, test_per_domain=2, seed=0)


@pytest.fixture(scope="module", params=["llama", "opt"])
def base(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


def train(base, data, out, *more):
    argv = [
        "train",
        "--model_name_or_path",
        str(base),
        "--train_file",
        str(data.train),
        "--output_dir",
        str(out),
    ]
    return main([*argv, *QUICK, *SMALL, *more])


def test_one_run_prunes_saves_and_loads_to_the_same_logits(base, data, tmp_path, capsys):
    """Llama is packed, OPT cannot isolate packed rows and is padded: both must train."""
    out = tmp_path / "out"
    assert train(base, data, out) == 0
    assert f"adapter: {out}" in capsys.readouterr().out
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["sparsity"] == pytest.approx(0.1) and config["base_model_name_or_path"] == str(base)
    verify(out, only=("adapter_config.json", "adapter_model.safetensors"))
    results = json.loads((out / "train_results.json").read_text())
    assert results["packed"] == ("llama" in str(base)) and results["rows"] == 36 and len(results["log"]) == 5
    model, tokenizer = load_adapter(str(out))
    for layer in model.srde.layers.values():
        delta = layer.srde_experts["default"]
        assert delta.index.shape == (3, 4) and delta.values.abs().max() > 0  # 10 % of 48 neurons
    ids = tokenizer("what is 1", return_tensors="pt").input_ids
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_the_same_seed_gives_the_same_adapter(data, tmp_path):
    base = save_tiny(tmp_path / "base")
    folders = [tmp_path / "one", tmp_path / "two"]
    for out in folders:
        train(base, data, out)
    assert (folders[0] / "adapter_model.safetensors").read_bytes() == (
        folders[1] / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_masks_by_gradient_are_chosen_on_the_runs_own_data(data, tmp_path, granularity):
    base = save_tiny(tmp_path / "base")
    indexes = []
    for rule in ("gradient", "magnitude"):
        train(
            base, data, tmp_path / rule, "--mask_init", rule, "--granularity", granularity, "--max_steps", "1"
        )
        model, _ = load_adapter(str(tmp_path / rule))
        indexes.append(
            torch.cat([layer.srde_experts["default"].index.flatten() for layer in model.srde.layers.values()])
        )
    assert not torch.equal(*indexes)


def test_training_lowers_the_loss(tmp_path):
    base = save_tiny(tmp_path / "base")
    rows = [{"prompt": f"what is {n}", "response": "yes yes yes yes"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["--train_file", str(tmp_path / "rows.jsonl"), "--max_steps", "20", "--learning_rate", "0.1"]
    argv = [
        "train",
        "--model_name_or_path",
        str(base),
        "--output_dir",
        str(tmp_path / "out"),
        *QUICK,
        *SMALL,
        *more,
    ]
    assert main(argv) == 0
    log = [
        entry["loss"]
        for entry in json.loads((tmp_path / "out/train_results.json").read_text())["log"]
        if "loss" in entry
    ]
    assert (
        max(log[-3:]) < log[0] - 0.3
    )  # of a random frozen base: most of the loss is out of the experts' reach


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_stepz", "3"], "argument='--max_stepz': srde train has no such flag. the nearest is --max_steps."),
        (["--top_k", "4"], "top_k=4: a token can use at most num_experts=3 experts"),
        (["--target_sparsity", "0.5"], "target_sparsity=0.5: training prunes, so the target cannot lie above"),
        (["--layers_to_transform", "7"], "layers_to_transform=[7]: layer 7 has no MLP; the model has them in layers 0 to 1"),
        (["--max_length", "1"], "max_length=1: a row needs at least 2 tokens"),
        (["--max_length", "4"], "nothing is left to train on. Set --max_length to"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "eval_strategy="),
        (["--dtype", "int3"], "dtype='int3': it must be one of auto, float32, bfloat16, float16"),
        (["--model_name_or_path", "/nowhere"], "model_name_or_path='/nowhere': it must be a folder or a hub id"),
        (["--train_file", "/nowhere.jsonl"], "/nowhere.jsonl: file: does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(data, tmp_path, capsys, more, message):
    base = save_tiny(tmp_path / "base")
    assert train(base, data, tmp_path / "out", *more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("srde train: ") and message in error, error
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "response": "b"', ":2: row: is not JSON"),
        ('{"prompt": "a"}', ":2: response: is missing"),
        ('{"prompt": "a", "response": " "}', ":2: response: is empty"),
    ],
)
def test_a_broken_row_is_named_by_file_line_and_field(tmp_path, capsys, line, message):
    base = save_tiny(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    argv = [
        "train",
        "--model_name_or_path",
        str(base),
        "--train_file",
        str(rows),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 1
    assert f"{rows}{message}" in capsys.readouterr().err


def test_a_checkpoint_of_several_modalities_is_trained_and_loaded(data, tmp_path):
    """Ministral-3's checkpoints are such: the experts go into the text decoder."""
    text = Ministral3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
    Mistral3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    assert train(tmp_path / "base", data, tmp_path / "out") == 0
    model, _ = load_adapter(str(tmp_path / "out"))
    assert all("language_model" in name for name in model.srde.layers) and len(model.srde.layers) == 2


def test_the_address_of_the_webhook_is_in_nothing_that_a_run_leaves(data, tmp_path):
    base = save_tiny(tmp_path / "base")
    secret = ["--webhook_url", "https://hooks.example.invalid/services/SECRETSECRET"]
    train(base, data, tmp_path / "out", "--report_to", "tensorboard", *secret)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if b"SECRETSECRET" in path.read_bytes()] == []
    assert "SECRETSECRET" not in str(
        parse(["--model_name", "m", "--train_file", "t", "--output_dir", "o", *secret])
    )


@pytest.mark.slow
def test_other_held_out_rows_are_refused_on_resume_or_measured_anew(data, tmp_path, capsys):
    base, out = save_tiny(tmp_path / "base"), tmp_path / "out"
    more = ["--save_steps", "2", "--eval_steps", "2"]
    train(base, data, out, "--eval_file", str(data.test), *more)
    shutil.rmtree(out / "checkpoint-4")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(data.test.read_text().splitlines(keepends=True)[:3]))
    assert train(base, data, out, "--eval_file", str(other), *more) == 1
    assert "eval_file=" in capsys.readouterr().err
    assert train(base, data, out, "--eval_file", str(other), *more, "--allow_changed", "eval_file") == 0
    results = json.loads((out / "train_results.json").read_text())
    fresh = tmp_path / "fresh"
    train(base, data, fresh, "--eval_file", str(other), *more)
    assert (
        results["base_eval_loss"] == json.loads((fresh / "train_results.json").read_text())["base_eval_loss"]
    )


@pytest.mark.slow
def test_what_is_done_once_is_not_done_again_by_a_longer_run(data, tmp_path, capsys):
    base, out = save_tiny(tmp_path / "base"), tmp_path / "out"
    train(
        base, data, out, "--mask_init", "learned", "--mask_learning_steps", "1", "--phase_warmup_steps", "1"
    )
    longer = [
        "--mask_init",
        "learned",
        "--phase_warmup_steps",
        "1",
        "--max_steps",
        "20",
        "--allow_changed",
        "max_steps",
    ]
    lengths = ["mask_learning_steps", "delta_training_steps"]
    assert train(base, data, out, "--mask_learning_steps", "9", *longer, *lengths) == 1
    assert "phases=[1, 9]: the run is at step 4" in capsys.readouterr().err
    assert train(base, data, out, "--mask_learning_steps", "1", *longer, *lengths) == 0
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["phase"] == "mask_learning"] == [2]
    assert steps[-1]["step"] == 20
