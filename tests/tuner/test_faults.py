"""Damaged, incomplete and half-saved adapters: refused, or never run; never loaded in part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import LOADERS, PEFT_LOADERS, TRANSFORMERS_LOADERS, adapted, config, fill, load_base, tokens
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from srde.artifacts import MANIFEST_NAME
from srde.errors import ArtifactError, UsageError
from srde.tuner.store import ADAPTER_FILES, save_adapter

pytestmark = pytest.mark.faults

CONFIG, TENSORS = ADAPTER_FILES


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def cut(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep >= 0 else -1])


# ---- damaged files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", PEFT_LOADERS)
@pytest.mark.parametrize(
    ("file", "place"), [(CONFIG, b'"top_k": '), (TENSORS, b"{"), (TENSORS, -1), (TENSORS, -3000)]
)
def test_one_changed_bit_is_found(base, copied, file, place, loader):
    if isinstance(place, bytes):  # the bit after these: 2 experts become 3, or a letter of the header another
        place = (copied / file).read_bytes().index(place) + len(place)
    flip(copied / file, place)
    with pytest.raises(ArtifactError) as error:
        PEFT_LOADERS[loader](base, str(copied))
    assert str(error.value).startswith(f"{copied / file}: sha256=")
    assert "MANIFEST.json expects" in str(error.value)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("keep", [0, 0.2, 0.6, -1])
@pytest.mark.parametrize("loader", LOADERS)
def test_truncated_tensors_are_never_loaded(base, copied, loader, keep, sealed):
    cut(copied / TENSORS, keep)
    if not sealed:
        (copied / MANIFEST_NAME).unlink()
    with pytest.raises((ArtifactError, SafetensorError)) as error:
        LOADERS[loader](base, str(copied))
    if sealed and loader in PEFT_LOADERS:
        assert str(error.value).startswith(f"{copied / TENSORS}: bytes=")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_truncated_configuration_is_never_loaded(base, copied, keep, loader):
    cut(copied / CONFIG, keep)
    (copied / MANIFEST_NAME).unlink()
    with pytest.raises(json.JSONDecodeError):
        LOADERS[loader](base, str(copied))


@pytest.mark.parametrize("file", [MANIFEST_NAME, TENSORS])
def test_a_missing_file_or_a_broken_manifest_is_named(base, copied, file):
    if file == MANIFEST_NAME:
        cut(copied / file, 0.5)
    else:
        (copied / file).unlink()
    with pytest.raises(ArtifactError, match=file):
        PeftModel.from_pretrained(load_base(base), copied)


# ---- files that do not hold it all -------------------------------------------------------------------------------------

PARTS = ["srde_experts.index", "srde_experts.values", "srde_router.weight"]


@pytest.mark.parametrize("damage", ["missing", "ill-shaped"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_with_a_tensor_short_never_runs(base, copied, loader, part, damage, monkeypatch):
    """Where the loader lets it pass, the model refuses to run, also when the error was caught and ignored."""
    (copied / MANIFEST_NAME).unlink()
    tensors = load_file(copied / TENSORS)
    name = f"base_model.model.model.layers.1.mlp.{part}"
    tensor = tensors.pop(name)
    if damage == "ill-shaped":
        tensors[name] = tensor[:, :-1].contiguous()
    save_file(tensors, copied / TENSORS, metadata={"format": "pt"})
    models = []
    monkeypatch.setattr(
        "adapters.load_base", lambda *_args, **_kwargs: models.append(load_base(base)) or models[-1]
    )
    try:
        models.append(LOADERS[loader](base, str(copied)))
    except (ArtifactError, RuntimeError):
        assert loader in PEFT_LOADERS or damage == "ill-shaped"
    else:
        assert loader in TRANSFORMERS_LOADERS
    for model in models:
        name = next(iter(model.srde.layers[LAYER].srde_experts.keys() - {"default"}), "default")
        for layer in model.srde.layers.values():
            layer.set_adapter(name)
        # PEFT's loaders have not loaded a single tensor, Transformers' all but the bad one
        first = LAYER.replace("1", "0") if loader in PEFT_LOADERS else LAYER
        with pytest.raises(
            UsageError, match=f"^adapter in {first}='{name}': its tensors were to come from a file, and"
        ):
            model(tokens())
    assert models or loader.startswith("Auto")


LAYER = "model.layers.1.mlp"


def test_not_a_number_in_a_file_never_runs(base, copied):
    (copied / MANIFEST_NAME).unlink()
    tensors = load_file(copied / TENSORS)
    tensors[f"base_model.model.{LAYER}.srde_experts.values"][0, 0, 0, 0] = float("nan")
    save_file(tensors, copied / TENSORS, metadata={"format": "pt"})
    model = PeftModel.from_pretrained(load_base(base), copied)
    with pytest.raises(
        UsageError, match=f"^adapter in {LAYER}='default': its tensors were to come from a file"
    ):
        model(tokens())


# ---- killed saves ------------------------------------------------------------------------------------------------------


def kill(tmp_path, **ways):
    program = Path(__file__).with_name("save_killer.py")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(program),
        str(tmp_path),
        *(f"{w}:{n}" for w, n in ways.items()),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=115)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(outcomes):
    """The old adapter or the new one or, except with our own save, none; never a mixture, and once new, never back."""
    refused = {f"refused by {error}" for error in ("ArtifactError", "SafetensorError", "JSONDecodeError")}
    for way, found in outcomes.items():
        assert set(found) <= ({"old", "new"} if way == "save_adapter" else {"old", "new"} | refused), way
        assert found[0] == "old" and set(found[found.index("new") :]) == {"new"}


@pytest.mark.slow
def test_a_killed_save_never_leaves_what_loads_wrongly(tmp_path):
    check(kill(tmp_path, peft=4, transformers=4, save_adapter=20))


@pytest.mark.slow
def test_killed_at_every_step_a_save_never_leaves_what_loads_wrongly(tmp_path):
    outcomes = kill(tmp_path, peft=1, transformers=1, save_adapter=1)
    check(outcomes)
    assert all(
        len(outcomes[way]) > least
        for way, least in {"peft": 25, "transformers": 15, "save_adapter": 60}.items()
    )


@pytest.mark.parametrize("name", ["default", "other"])
def test_our_own_save_keeps_what_else_is_in_the_folder(base, tmp_path, name):
    (tmp_path / "metrics.jsonl").write_text("kept")
    model = get_peft_model(load_base(base), config(), adapter_name=name)
    for seed in (1, 2):
        save_adapter(fill(model, seed), tmp_path, name)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([MANIFEST_NAME, *ADAPTER_FILES, "README.md", "metrics.jsonl"])
    assert torch.equal(
        PeftModel.from_pretrained(load_base(base), tmp_path)(tokens()).logits, model.eval()(tokens()).logits
    )
    assert not torch.equal(adapted()(tokens()).logits, model(tokens()).logits)
