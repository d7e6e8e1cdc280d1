"""F7, F8, F18: damaged, altered and incomplete checkpoints are told, and passed over or refused; none is used in part."""

from __future__ import annotations

import shutil
import signal

import pytest
from rig import hook, signal_at
from runs import events
from safetensors.torch import load_file, save_file

from srde.artifacts import write_manifest
from srde.train.checkpoint import checkpoints

pytestmark = pytest.mark.faults

RUNNER = "srde.train.runner:RunTrainer"
UNTOUCHED = hook("srde.tuner.loading:load_base", "os._exit(9)") + hook(
    "safetensors.torch:load_file", "os._exit(9)"
)
"""Ends a run that has not noticed before the model and the first tensor are loaded."""


@pytest.fixture(scope="module")
def killed(lab, tmp_path_factory):
    """A run that was killed in its 14th step, with the checkpoints 6, 9 and 12."""
    out = tmp_path_factory.mktemp("killed") / "out"
    job = lab.run(out, before=signal_at(f"{RUNNER}.training_step", "args[0].state.global_step == 13"))
    assert job.code == -signal.SIGKILL, job.text()[-3000:]
    assert [path.name for path in checkpoints(out)] == ["checkpoint-12", "checkpoint-9", "checkpoint-6"]
    return out


@pytest.fixture
def out(killed, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(killed, tmp_path / "out")


def cut(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep >= 0 else keep])


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("optimizer.pt", -1),
        *(
            pytest.param(name, keep, marks=pytest.mark.slow)
            for name in ("adapter_model.safetensors", "trainer_state.json", "MANIFEST.json")
            for keep in (
                0,
                0.5,
                -2 if name == "MANIFEST.json" else -1,
            )  # its last byte is a line break, which JSON may lack
        ),
    ],
)
def test_a_truncated_checkpoint_is_passed_over_or_refused(lab, out, name, keep):
    file = out / "checkpoint-12" / name
    cut(file, keep)
    job = lab.run(out, "--resume_from_checkpoint", str(out / "checkpoint-12"), before=UNTOUCHED)
    assert job.code == 1, job.text()[-3000:]
    reason = "must be JSON" if name == "MANIFEST.json" else f"{file}: bytes="
    assert str(file) in job.last_line() and reason in job.last_line()
    assert checkpoints(out)[0].name == "checkpoint-12"  # nothing was touched
    lab.same(out)
    told = [event["text"] for event in events(out) if "is passed over" in event["text"]]
    assert len(told) == 1 and told[0].startswith("checkpoint-12 is passed over: ") and str(file) in told[0]
    assert [event["text"] for event in events(out, "resumed")] == ["goes on from checkpoint-9"]


def test_auto_says_on_the_terminal_what_it_passes_over(lab, out):
    cut(out / "checkpoint-12/run_state.json", 0.5)
    job = lab.run(out, before=hook("srde.train.checkpoint:load_into", "os._exit(9)"))
    assert job.code == 9
    assert "checkpoint-12 is passed over: " in job.text() and "run_state.json: bytes=" in job.text()


@pytest.mark.slow
def test_without_a_whole_checkpoint_a_run_begins_anew_and_says_so(lab, out):
    for path in checkpoints(out):
        cut(path / "rng_state.pth", 0.5)
    lab.same(out)
    assert "none of the 3 checkpoints" in " ".join(event["text"] for event in events(out))
    assert [event["step"] for event in events(out, "started")] == [0, 0]


@pytest.mark.slow
def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(lab, out):
    """With room for one checkpoint only: the new one stays, and not the damaged one with the higher step."""
    for path in checkpoints(out):
        cut(path / "rng_state.pth", 0.5)
    job = lab.run(
        out,
        "--save_total_limit",
        "1",
        before=signal_at(f"{RUNNER}.training_step", "args[0].state.global_step == 7"),
    )
    assert job.code == -signal.SIGKILL
    assert (out / "checkpoint-6").is_dir()
    lab.same(out, "--save_total_limit", "1")


@pytest.mark.slow
def test_going_back_to_an_older_checkpoint_leaves_no_later_one_to_go_on_from(lab, out):
    """checkpoint-6 is named beside checkpoint-12 and, after a kill, auto: the run goes on from its own newest."""
    job = lab.run(
        out,
        *("--resume_from_checkpoint", str(out / "checkpoint-6"), "--save_total_limit", "1"),
        before=signal_at(f"{RUNNER}.training_step", "args[0].state.global_step == 10"),
    )
    assert job.code == -signal.SIGKILL
    assert (out / "checkpoint-9").is_dir()
    lab.same(out, "--save_total_limit", "1")
    assert [event["text"] for event in events(out, "resumed")][-1] == "goes on from checkpoint-9"


def test_one_flipped_bit_in_any_file_is_found_before_a_tensor_is_used(lab, out, request):
    names = sorted(path.name for path in (out / "checkpoint-12").iterdir())
    assert {
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "run_state.safetensors",
        "MANIFEST.json",
    } <= set(names)
    for name in names:
        file = out / "checkpoint-12" / name
        content = file.read_bytes()
        spoilt = bytearray(content)
        spoilt[len(spoilt) // 2] ^= 1
        file.write_bytes(spoilt)
        job = lab.run(out, "--resume_from_checkpoint", str(file.parent), before=UNTOUCHED)
        assert job.code == 1, (name, job.text()[-3000:])
        assert str(file if name != "MANIFEST.json" else file.parent) in job.last_line(), name
        file.write_bytes(content)
    job = lab.run(out, "--resume_from_checkpoint", str(out / "checkpoint-12"), before=UNTOUCHED)
    assert job.code == 9  # as it was, it is loaded


# ---- F18 -----------------------------------------------------------------------------------------------------------------------


ADAPTER = "adapter_model.safetensors"


def missing(tensors):
    tensors.pop(sorted(tensors)[0])


def extra(tensors):
    tensors["base_model.model.model.layers.7.mlp.srde_router.weight"] = tensors[sorted(tensors)[0]].clone()


def misshapen(tensors):
    name = next(name for name in sorted(tensors) if name.endswith("values"))
    tensors[name] = tensors[name][..., :-1].contiguous()


def no_number(tensors):
    name = next(name for name in sorted(tensors) if name.endswith("values"))
    tensors[name].view(-1)[3] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(missing, "missing tensors=", id="missing"),
        pytest.param(extra, "unknown tensors=", id="extra", marks=pytest.mark.slow),
        pytest.param(misshapen, "shape of ", id="misshapen"),
        pytest.param(no_number, "", id="not a number", marks=pytest.mark.slow),
    ],
)
def test_a_sealed_checkpoint_with_other_tensors_is_refused(lab, out, spoil, message):
    """Its manifest verifies, so only the tensors themselves can tell."""
    folder = out / "checkpoint-12"
    tensors = load_file(folder / ADAPTER)
    spoil(tensors)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    write_manifest(folder, {"kind": "checkpoint", "step": 12})
    job = lab.run(out)
    assert job.code == 1, job.text()[-3000:]
    assert job.last_line().startswith("srde train: ") and message in job.last_line(), job.text()[-3000:]
