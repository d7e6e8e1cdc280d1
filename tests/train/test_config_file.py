"""Files of settings: what `--config` reads, what wins, and what is said about what is wrong."""

from dataclasses import asdict

import pytest
import yaml

from srde.errors import ConfigError, SrdeError
from srde.train.arguments import parse
from srde.train.resolve import MASK, as_yaml, changed, resolve, unchanged

NEEDED = ["--model_name_or_path", "m", "--train_file", "t.jsonl", "--output_dir", "out", "--use_cpu"]


@pytest.fixture
def file(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def settings(argv):
    """All settings of a command line by name."""
    return {name: value for part in parse(argv) for name, value in asdict(part).items()}


def read(path, *flags):
    return settings([*NEEDED, "--config", path, *flags])


def test_a_file_says_what_flags_say(file, tmp_path):
    path = file(
        "model_name_or_path: m\ntrain_file: t.jsonl\noutput_dir: out\nuse_cpu: true\nmax_steps: 7\nlearning_rate: 3e-3\n"
        "domain_experts: ['math=0,6', code=2]\nlayers_to_transform: [0, 1]\nwarm_start: kmeans\nwebhook_url: http://a/b?c=d#e\n"
    )
    want = [
        *NEEDED, "--max_steps", "7", "--learning_rate", "3e-3", "--domain_experts", "math=0,6", "code=2",
        "--layers_to_transform", "0", "1", "--warm_start", "kmeans", "--webhook_url", "http://a/b?c=d#e",
    ]  # fmt: skip
    assert settings(["--config", path]) == settings([f"--config={path}"]) == settings(want)


@pytest.mark.parametrize(
    "flag", [["--max_steps", "9"], ["--max_steps=9"], ["--max-steps", "9"], ["--max-steps=9"]]
)
@pytest.mark.parametrize("key", ["max_steps", "max-steps"])
def test_flags_win_over_the_file_in_all_their_forms(file, flag, key):
    path = file(f"{key}: 7\ntop_k: 1\n")
    for argv in ([*NEEDED, "--config", path, *flag], [*flag, "--config", path, *NEEDED]):
        found = settings(argv)
        assert found["max_steps"] == 9 and found["top_k"] == 1


@pytest.mark.parametrize(
    ("text", "flags", "name", "value"),
    [
        ("use_muon: true", [], "use_muon", True),
        ("packing: false", [], "packing", False),
        ("packing: no", [], "packing", False),
        ("no_packing: true", [], "packing", False),
        ("no_packing: false", [], "packing", True),
        ("no_packing: true", ["--packing", "true"], "packing", True),
        ("packing: true", ["--no_packing"], "packing", False),
        ("use_muon: true", ["--use_muon", "false"], "use_muon", False),
        ("eval_strategy: no", [], "eval_strategy", "no"),
        ("max_steps: null", [], "max_steps", 5000),
        ("max_steps:", [], "max_steps", 5000),
        ("target_modules: model.layers.0.mlp", [], "target_modules", ["model.layers.0.mlp"]),
        ("layers_to_transform: [0, 1]", ["--layers_to_transform", "2"], "layers_to_transform", [2]),
        ("lr_scheduler_kwargs: {a: false, b: [1, 2]}", [], "lr_scheduler_kwargs", {"a": False, "b": [1, 2]}),
        ("run_name: 12:30", [], "run_name", "12:30"),
        ("run_name: -x", [], "run_name", "-x"),
        ("run_name: 'null'", [], "run_name", "null"),
        ("learning_rate: 1e-2", [], "learning_rate", 0.01),
        ("# nothing", [], "max_steps", 5000),
        ("model_name: other", ["--model_name_or_path", "m2"], "model_name_or_path", "m2"),
        ("model_name_or_path: other", ["--model_name", "m2"], "model_name_or_path", "m2"),
        ("compile: true", [], "torch_compile", True),
        ("torch_compile: true", ["--compile=false"], "torch_compile", False),
    ],
)  # fmt: skip
def test_values_mean_what_they_say(file, text, flags, name, value):
    assert read(file(text), *flags)[name] == value


def test_the_aliases_stand_for_their_flags(file, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = file(
        f"model_name: m\njsonl_data: {tmp_path}/rows.jsonl\noutput_dir: out\ncompile: true\nuse_cpu: true\n"
    )
    found = settings(["--config", path])
    assert found["model_name_or_path"] == "m" and found["torch_compile"] is True
    assert found["train_file"] == f"{tmp_path}/rows.jsonl"
    flags = [
        "--model_name",
        "m",
        "--jsonl_data",
        f"{tmp_path}/rows.jsonl",
        "--output_dir",
        "out",
        "--compile",
        "--use_cpu",
    ]
    assert settings(flags) == found


@pytest.mark.parametrize("flag", ["--warm_start", "--warm-start"])
def test_warm_start_alone_is_kmeans_wherever_it_stands(file, flag):
    path = file("warm_start: domains\nmax_steps: 9\n")
    assert read(path)["warm_start"] == "domains"
    for argv in (
        [*NEEDED, "--config", path, flag],
        [flag, *NEEDED, "--config", path],
        [*NEEDED, flag, "--config", path],
    ):
        assert settings(argv)["warm_start"] == "kmeans"
    assert read(path, flag, "none")["warm_start"] == "none"


def test_of_several_files_the_later_wins_and_its_null_undoes_the_earlier(file):
    first = file("max_steps: 7\ntop_k: 1\nmodel_name: a\nseed: 1\n", "first.yaml")
    second = file("max-steps: 8\ntop_k: null\nmodel_name_or_path: b\n", "second.yaml")
    argv = ["--train_file", "t", "--output_dir", "o", "--use_cpu", "--config", first, "--config", second]
    found = settings(argv)
    assert [found[n] for n in ("max_steps", "top_k", "model_name_or_path", "seed")] == [8, 2, "b", 1]


def test_rows_named_by_a_flag_take_the_place_of_the_files(file, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = file(
        f"model_name: m\npretokenized_dir: set\njsonl_data: {tmp_path}/rows.jsonl\noutput_dir: o\nuse_cpu: true\n"
    )
    assert settings(["--config", path])["pretokenized_dir"] == "set"
    found = settings(["--config", path, "--train_file", "t.jsonl"])
    assert [found[n] for n in ("train_file", "pretokenized_dir", "jsonl_data")] == ["t.jsonl", None, None]
    found = settings(["--config", path, "--jsonl_data", f"{tmp_path}/rows.jsonl"])
    assert found["pretokenized_dir"] == "set"  # whose rows these are


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 3\nmax_stepz: 3", r"key in FILE, line 2='max_stepz': srde train has no such flag. the nearest is max_steps"),
        ("zzzz: 3", r"srde train has no such flag. see srde train --help."),
        ("help: true", r"srde train has no such flag"),
        ("config: other.yaml", r"srde train has no such flag"),
        ("max_steps: 3\nmax-steps: 4", r"key in FILE, line 2='max-steps': the file has set this before."),
        ("max_steps: [", r"config='FILE': it is not YAML \(line 1: "),
        ("- max_steps", r"config='FILE': it must hold settings, `key: value` on each line."),
        ("max_steps", r"config='FILE': it must hold settings"),
        ("max_steps: many", r"max_steps in FILE='many': it must be a whole number."),
        ("max_steps: 1.5", r"max_steps in FILE='1.5': it must be a whole number."),
        ("learning_rate: high", r"learning_rate in FILE='high': it must be a number."),
        ("use_muon: maybe", r"use_muon in FILE='maybe': it must be true or false."),
        ("no_packing: 3", r"no_packing in FILE='3': it must be true or false."),
        ("nan_policy: hope", r"nan_policy in FILE='hope': it must be one of stop, skip. pick one of them."),
        ("warm_start: true", r"warm_start in FILE='true': it must be one of none, kmeans, domains."),
        ("max_steps: [3, 4]", r"max_steps in FILE=\['3', '4'\]: it is one value and not a list."),
        ("target_modules: []", r"target_modules in FILE=\[\]: a list has values"),
        ("target_modules: [{a: b}]", r"a list has values, and each is a number or a word"),
        ("layers_to_transform: [0, x]", r"layers_to_transform in FILE='x': it must be a whole number."),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_name_and_the_rule(file, text, message):
    path = file(text)
    with pytest.raises(ConfigError, match=message.replace("FILE", path)):
        parse([*NEEDED, "--config", path])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"config='/nowhere.yaml': it cannot be read \(No such file or directory\)"
    ):
        parse([*NEEDED, "--config", "/nowhere.yaml"])
    with pytest.raises(ConfigError, match="config=None: a file is missing"):
        parse([*NEEDED, "--config"])
    (tmp_path / "latin.yaml").write_bytes(b"run_name: \xff\n")
    with pytest.raises(ConfigError, match="it is not YAML"):
        parse([*NEEDED, "--config", str(tmp_path / "latin.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_length: 1", "FILE: max_length=1: a row needs at least 2 tokens"),
        ("num_experts: 4\ntop_k: 5", "FILE: top_k=5: a token can use at most num_experts=4 experts"),
        ("target_sparsity: 0.5", "FILE: target_sparsity=0.5: training prunes"),
        ("max_steps: 3\nphase_warmup_steps: 3", r"FILE: max_steps=3: the first 4 steps train nothing"),
        ("phase_warmup_steps: -1", "FILE: phase_warmup_steps=-1: a phase has at least 0 steps"),
        ("domain_experts: [math=0,6]", "FILE: domain_experts='6': an entry is a domain, '=' and experts"),
        ("eval_strategy: sometimes", "FILE: settings=.*: Transformers refuses them: sometimes is not a valid"),
    ],
)  # fmt: skip
def test_resolving_finds_what_breaks_a_rule_between_settings(file, text, message):
    path = file(text)
    with pytest.raises(ConfigError, match=message.replace("FILE", path)):
        resolve([*NEEDED, "--config", path])


def test_what_a_flag_sets_is_not_blamed_on_the_file(file):
    path = file("max_length: 8\n")
    with pytest.raises(SrdeError, match=r"^max_length=1: "):
        resolve([*NEEDED, "--config", path, "--max_length", "1"])


def test_only_what_differs_is_shown_and_all_of_it_reads_back(file):
    flags = [
        "--max_steps", "40", "--domain_experts", "math=0,1", "--warm_start", "--activation_checkpointing",
        "--activation_checkpointing_kwargs", '{"use_reentrant": false}', "--eval_file", "e.jsonl", "--top_k", "1",
        "--lr_scheduler_type", "linear",
    ]  # fmt: skip
    resolved = resolve([*NEEDED, *flags])
    shown = yaml.safe_load(as_yaml(changed(resolved)))
    assert shown == {
        "model_name_or_path": "m", "train_file": "t.jsonl", "eval_file": "e.jsonl", "top_k": 1, "output_dir": "out",
        "max_steps": 40, "lr_scheduler_type": "linear", "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False}, "use_cpu": True, "warm_start": "kmeans",
        "domain_experts": ["math=0,1"],
    }  # fmt: skip
    path = file(as_yaml(changed(resolved)))
    again = resolve(["--config", path])
    assert (again.model, again.data, again.experts, again.phases) == (
        resolved.model, resolved.data, resolved.experts, resolved.phases
    )  # fmt: skip
    assert again.run.to_dict() == resolved.run.to_dict()
    both = file(as_yaml(changed(resolved)) + as_yaml(unchanged(resolved)), "both.yaml")
    assert resolve(["--config", both]).run.to_dict() == resolved.run.to_dict()


def test_secrets_are_not_shown():
    resolved = resolve([*NEEDED, "--webhook_url", "https://x/secret1", "--hub_token", "secret2"])
    shown = changed(resolved)
    assert shown["webhook_url"] == shown["hub_token"] == MASK
    assert "secret" not in as_yaml(shown) + as_yaml(unchanged(resolved))
    assert unchanged(resolve(NEEDED))["hub_token"] is None
