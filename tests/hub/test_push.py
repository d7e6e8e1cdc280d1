"""Models on the hub, with the real clients against a stand-in on the loopback address."""

import subprocess
import sys

import pytest
import torch
from adapters import fill, tokens

from srde import SrdeConfig
from srde.tuner.loading import load_base
from srde.tuner.store import save_adapter
from standin_hub import StandInHub
from tiny import save_tiny

from peft import get_peft_model  # isort: skip

TOKEN = "hf_" + "n0taT0ken" * 4
READ = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)
kept = torch.load("{kept}", weights_only=True)
with torch.no_grad():
    assert torch.equal(model(kept["ids"]).logits, kept["logits"])
assert "srde" not in __import__("sys").modules
print(type(model).__module__)
"""


@pytest.fixture(scope="module")
def hub():
    with StandInHub(token=None) as hub:
        yield hub


def run(hub, home, program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env=hub.environment(home, **environment),
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def place(tmp_path):
    save_tiny(tmp_path / "base")
    model = fill(
        get_peft_model(load_base(str(tmp_path / "base")), SrdeConfig(num_experts=4, task_type="CAUSAL_LM"))
    ).eval()
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        torch.save({"ids": tokens(), "logits": model(tokens()).logits}, tmp_path / "kept.pt")
    return tmp_path


@pytest.mark.slow
def test_an_export_goes_to_the_hub_and_comes_back_without_srde(hub, place):
    argv = [
        "export",
        "--adapter",
        str(place / "adapter"),
        "--output_dir",
        str(place / "out"),
        "--push_to_hub",
        "me/sardine",
    ]
    done = run(
        hub,
        place / "home",
        f"import sys; from srde.cli import main; sys.exit(main({argv!r}))",
        HF_TOKEN=TOKEN,
    )
    assert done.returncode == 0, done.stderr
    assert "me/sardine" in done.stdout and TOKEN not in done.stdout + done.stderr
    files = hub.files("me/sardine", "model")
    assert {"config.json", "model.safetensors", "modeling_sardine.py", "README.md", "tokenizer.json"} <= set(
        files
    )
    assert not any(TOKEN.encode() in content or str(place).encode() in content for content in files.values())
    assert b'from_pretrained("me/sardine"' in files["README.md"]
    back = run(hub, place / "fresh", READ.format(repo="me/sardine", kept=place / "kept.pt"))
    assert back.returncode == 0, back.stderr
    assert back.stdout.startswith("transformers_modules.me.sardine")


@pytest.mark.slow
def test_the_model_itself_can_be_pushed(hub, place):
    program = f"""
from srde import SaRDinEForCausalLM
from srde.hub.export import Source, export_sardine
export_sardine(Source({str(place / "adapter")!r}), {str(place / "made")!r})
model = SaRDinEForCausalLM.from_pretrained({str(place / "made")!r})
model.push_to_hub("me/pushed")
"""
    done = run(hub, place / "home", program, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "modeling_sardine.py"} <= set(hub.files("me/pushed", "model"))
    back = run(hub, place / "fresh", READ.format(repo="me/pushed", kept=place / "kept.pt"))
    assert back.returncode == 0, back.stderr


@pytest.mark.slow
def test_a_hub_that_refuses_leaves_the_export(hub, place):
    argv = [
        "export",
        "--adapter",
        str(place / "adapter"),
        "--output_dir",
        str(place / "out"),
        "--push_to_hub",
        "me/broken",
    ]
    hub.fail(0, "503")
    try:
        done = run(
            hub,
            place / "home",
            f"import sys; from srde.cli import main; sys.exit(main({argv!r}))",
            HF_TOKEN=TOKEN,
        )
    finally:
        hub.heal()
    assert done.returncode == 1 and "the hub did not take it" in done.stderr and TOKEN not in done.stderr
    assert (place / "out/MANIFEST.json").is_file()
