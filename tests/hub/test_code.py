"""The code that goes with an exported model: all of it, nothing of srde in it, and good for a process that has none."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from adapters import adapted, tokens

from srde.hub.code import MODULES, code_files
from srde.hub.convert import from_adapter
from tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROOT = Path(__file__).parents[2]
ALLOWED = {"torch", "transformers", "safetensors"} | sys.stdlib_module_names
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {"srde"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
READ = """
import os, shutil, sys, torch
os.mkdir("single")
from transformers import AutoModelForCausalLM
kept = torch.load("kept.pt", weights_only=True)
sys.path.insert(0, "inside")
from modeling_sardine import SaRDinEForCausalLM
models = [SaRDinEForCausalLM.from_pretrained("inside")]
models += [AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True) for place in ("./inside", "./alone")]
shutil.copy("inside/modeling_sardine.py", "single")  # all that `hf_hub_download` brings
sys.path[0] = "single"
del sys.modules["modeling_sardine"]
from modeling_sardine import SaRDinEForCausalLM
models.append(SaRDinEForCausalLM.from_pretrained("inside"))
models[-1].save_pretrained("from single")
models[-1] = AutoModelForCausalLM.from_pretrained("./from single", trust_remote_code=True)
models[1].save_pretrained("again")
models.append(AutoModelForCausalLM.from_pretrained("./again", trust_remote_code=True))
assert "srde" not in sys.modules
for model in models:
    assert type(model).__name__ == "SaRDinEForCausalLM"
    with torch.no_grad():
        difference = (model(kept["ids"]).logits - kept["logits"]).abs().max().item()
    text = model.generate(kept["ids"], max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(kept["ids"]))
    assert torch.equal(text, kept["text"]), type(model)
    with model.srde.force_experts(2), torch.no_grad():
        assert (model(kept["ids"]).logits - kept["logits"]).abs().max() > 1e-3
    print("difference", difference)
"""


def test_the_files_need_nothing_but_each_other():
    files = code_files()
    assert set(files) == {"modeling_sardine.py", "configuration_sardine.py"}
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, name
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in ALLOWED | {"modeling_sardine"}, (name, node.module)


def test_the_file_is_the_library_s_own_modules():
    tree = ast.parse(code_files()["modeling_sardine.py"])
    there = [ast.unparse(node) for node in tree.body]
    for module in MODULES:
        source = (ROOT / "src/srde" / f"{module.replace('.', '/')}.py").read_text()
        own = [
            node
            for node in ast.parse(source).body[1:]
            if not isinstance(node, ast.Import | ast.ImportFrom | ast.If)
        ]
        place = -1
        for node in own:
            assert (place := there.index(ast.unparse(node), place + 1)) >= 0, module
        assert own, module


@pytest.fixture
def exported(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model, ids = adapted(), tokens()
    model.generation_config.pad_token_id = 0
    text = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits, "text": text}, tmp_path / "kept.pt")
    made = from_adapter(model, base_name=str(tmp_path / "base"))
    made.save_pretrained(tmp_path / "inside")
    made.config.base_inside = False
    made.save_pretrained(tmp_path / "alone")
    return tmp_path


def read(python, program, folder):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "HF_"))
    }
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-W", "error::ImportWarning", "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("difference")]
    assert len(found) == 5 and max(found) <= 1e-6
    return found


def test_a_process_without_srde_reads_it(exported):
    assert read(sys.executable, BLOCK + READ, exported) == [0.0] * 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_clean_environment_reads_it(exported, tmp_path):
    """Only transformers, torch and safetensors, from the package index."""
    venv.create(tmp_path / "clean", with_pip=True)
    python = str(tmp_path / "clean/bin/python")
    pins = [
        f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "transformers", "safetensors")
    ]
    pins[0] = pins[0].split("+")[0]
    done = subprocess.run([python, "-m", "pip", "install", "-q", *pins], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True
    ).stdout.lower()
    assert "srde" not in listed and "peft" not in listed
    read(python, READ, exported)
