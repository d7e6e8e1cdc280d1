"""`srde recipes`, and the recipes themselves."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from srde.cli import main
from srde.recipes import recipes
from srde.train.resolve import resolve
from tiny import save_tiny

NAMES = ["fast", "max", "ministral-3-14b", "nf4", "seeds", "smollm2"]


def test_there_are_those_that_are_tested():
    assert [name for name in recipes() if "/" not in name] == NAMES


def test_ls_lists_names_and_first_comments(capsys):
    assert main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes()) and "accelerate/zero2.json" in recipes()
    assert next(line for line in lines if line.startswith("smollm2 ")).endswith(
        "A small run on SmolLM2-135M-Instruct, on a CPU in minutes: to see everything work before something large is rented."
    )


@pytest.fixture
def copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.jsonl").write_text("{}\n")  # `seeds` names it, and it must be there
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_explained_and_passes_the_check(name, copied, capsys):
    assert main(["recipes", "cp", name]) == 0
    path = copied / f"{name}.yaml"
    assert capsys.readouterr().out.startswith(f"{path.name}\n") and path.read_text() == recipes()[name]
    assert path.read_text().startswith("# ") and path.read_text().count("\n#") > 3
    flags = ["--model_name", "m", "--train_file", "t.jsonl", "--output_dir", "out", "--use_cpu"]
    if yaml.safe_load(path.read_text()).get("data_order"):
        flags[2:4] = ["--pretokenized_dir", "set"]
    assert main(["config", "check", path.name, *flags]) == 0
    assert "srde train takes these settings" in capsys.readouterr().out
    found = resolve(["--config", path.name, *flags])
    assert found.model.model_name_or_path == "m" and found.run.output_dir == "out"
    assert main(["config", "check", path.name, "--use_cpu"]) == 0  # and as it is


def test_seeds_is_the_founding_notes_command(copied):
    command = [
        "--model_name", "mistralai/Ministral-3-14B-Reasoning-2512", "--pretokenized_dir", "data/tokenized", "--jsonl_data",
        "data/data.jsonl", "--output_dir", "checkpoints", "--max_steps", "10000", "--use_muon", "--bf16", "--supervised_experts",
        "--expert_pretrain_steps", "500", "--warm_start", "--progressive_unlock", "linear", "--use_cpu",
    ]  # fmt: skip
    main(["recipes", "cp", "seeds"])
    recipe, wanted = resolve(["--config", "seeds.yaml", "--use_cpu"]), resolve(command)
    assert (recipe.model, recipe.data, recipe.experts) == (wanted.model, wanted.data, wanted.experts)
    assert recipe.run.to_dict() == wanted.run.to_dict()
    assert [(p.name, p.start) for p in recipe.phases] == [
        ("warm_up", 0), ("mask_learning", 100), ("expert_pretraining", 600), ("delta_training", 1100), ("joint", 1600)
    ]  # fmt: skip


def test_a_copy_goes_where_it_is_told_to_and_overwrites_nothing(tmp_path, capsys):
    assert main(["recipes", "cp", "nf4.yaml", str(tmp_path / "mine.yaml")]) == 0
    assert main(["recipes", "cp", "accelerate/zero2.json", str(tmp_path)]) == 0
    assert (tmp_path / "zero2.json").read_text() == recipes()["accelerate/zero2.json"]
    (tmp_path / "mine.yaml").write_text("mine")
    capsys.readouterr()
    assert main(["recipes", "cp", "nf4", str(tmp_path / "mine.yaml")]) == 1
    assert "mine.yaml': it exists, and is not overwritten." in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert main(["recipes", "cp", "nf4", str(tmp_path / "none/mine.yaml")]) == 1
    assert "it cannot be written (No such file or directory)" in capsys.readouterr().err


def test_an_unknown_name_gets_the_nearest(tmp_path, capsys):
    assert main(["recipes", "cp", "smolm2", str(tmp_path)]) == 1
    assert "recipe='smolm2': there is none of this name. the nearest is smollm2." in capsys.readouterr().err
    assert main(["recipes", "cp", "../errors", str(tmp_path)]) == 1
    assert "see srde recipes ls." in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_wheel_has_them(tmp_path):
    pytest.importorskip("hatchling")
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(root),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("srde-*.whl")
    program = "from srde.recipes import recipes; print(*recipes())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}); {program}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == list(recipes())


def blocks(page):
    text = (Path(__file__).parents[2] / "docs/guides" / page).read_text()
    return re.findall(r"^```(bash|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_guides_commands_run_as_written(copied, capsys, monkeypatch):
    """Copied first and then checked, as a reader would; training is the last of them, here without its plots."""
    monkeypatch.setattr("srde.monitor.plots.save_plots", lambda *_: [])
    commands = [
        line for language, block in blocks("recipes.md") if language == "bash" for line in block.splitlines()
    ]
    assert [line.split()[1] for line in commands] == ["config", "config", "recipes", "recipes", "train"]
    commands.sort(key=lambda line: line.split()[1] != "recipes")
    rows = "".join(
        f'{{"prompt": "what is {n}", "response": "yes", "domain": "d{n % 2}"}}\n' for n in range(8)
    )
    data = copied / "runs/quickstart/data"
    data.mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl"):
        (data / name).write_text(rows)
    base = save_tiny(copied / "base")
    for command in commands:
        words = [str(base) if word == "$MODEL" else word for word in shlex.split(command)[1:]]
        assert main([*words, "--disable_tqdm", "true"] if words[0] == "train" else words) == 0, command
    out = capsys.readouterr().out
    assert "40 steps in 4 phases" in out and "# mask_learning " in out and "adapter: runs/recipe" in out


def test_the_guides_file_is_read(copied):
    ((_, text),) = [block for block in blocks("recipes.md") if block[0] == "yaml"]
    (copied / "run.yaml").write_text(text)
    assert resolve(["--config", "run.yaml", "--use_cpu"]).run.domain_experts == ["math=0,6", "code=2"]


def test_the_reference_has_every_flag_of_ours():
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("hooks", root / "docs/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.on_page_markdown((root / "docs/reference/training.md").read_text())
    assert "<!--" not in page and "| `--seed` |" not in page
    for row in (
        "| `--model_name_or_path` | required | Hub id or folder of a causal language model. Also `--model_name`. |",
        "| `--max_length` | `1024` |", "| `--top_k` | `2` |", "| `--mask_init` | `'learned'` |", "| `--nan_policy` | `'stop'` |",
    ):  # fmt: skip
        assert row in page
