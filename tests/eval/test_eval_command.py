"""`srde eval` as it is typed, on a tiny adapter."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from eval_models import adapted
from srde.cli import main
from srde.cli.eval import FOR_ROWS, FOR_TASKS, _parser
from tiny import save_tiny

ROWS = [
    {"prompt": f"what is {n}", "response": str(n), "kind": "number", "answer": n, "domain": d, "source": s}
    for n, (d, s) in enumerate([("math", "sums"), ("math", "more"), ("logic", "sums"), ("logic", "sums")] * 2)
] + [{"prompt": "write f", "response": "def f(): 0", "kind": "code", "tests": "f()", "domain": "code"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, an adapter on it, and held-out rows."""
    home = tmp_path_factory.mktemp("home")
    save_tiny(home / "base")
    model, tokenizer = adapted()
    model.get_base_model().save_pretrained(home / "unused")
    model.peft_config["default"].base_model_name_or_path = str(home / "base")
    model.peft_config["default"].base_fingerprint = None
    model.save_pretrained(home / "adapter")
    tokenizer.save_pretrained(home / "adapter")
    (home / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    (home / "more.jsonl").write_text(json.dumps(ROWS[0] | {"domain": "science"}) + "\n")
    (home / "prose.txt").write_text("the answer is no\n\nwhat are there\n")
    return home


def evaluate(home, *flags, adapter="adapter"):
    return main(["eval", "--adapter", str(home / adapter), *map(str, flags)])


def test_the_whole_report(home, tmp_path, capsys):
    status = evaluate(
        home, "--eval_file", home / "rows.jsonl", home / "more.jsonl", "--compare_baseline", "--output_dir",
        tmp_path, "--max_new_tokens", 3, "--general_file", home / "prose.txt", "--by", "source",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0 and max(map(len, out.splitlines()[:30])) <= 100
    assert "10 rows: math 4, logic 4, code 1, science 1; 2 paragraphs of general text" in out
    assert "base 21/21" in out and "srde 21/21" in out  # 10 rows, 2 paragraphs, and 9 questions
    for name in ("eval_results.json", "answers.jsonl", "report.html", "plots/routing.png"):
        assert (tmp_path / name).is_file() and name in out
    results = json.loads((tmp_path / "eval_results.json").read_text())
    settings = results["settings"]
    assert settings["adapter"] == str(home / "adapter") and settings["base"] == str(home / "base")
    assert [len(one["sha256"]) for one in settings["eval_files"]] == [64, 64]
    assert (settings["decoding"], settings["seed"], settings["sample_seed"]) == ("greedy", None, None)
    assert settings["dtype"] == "float32" and settings["general_file"]["path"] == str(home / "prose.txt")
    assert set(results["srde"]["domains"]) == {"math", "logic", "code", "science"}
    assert results["srde"]["all"]["not_run"] == 1 and "1 program not run" in out and "  more" in out


@pytest.mark.parametrize("flag", ["--adapter", "--checkpoint", "--srde_weights"])
def test_a_file_inside_means_its_folder(home, capsys, flag):
    file = home / "adapter" / "adapter_model.safetensors"
    line = ["eval", flag, str(file), "--eval_file", str(home / "rows.jsonl"), "--general_file", "none"]
    assert main([*line, "--max_rows", "3", "--max_new_tokens", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        "3 rows of 9, drawn evenly from the domains with seed 0: math 1, logic 1, code 1; 0 paragraphs" in out
    )
    assert "→" not in out and "general text │" not in out


def test_the_other_base_and_dtype_are_used(home, tmp_path):
    (home / "elsewhere").exists() or save_tiny(home / "elsewhere")
    assert evaluate(
        home, "--eval_file", home / "more.jsonl", "--model_name_or_path", home / "elsewhere", "--dtype", "bfloat16",
        "--output_dir", tmp_path, "--general_file", "none", "--max_new_tokens", 1,
    ) == 0  # fmt: skip
    settings = json.loads((tmp_path / "eval_results.json").read_text())["settings"]
    assert (settings["base"], settings["dtype"]) == (str(home / "elsewhere"), "bfloat16")


def test_programs_run_with_leave(home, monkeypatch, capsys):
    from srde.eval import contained

    seen = []
    monkeypatch.setattr(contained, "require_containment", lambda: None)
    monkeypatch.setattr(contained, "score_code", lambda text, row, **how: seen.append(how) or (True, ""))
    flags = ("--eval_file", home / "rows.jsonl", "--general_file", "none", "--max_new_tokens", 1)
    assert evaluate(home, *flags, "--confirm_run_unsafe_code") == 0
    assert seen == [{"confirm_run_unsafe_code": True}] and "not run" not in capsys.readouterr().out


def test_tasks_go_to_the_harness(home, tmp_path, monkeypatch, capsys):
    calls = []
    fake = ModuleType("srde.eval.harness")
    fake.KIND = "lm-eval results"
    fake.run_tasks = lambda model, tokenizer, tasks, **options: calls.append((tasks, options)) or {"srde": {}}
    fake.save_tasks = lambda result, folder: calls.append((result, folder)) or [tmp_path / "results.json"]
    fake.tasks_table = lambda result: "the table of tasks"
    monkeypatch.setitem(sys.modules, "srde.eval.harness", fake)
    assert evaluate(
        home, "--tasks", "arc_easy,gsm8k", "own", "--include_path", tmp_path, "--num_fewshot", 0, "--limit", 5,
        "--apply_chat_template", "--compare_baseline", "--batch_size", 4, "--output_dir", tmp_path,
    ) == 0  # fmt: skip
    assert calls == [
        (
            ["arc_easy", "gsm8k", "own"],
            {
                "include_path": str(tmp_path), "num_fewshot": 0, "limit": 5.0, "batch_size": 4, "apply_chat_template": True,
                "confirm_run_unsafe_code": False, "compare_baseline": True,
            },
        ),
        ({"srde": {}}, tmp_path / "tasks"),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "the table of tasks" in out and "results.json" in out and "Held-out rows" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), r"eval_file=[]: there is nothing to evaluate on. name a file with held-out rows, or --tasks"),
        (("--eval_file", "R", "--batch_size", "0"), "batch_size=0: it must be at least 1. use 1 or more."),
        (("--eval_file", "R", "--max_new_tokens", "0"), "max_new_tokens=0: it must be at least 1"),
        (("--eval_file", "R", "--max_rows", "-1"), "max_rows=-1: it must be at least 1"),
        (("--eval_file", "R", "--by", "kind"), "by='kind': it must be domain or source"),
        (("--eval_file", "R", "--general_file", "no.md"), "general_file='no.md': its name must end in .jsonl"),
        (("--eval_file", "missing.jsonl"), "missing.jsonl: file: does not exist"),
        (("--eval_file", "R", "--dtype", "int3"), "dtype='int3': it must be one of auto"),
        (("--eval_file", "R", "--compare_base"), "srde eval has no such flag. the nearest is --compare_baseline"),
        (("--tasks", "t", "--limit", "0"), "limit=0.0: it must be above 0"),
        (("--tasks", "t", "--num_fewshot", "-1"), "num_fewshot=-1: it must be at least 0"),
        *(
            (("--eval_file", "R", f"--{name}", *values), "it is for --tasks, which is not given")
            for name in FOR_TASKS for values in ([] if name == "apply_chat_template" else ["1"],)
        ),
        *((("--tasks", "t", f"--{name}", "1"), "it is for --eval_file, which is not given") for name in FOR_ROWS),
    ],
    ids=lambda value: "-".join(value[-2:]).strip("-") if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(home, capsys, flags, message):
    flags = [str(home / "rows.jsonl") if flag == "R" else flag for flag in flags]
    assert evaluate(home, *flags) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_an_adapter_is_refused(home, capsys):
    assert evaluate(home, "--eval_file", home / "rows.jsonl", adapter="base") == 1
    assert "adapter" in capsys.readouterr().err


def guide(language):
    page = Path(__file__).parents[2] / "docs" / "guides" / "evaluation.md"
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.fixture
def runs(home, tmp_path, monkeypatch):
    """The folder in which the guide's commands are typed; lm-eval's tasks are told apart."""
    (tmp_path / "runs/quickstart/data").mkdir(parents=True)
    (tmp_path / "runs/mine").symlink_to(home / "adapter")
    (tmp_path / "runs/quickstart/data/test.jsonl").write_bytes(2 * (home / "rows.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    fake = ModuleType("srde.eval.harness")
    fake.KIND = "lm-eval results"
    fake.run_tasks, fake.save_tasks, fake.tasks_table = lambda *_, **options: options, None, str
    monkeypatch.setitem(sys.modules, "srde.eval.harness", fake)


@pytest.mark.parametrize("line", [line for block in guide("bash") for line in block.splitlines()])
def test_the_guides_commands_run(runs, capsys, line):
    words = shlex.split(line)
    assert words[0] == "srde" and main(words[1:]) == 0
    assert ("Held-out rows" in capsys.readouterr().out) is ("--eval_file" in words)


def test_the_guides_python_runs(runs, capsys):
    (block,) = guide("python")
    exec(block, {})
    assert (
        len(capsys.readouterr().out.splitlines()[-1].split()) == 4 and Path("runs/eval/report.html").is_file()
    )


def test_the_guide_names_every_flag_and_key(home, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "evaluation.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`\n]+)`", page))
    flags = [flag for action in _parser()._actions for flag in action.option_strings if flag.startswith("--")]
    words = set(re.findall(r"--\w+", page))
    assert set(flags) - words == {"--help"}
    flags = (
        "--eval_file",
        home / "rows.jsonl",
        "--compare_baseline",
        "--output_dir",
        tmp_path,
        "--max_new_tokens",
        1,
    )
    assert evaluate(home, *flags) == 0
    out = json.loads((tmp_path / "eval_results.json").read_text())
    keys = {*out, *out["settings"], *out["srde"], *out["srde"]["all"], *out["srde"]["domains"]["math"]}
    keys |= {*out["srde"]["general"], *out["difference"]["all"]["loss"], *out["routing"]["specialisation"]}
    keys |= {
        key.replace("entropy_of_load_relative", "..._relative").replace(
            "token_entropy_relative", "..._relative"
        )
        for key in out["routing"]
    }
    assert keys - named == set()
    line = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])
    assert {*line, *line["srde"]} - named == set()
