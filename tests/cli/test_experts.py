"""`srde experts`: each verb says what it did, and does it."""

import json
import shutil

import pytest
from adapters import config, fill, load_base
from peft import get_peft_model

from srde.cli import main as srde
from srde.cli.experts import VERBS, main
from srde.errors import ConfigError, UsageError
from srde.tuner.experts import read_adapter
from tiny import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny base and two adapters of it: one without names, one with."""
    folder = tmp_path_factory.mktemp("experts")
    tiny().save_pretrained(folder / "base")
    for seed, (name, names) in enumerate({"plain": None, "named": ["math", "logic", "code", "math"]}.items()):
        model = get_peft_model(load_base(folder / "base"), config(expert_names=names, num_shared_experts=1))
        fill(model, seed).save_pretrained(folder / name)
    return folder


@pytest.fixture
def adapter(folders, tmp_path):
    """A copy of the adapter with names."""
    return shutil.copytree(folders / "named", tmp_path / "named")


@pytest.fixture
def say(capsys, monkeypatch):
    """Runs a verb, and gives its exit status and what it printed."""
    monkeypatch.setenv("COLUMNS", "160")

    def said(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        return status, capsys.readouterr().out

    return said


def test_help_and_unknown_verbs(say, capsys):
    assert main([]) == 2 and main(["lst"]) == 2
    assert "Did you mean 'list'?" in capsys.readouterr().err
    status, out = say("--help")
    assert status == 0 and all(f"  {verb} " in out for verb in VERBS)
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0 and f"usage: srde experts {verb}" in capsys.readouterr().out


def test_it_is_a_verb_of_srde_and_says_in_one_line_what_is_wrong(adapter, capsys):
    assert srde(["experts", "diff", str(adapter), str(adapter)]) == 0
    assert srde(["experts", "show", "law", "--adapter", str(adapter)]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .startswith("srde experts: expert='law': the adapter's experts are numbered 0 to 3")
    )


def test_list_shows_every_expert(say, adapter, folders):
    status, out = say("list", "--adapter", adapter)
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert status == 0 and [row[1].strip() for row in rows] == ["math", "logic", "code", "math", "shared 0"]
    assert rows[0][2].strip() == "trained" and rows[4][2].strip() == "trained, shared" and "load" not in out
    found = json.loads(say("list", "--adapter", folders / "plain", "--json")[1])
    assert [one["name"] for one in found["experts"]] == ["0", "1", "2", "3", "shared 0"]


def test_list_shows_the_load_that_an_evaluation_or_a_run_has_seen(say, adapter):
    loads = {"a": [[2, 0, 0, 0, 1], [0, 2, 0, 0, 1]], "b": [[0, 0, 1, 1, 1]] * 2}
    domains = {name: {"expert_load": load} for name, load in loads.items()}
    (adapter / "eval_results.json").write_text(json.dumps({"srde": {"domains": domains}}))
    found = json.loads(say("list", "--adapter", adapter, "--json")[1])
    assert [one["load"] for one in found["experts"]] == [0.25, 0.25, 0.25, 0.25, None]
    assert "eval_results.json" in found["load_from"]
    (adapter / "eval_results.json").unlink()
    facts = {
        "phases": [],
        "layers": ["a", "b"],
        "model": "m",
        "heartbeat_steps": 1,
        "logging_steps": 1,
        "started": 0,
    }
    (adapter / "run.json").write_text(json.dumps({"format": 1, "max_steps": 2, "num_experts": 4} | facts))
    line = {"kind": "train", "step": 1, "phase": "joint", "loss": 1.0, "open_experts": 4}
    (adapter / "metrics.jsonl").write_text(
        json.dumps(line | {"expert_load": [[1, 1, 1, 1, 1], [3, 1, 0, 0, 1]]}) + "\n"
    )
    status, out = say("list", "--adapter", adapter)
    assert status == 0 and "load: from the run's last logged steps" in out and "50.0%" in out


def test_show_goes_layer_by_layer(say, adapter):
    status, out = say("show", "logic", "--adapter", adapter)
    assert status == 0 and "expert 1 (logic)" in out and "model.layers.1.mlp" in out
    found = json.loads(say("show", "2", "--adapter", adapter, "--json")[1])
    assert found["name"] == "code" and [one["rewritten"] for one in found["layers"]] == [2, 2]
    with pytest.raises(ConfigError, match="experts 0, 3 have this name"):
        say("show", "math", "--adapter", adapter)


def test_add_and_diff(say, adapter, tmp_path):
    status, out = say("add", "medicine", "--adapter", adapter, "--output_dir", tmp_path / "new")
    assert status == 0 and "expert 4 (medicine) is new and zero; it is disabled until it is trained" in out
    assert f"srde train --init_adapter {tmp_path / 'new'} --train_experts 4" in out
    assert say("diff", adapter, adapter)[0] == 0
    status, out = say("diff", adapter, tmp_path / "new")
    assert status == 1 and out.count("identical") == 5 and "only in" in out and "num_experts: 4 in" in out
    found = json.loads(say("diff", adapter, tmp_path / "new", "--json")[1])
    assert not found["identical"] and found["experts"][4]["only_in"] == str(tmp_path / "new")
    assert say("add", "again", "--from", "logic", "--adapter", tmp_path / "new")[1].startswith(
        "expert 5 (again) is a copy of expert 1;"
    )
    assert read_adapter(tmp_path / "new").config.expert_names[4:] == ["medicine", "again"]


def test_add_asks_for_names_where_there_are_none(say, folders, tmp_path):
    words = [
        "add",
        "medicine",
        "--adapter",
        folders / "plain",
        "--output_dir",
        tmp_path / "new",
        "--mask_init",
        "random",
    ]
    with pytest.raises(ConfigError, match="the adapter's 4 experts have no names yet"):
        say(*words, "--model_name_or_path", "/nowhere")
    say(*words, "--names", "domains")
    assert read_adapter(tmp_path / "new").config.expert_names == [
        "math",
        "logic",
        "code",
        "science",
        "medicine",
    ]


def test_freeze_disable_and_undo(say, adapter):
    assert "frozen: 0 (math), 3 (math)" in say("freeze", "math", "--adapter", adapter)[1]
    assert "disabled: 2 (code)" in say("disable", "2", "--adapter", adapter)[1]
    assert "frozen: 3 (math)" in say("freeze", "0", "--undo", "--adapter", adapter)[1]
    settings = read_adapter(adapter).config
    assert settings.frozen_experts == [3] and settings.disabled_experts == [2]
    assert "disabled: none" in say("disable", "code", "--undo", "--adapter", adapter)[1]
    assert "trained, frozen" in say("list", "--adapter", adapter)[1]


def test_name(say, folders, tmp_path):
    words = ["name", "--adapter", folders / "plain", "--output_dir", tmp_path / "new"]
    assert "0 (math), 1 (expert 1), 2 (code), 3 (expert 3)" in say(*words, "0=math", "2=code")[1]
    assert say("name", "--adapter", tmp_path / "new", "math=algebra")[1].startswith(
        "0 (algebra), 1 (expert 1)"
    )
    with pytest.raises(ConfigError, match="name='math': an entry is an expert, '=' and its name"):
        say("name", "--adapter", tmp_path / "new", "math")


def test_replace_says_that_the_routers_want_a_refit(say, folders, adapter, tmp_path):
    with pytest.raises(SystemExit):  # what an expert was is not overwritten unasked
        say("replace", "code", "--with", f"{folders / 'plain'}:1", "--adapter", adapter)
    words = [
        "replace",
        "code",
        "--with",
        f"{folders / 'plain'}:1",
        "--adapter",
        adapter,
        "--output_dir",
        tmp_path / "new",
    ]
    status, out = say(*words)
    assert status == 0 and f"expert 2 (code) is now expert 1 of {folders / 'plain'}" in out
    assert "the logits of two adapters' routers are not on one scale" in out and "--train_router_only" in out
    found = json.loads(say("diff", adapter, tmp_path / "new", "--json")[1])
    assert [one["number"] for one in found["experts"] if not one["identical"]] == [2] and found["experts"][2][
        "router"
    ] > 0
    with pytest.raises(UsageError, match="it exists, and nothing that was saved is overwritten"):
        say(*words)
    words[-1] = tmp_path / "kept"
    assert "its row of the routers is the old one" in say(*words, "--keep_router")[1]
    assert json.loads(say("diff", adapter, tmp_path / "kept", "--json")[1])["experts"][2]["router"] == 0
    with pytest.raises(ConfigError, match="it is a folder, ':' and an expert"):
        say("replace", "code", "--with", "plain", "--adapter", adapter, "--output_dir", tmp_path / "no")


def test_an_expert_that_is_taken_over_as_a_new_one_is_switched_on_by_hand(say, folders, adapter, tmp_path):
    say("add", "medicine", "--mask_init", "random", "--adapter", adapter)
    words = [
        "replace",
        "medicine",
        "--with",
        f"{folders / 'plain'}:0",
        "--adapter",
        adapter,
        "--output_dir",
        adapter,
    ]
    assert f"it is disabled: srde experts disable 4 --undo --adapter {adapter}" in say(*words)[1]
    assert "disabled: none" in say("disable", "4", "--undo", "--adapter", adapter)[1]


def test_a_checkpoint_is_not_changed_in_place(adapter, tmp_path):
    from srde.artifacts import verify, write_manifest

    (adapter / "optimizer.pt").write_bytes(b"state")
    write_manifest(adapter, {"kind": "checkpoint", "step": 8})
    with pytest.raises(UsageError, match="a checkpoint that its run may go on from"):
        main(["freeze", "0", "--adapter", str(adapter)])
    assert verify(adapter).metadata["kind"] == "checkpoint"
    assert main(["freeze", "0", "--adapter", str(adapter), "--output_dir", str(tmp_path / "new")]) == 0


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"srde": {"domains": {"a": {"expert_load": [[null, null, null, null]]}}}}']
)
def test_a_foreign_file_of_results_costs_the_load_alone(adapter, capsys, content):
    (adapter / "eval_results.json").write_text(content)
    assert main(["list", "--adapter", str(adapter)]) == 0
    said = capsys.readouterr()
    assert "logic" in said.out and ("no eval_results.json of srde eval" in said.err or "null" in content)
