"""`srde config`: the settings of a file, checked and shown."""

import pytest
import yaml

from srde.cli import main

TEXT = (
    "model_name_or_path: m\ntrain_file: t.jsonl\noutput_dir: out\nuse_cpu: true\nmax_steps: 300\n"
    "webhook_url: https://discord.com/api/webhooks/1/secret\n"
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def test_a_good_file_is_said_to_be_good(file, capsys):
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: srde train takes these settings; 300 steps in 4 phases\n"
    assert main(["config", "check", str(file), "--mask_init=random", "--phase-warmup-steps", "0"]) == 0
    assert "300 steps in 2 phases" in capsys.readouterr().out
    assert main(["config", "check", str(file), "--max_steps", "-1", "--num_train_epochs", "2"]) == 0
    assert "the steps follow from the data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("max_stepz: 3\n", [], "key in FILE, line 7='max_stepz': srde train has no such flag. the nearest is max_steps."),
        ("top_k: 20\n", [], "FILE: top_k=20: a token can use at most num_experts=8 experts. set top_k to 8 or fewer"),
        ("mask_learning_steps: 0\n", [], "FILE: mask_learning_steps=0: mask_init='learned' needs steps to learn them in."),
        ("", ["--max_stepz", "3"], "argument='--max_stepz': srde train has no such flag. the nearest is --max_steps."),
        ("", ["--max_steps", "1"], "max_steps=1: the first 1 steps train nothing"),
        ("", ["other.yaml"], "argument='other.yaml': srde train has no such flag."),
    ],
)  # fmt: skip
def test_a_bad_one_ends_with_the_reason_and_exit_1(file, capsys, text, flags, message):
    file.write_text(TEXT + text)
    assert main(["config", "check", str(file), *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"srde config: {message.replace('FILE', str(file))}"), error


def test_a_missing_file_ends_with_exit_1(capsys):
    assert main(["config", "check", "/nowhere.yaml"]) == 1
    assert "config='/nowhere.yaml': it cannot be read" in capsys.readouterr().err


def test_what_is_shown_is_a_file_and_the_phases(file, capsys):
    assert main(["config", "show", str(file), "--supervised_experts", "--top_k", "1"]) == 0
    out = capsys.readouterr().out
    shown = yaml.safe_load(out)
    assert shown == yaml.safe_load(TEXT) | {"supervised_experts": True, "top_k": 1, "webhook_url": "***"}
    table = [line.split()[1:] for line in out.splitlines() if line.startswith("# ")]
    assert table == [
        ["phase", "from", "to", "steps"],
        ["warm_up", "0", "6", "6"],
        ["mask_learning", "6", "36", "30"],
        ["expert_pretraining", "36", "66", "30"],
        ["delta_training", "66", "96", "30"],
        ["joint", "96", "300", "204"],
    ]


def test_all_shows_the_defaults_after_what_differs(file, capsys):
    for place in ([str(file), "--all"], ["--all", str(file)]):
        assert main(["config", "show", *place]) == 0
        first, rest = capsys.readouterr().out.split("# as by default\n")
        assert "max_steps: 300" in first and "num_experts" not in first
        rest = yaml.safe_load(rest)
        assert rest["num_experts"] == 8 and rest["learning_rate"] == 0.003 and rest["hub_token"] is None
        assert not set(rest) & set(yaml.safe_load(first))
