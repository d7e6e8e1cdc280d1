"""The command line's own part: verbs, exit codes, and the errors that every verb shares."""

import json
import subprocess
import sys

import pytest

from srde.cli import VERBS, main
from srde.cli.data import VERBS as DATA_VERBS
from srde.cli.experts import VERBS as EXPERTS_VERBS
from srde.data.quickstart import build_quickstart
from tiny import save_tiny


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)
    assert main([]) == 2


def test_the_version_is_the_packages(capsys):
    import srde

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"srde {srde.__version__}\n"


def test_an_unknown_verb_gets_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "there is no verb 'trian'. Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb",
    [
        *([verb] for verb in VERBS if verb not in ("data", "experts")),
        *(["data", verb] for verb in DATA_VERBS),
        *(["experts", verb] for verb in EXPERTS_VERBS),
    ],
    ids="-".join,
)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as done:
        main([*verb, "--help"])
    assert done.value.code == 0 and f"srde {' '.join(verb)}" in capsys.readouterr().out


def test_a_group_of_verbs_lists_them(capsys):
    assert main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in DATA_VERBS)
    assert main(["data"]) == 2


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n" * 20_000)
    command = f"{sys.executable} -m srde data check {tmp_path / 'rows.jsonl'} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = build_quickstart(folder / "data", train_per_domain=4, test_per_domain=2, seed=0)
    base = save_tiny(folder / "base")
    argv = [
        "train",
        "--model_name_or_path",
        str(base),
        "--train_file",
        str(data.train),
        "--output_dir",
        str(folder / "out"),
    ]
    assert main([*argv, "--max_steps", "2", "--disable_tqdm", "true", "--use_cpu", "true"]) == 0
    return folder


def test_generate_answers_each_prompt_and_names_the_experts(trained, capsys):
    argv = [
        "generate",
        "--adapter",
        str(trained / "out"),
        "--prompt",
        "what is 1",
        "yes",
        "--max_new_tokens",
        "4",
    ]
    assert main([*argv, "--show_routing"]) == 0
    out = capsys.readouterr().out
    assert out.count("[expert ") == 2
    assert main([*argv, "--show_routing", "--expert", "3"]) == 0
    assert capsys.readouterr().out.count("[expert 3: 100 %") == 2
    assert main([*argv, "--show_routing", "--base"]) == 0
    assert "expert" not in capsys.readouterr().out


def test_sampling_needs_a_temperature_and_repeats_no_greedy_text(trained, capsys):
    argv = ["generate", "--adapter", str(trained / "out"), "--prompt", "what is 1", "--max_new_tokens", "16"]
    texts = []
    for more in ([], [], ["--temperature", "5"]):
        assert main([*argv, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_eval_compares_with_the_base_and_writes_the_report(trained, capsys, tmp_path):
    argv = ["eval", "--adapter", str(trained / "out"), "--eval_file", str(trained / "data/test.jsonl")]
    assert main([*argv, "--compare_baseline", "--output_dir", str(tmp_path), "--max_new_tokens", "4"]) == 0
    assert "base" in capsys.readouterr().out
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert {"srde", "base", "difference"} <= set(results) and len(results["base"]["domains"]) == 6
    assert (tmp_path / "plots/routing.png").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--adapter", "/nowhere", "--prompt", "a"], "adapter='/nowhere': it must be a folder or hub id"),
        (["generate", "--adapter", "OUT", "--prompt", "a", "--expert", "8"], "expert='8': the adapter's experts are"),
        (["generate", "--adapter", "OUT", "--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens=0: an answer needs"),
        (["generate", "--adapter", "OUT", "--prompt", "a", "--temperature", "-1"], "temperature=-1.0: it must be at least 0"),
        (["eval", "--adapter", "OUT", "--eval_file", "/nowhere.jsonl"], "/nowhere.jsonl: file: does not exist"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_line_and_exit_1(trained, capsys, argv, message):
    assert main([str(trained / "out") if a == "OUT" else a for a in argv]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
