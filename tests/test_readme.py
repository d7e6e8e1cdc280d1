"""Executes the README: its make targets exist, its shell block runs line by line, its Python runs, on a tiny model."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hub_rows
from preloaded import Preloaded
from srde.data.quickstart import build_quickstart
from standin_hub import StandInHub
from tiny import save_tiny

ROOT = Path(__file__).parents[1]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def new_home(home):
    """A home and a working folder as they are after `make quickstart`, with a tiny model in the embedded one's place."""
    save_tiny(home / ".cache/srde/SmolLM2-135M-Instruct")
    build_quickstart(home / "runs/quickstart/data", train_per_domain=4, test_per_domain=2, seed=0)
    (home / ".venv/bin").mkdir(parents=True)
    (home / ".venv/bin/activate").touch()
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Such a home, with a `srde` that starts fast."""
    home = new_home(tmp_path_factory.mktemp("home"))
    bin_folder = home / ".venv/bin"
    srde = Preloaded(bin_folder / "srde")
    (bin_folder / "activate").write_text(f'export PATH="{bin_folder}:$PATH"\n')
    yield home
    srde.close()


def run(command, home):
    env = {
        **os.environ,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    env.pop("XDG_CACHE_HOME", None)
    env.pop("SRDE_CACHE", None)
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_two_commands_are_make_targets():
    commands = [
        line
        for block in blocks("README.md", "bash")
        for line in block.splitlines()
        if line.startswith("make")
    ]
    assert commands == ["make quickstart", "make test"]
    for command in commands:
        planned = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
        assert ("srde quickstart" if "quickstart" in command else "-m pytest") in planned.stdout


def test_the_shell_blocks_run_as_written(home):
    script = "".join(b for b in blocks("README.md", "bash") if "srde train" in b or "srde export" in b)
    out = run(["bash", "-euo", "pipefail", "-c", script], home)
    assert "adapter: runs/built" in out and (home / "data/tokenized/MANIFEST.json").is_file()
    assert "adapter: runs/mine" in out and "accuracy" in out and "general text" in out and "expert" in out
    assert (home / "runs/mine/adapter_model.safetensors").is_file()
    assert (home / "runs/mine/plots/routing.png").is_file()
    assert "SaRDinE model: runs/SaRDinE" in out and (home / "runs/SaRDinE/modeling_sardine.py").is_file()
    assert "merged model: runs/merged" in out


def test_the_python_block_runs_as_written(home):
    (block,) = blocks("README.md", "python")
    out = run([sys.executable, "-c", block], home)
    assert "trainable params" in out and "torch.Size([2, 8])" in out
    assert (home / "runs/adapter/adapter_config.json").is_file()


def test_every_page_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert links and all((ROOT / link).is_file() for link in links if not link.startswith("http"))


def test_the_front_page_of_the_docs_shows_the_same_commands():
    ours = next(b for b in blocks("README.md", "bash") if "srde plan" in b)
    assert ours in blocks("docs/index.md", "bash")


@pytest.mark.slow
def test_the_commands_of_the_training_guide_run_as_written(home):
    commands = blocks("docs/guides/training.md", "bash")
    assert len(commands) == 3 and "--supervised_experts" in commands[1] and "srde monitor" in commands[2]
    script = "source .venv/bin/activate\nMODEL=~/.cache/srde/SmolLM2-135M-Instruct\n" + "".join(commands)
    out = run(["bash", "-euo", "pipefail", "-c", script], home)
    assert "adapter: runs/mine" in out and "adapter: runs/full" in out and "router_supervision_loss" in out
    assert "completed" in out and "held-out" in out


@pytest.mark.slow
def test_the_commands_of_the_data_guide_run_as_written(home):
    commands = [
        b for b in blocks("docs/guides/data.md", "bash") if "srde data" in b and "HF_ENDPOINT" not in b
    ]
    assert len(commands) == 5
    script = "source .venv/bin/activate\nMODEL=~/.cache/srde/SmolLM2-135M-Instruct\nrm -rf data\n" + "".join(
        commands
    )
    out = run(["bash", "-euo", "pipefail", "-c", script], home)
    assert "gsm8k" in out and "adapter: runs/built" in out and (home / "data/stats.html").is_file()
    (block,) = blocks("docs/guides/data.md", "python")
    assert "torch.Size([1, " in run([sys.executable, "-c", block], home)


@pytest.mark.slow
def test_the_stand_in_hub_of_the_data_guide(home):
    serve, use = [
        b for b in blocks("docs/guides/data.md", "bash") if "standin_hub" in b or "HF_ENDPOINT" in b
    ]
    with socket.socket() as probe:  # the guide's port may be taken here
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    hub = subprocess.Popen(
        [sys.executable, *shlex.split(serve.replace("8765", port))[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = next(line for line in hub.stdout if "HF_ENDPOINT" in line)
        assert f"export HF_ENDPOINT=http://127.0.0.1:{port}" in line
        plain = home / "plain"  # the clients read the hub's address when they are imported
        plain.mkdir()
        (plain / "srde").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m srde "$@"\n')
        (plain / "srde").chmod(0o755)
        start = (
            f"export PATH={plain}:$PATH\nMODEL=~/.cache/srde/SmolLM2-135M-Instruct\nexport HF_HUB_OFFLINE=0\n"
        )
        run(["bash", "-euo", "pipefail", "-c", start + use.replace("8765", port)], home)
    finally:
        hub.terminate()
        hub.communicate()
    assert (home / "from_hub/data.jsonl").read_text().count("\n") == 180


START = "source .venv/bin/activate\nMODEL=~/.cache/srde/SmolLM2-135M-Instruct\n"
TRAIN = "srde train --model_name_or_path $MODEL --train_file runs/quickstart/data/train.jsonl --max_steps 12 --supervised_experts"


@pytest.mark.slow
def test_the_commands_of_the_export_guide_run_as_written(home):
    commands = "".join(blocks("docs/guides/export.md", "bash"))
    out = run(["bash", "-euo", "pipefail", "-c", START + commands], home)
    assert "SaRDinE model: runs/SaRDinE-SmolLM2-8x1P" in out and out.count("largest logit difference") == 2
    (block,) = blocks("docs/guides/export.md", "python")
    assert "torch.Size([2, 8])" in run([sys.executable, "-c", block], home)
    assert not any(
        ".srde_" in name
        for file in (home / "runs/merged-math").glob("*.safetensors")
        for name in load_file(file)
    )


@pytest.mark.slow
def test_the_commands_of_the_inference_guide_run_as_written(home):
    commands = blocks("docs/guides/inference.md", "bash")
    assert len(commands) >= 6 and commands[-2].startswith("srde chat")
    commands[-2] = f"printf 'Hello\\n/exit\\n' | {commands[-2]}"
    script = f"{START}{TRAIN} --num_experts 6 --output_dir runs/quickstart\n{''.join(commands)}"
    out = run(["bash", "-euo", "pipefail", "-c", script], home)
    assert "answers: runs/answers.jsonl" in out and (home / "runs/looked/analysis-001.png").is_file()
    for block in blocks("docs/guides/inference.md", "python"):
        run([sys.executable, "-c", block], home)


@pytest.mark.slow
def test_the_commands_of_the_experts_guide_run_as_written(home):
    commands = "".join(blocks("docs/guides/experts.md", "bash"))
    out = run(["bash", "-euo", "pipefail", "-c", START + commands], home)
    assert "expert 6 (medicine) is new and zero" in out and "adapter: runs/refitted" in out and "drugs" in out


@pytest.mark.slow
def test_the_commands_of_the_lm_eval_guide_run_as_written(tmp_path):
    """Less the installation, and the parity benchmark, which wants the real model."""
    commands = [
        b
        for b in blocks("docs/guides/lm_eval.md", "bash")
        if "pip install" not in b and "benchmarks/" not in b
    ]
    assert len(commands) == 2 and commands[0].startswith("lm_eval --model srde") and "--tasks" in commands[1]
    home = new_home(tmp_path)
    plain = home / "with_lm_eval"  # the clients read the hub's address when they are imported
    plain.mkdir()
    for name, module in (("srde", "srde"), ("lm_eval", "lm_eval")):
        (plain / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (plain / name).chmod(0o755)
    with StandInHub() as hub:
        for repo in ("allenai/ai2_arc", "allenai/winogrande"):
            hub.add(repo, hub_rows.build_files(repo, 8, seed=7))
        settings = hub.environment(home / "hub")
        settings = {name: value for name, value in settings.items() if name.startswith(("HF_", "NO_PROXY"))}
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
        script = f"{START}export PATH={plain}:$PATH\n{TRAIN} --output_dir runs/mine\n{exports}\n{''.join(commands)}"
        out = run(["bash", "-euo", "pipefail", "-c", script], home)
        (block,) = blocks("docs/guides/lm_eval.md", "python")
        block = block.replace("mine-tasks/tasks", "other-tasks")
        run([sys.executable, "-c", f"import os\nos.environ |= {settings!r}\n{block}"], home)
    assert "arc_easy" in out and (home / "runs/mine-tasks/tasks/comparison.json").is_file()


@pytest.mark.slow
def test_the_commands_of_the_monitor_and_plan_guides_run_as_written(home):
    monitor = [b.replace("runs/mine", "runs/watched") for b in blocks("docs/guides/monitor.md", "bash")]
    out = run(["bash", "-euo", "pipefail", "-c", START + "".join(monitor)], home)
    assert len(monitor) == 3 and "completed" in out and (home / "runs/watched.html").is_file()
    (block,) = blocks("docs/guides/monitor.md", "python")
    assert "completed 20" in run([sys.executable, "-c", block.replace("runs/mine", "runs/watched")], home)
    first, second = blocks("docs/guides/plan.md", "bash")
    second = second.replace("docs/examples", f"{ROOT}/docs/examples")
    out = run(
        ["bash", "-euo", "pipefail", "-c", START + first.replace("path M", "path $MODEL") + second], home
    )
    assert "LoRA" in out and "ministral-3-14b" in out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_blocks_of_the_peft_guide_run_as_written(tmp_path, monkeypatch):
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from srde import SrdeConfig

    monkeypatch.chdir(tmp_path)
    save_tiny("M", num_hidden_layers=20)

    def fresh():
        return AutoModelForCausalLM.from_pretrained("M")

    def adapted():
        return get_peft_model(fresh(), SrdeConfig())

    adapted().save_pretrained("out/math")
    ids = torch.arange(5, 25).view(2, 10)
    given = {
        "batches": [{"input_ids": ids, "labels": ids}],
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "data": Dataset.from_dict({"text": ["yes no 1 2 3"] * 8}),
    }
    here = 'SFTConfig(output_dir="out", use_cpu=True, max_steps=1, report_to="none")'
    parts = [b.replace('SFTConfig(output_dir="out")', here) for b in blocks("docs/guides/peft.md", "python")]
    assert len(parts) == 9
    for part in parts:
        if "merge_and_unload" in part:
            for line in part.splitlines():
                exec(line, given | {"model": adapted()})
        elif "load_adapter(" in part or "record()" in part:
            exec(part, given | {"model": adapted()})
        else:
            given["base"] = fresh()
            exec(part, given)
