"""Settings that would have no effect, or that would lose something, are refused by name, value, rule and fix."""

import json
import os

import pytest
import torch

import srde.train.control
from data_sets import rows, write_rows
from srde.cli import main
from srde.errors import ConfigError
from srde.monitor.scrub import Scrubber
from srde.train.record import Record
from srde.train.resolve import resolve
from tiny import save_tiny

NEEDED = ["--model_name", "m", "--train_file", "t", "--output_dir", "o", "--use_cpu"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push_to_hub", "true"], "push_to_hub=True: srde train does not do this"),
        (["--save_only_model", "true"], "save_only_model=True: srde train does not do this"),
        (["--metric_for_best_model", "f1"], "metric_for_best_model='f1': srde train does not do this"),
        (["--train_sampling_strategy", "sequential"], "train_sampling_strategy='sequential': srde train does"),
        (["--use_muon", "--optim", "sgd"], "optim='sgd': --use_muon chooses the optimizer"),
        (["--expert_pretrain_steps", "5"], "expert_pretrain_steps=5: it does nothing without --supervised_experts"),
        (["--unlock_steps", "5"], "unlock_steps=5: it does nothing without --progressive_unlock"),
        (["--domain_experts", "math=1"], "domain_experts=['math=1']: it does nothing without"),
        (["--progressive_unlock", "warmup", "--max_steps", "20", "--unlock_steps", "99"], "unlock_steps=99: unlocking begins"),
        (["--prune_by", "importance", "--mask_init", "random"], "prune_by='importance': importance is what mask learning finds"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(words, message):
    with pytest.raises(ConfigError) as refused:
        resolve([*NEEDED, *words])
    assert message in str(refused.value)


def test_several_trackers_may_be_named():
    assert resolve([*NEEDED, "--report_to", "tensorboard", "wandb"]).run.report_to == ["tensorboard", "wandb"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    file = write_rows(folder / "rows.jsonl", rows(24, seed=1))
    words = ["train", "--model_name", str(save_tiny(folder / "base")), "--train_file", str(file), "--use_cpu"]
    return [
        *words,
        "--disable_tqdm",
        "true",
        "--max_steps",
        "4",
        "--max_length",
        "256",
        "--mask_init",
        "random",
    ]


def test_a_finished_run_without_checkpoints_is_not_overwritten_by_another(given, tmp_path, capsys):
    words = [*given, "--output_dir", str(tmp_path / "out"), "--save_strategy", "no"]
    assert main(words) == 0
    adapter = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    assert main([*words, "--seed", "3", "--learning_rate", "0.1"]) == 1
    error = capsys.readouterr().err
    assert "seed=3: out was made with 42; learning_rate=0.1 with 0.003" in error
    assert "--allow_changed seed learning_rate" in error
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == adapter


def test_a_folder_that_cannot_be_written_to_is_named(given, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*given, "--output_dir", str(tmp_path / "file")]) == 1
    assert f"output_dir={str(tmp_path / 'file')!r}: cannot be written to" in capsys.readouterr().err


def test_clusters_get_their_numbers_from_the_domains_also_without_supervision(given, tmp_path, monkeypatch):
    seen = []
    plain = srde.train.control.warm_start

    def watched(*args, **kwargs):
        seen.append(kwargs["expert_of"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(srde.train.control, "warm_start", watched)
    assert main([*given, "--output_dir", str(tmp_path / "out"), "--warm_start", "--num_experts", "4"]) == 0
    assert seen[0](torch.tensor([[-1, 0, 3, 5]])).tolist() == [[-1, 0, 3, 1]]


def test_the_load_that_is_logged_is_that_of_all_micro_batches(given, tmp_path):
    loads = []
    for name, more in (
        ("one", ["--per_device_train_batch_size", "2"]),
        ("two", ["--gradient_accumulation_steps", "2"]),
    ):
        words = [
            *given,
            "--output_dir",
            str(tmp_path / name),
            "--logging_steps",
            "1",
            "--learning_rate",
            "0",
        ]
        assert main([*words, *more, "--phase_warmup_steps", "0", "--delta_training_steps", "0"]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        loads.append(torch.tensor(lines[0]["expert_load"]))
    torch.testing.assert_close(*loads, atol=2e-5, rtol=0)


def test_secrets_of_the_environment_are_in_no_event(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_secretsecretsecret")
    record = Record(tmp_path, 10, 5, scrub=Scrubber(None, os.environ))
    record.fail("ConnectionError: hf_secretsecretsecret was refused")
    for name in ("events.jsonl", "heartbeat.json"):
        assert (
            "secretsecret" not in (tmp_path / name).read_text()
            and "[hidden]" in (tmp_path / name).read_text()
        )
