"""F11, F12: numbers that are not finite, and memory that does not suffice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rig import hook
from runs import SIMPLE, WORDS, events, metrics
from safetensors.torch import load_file

from srde.train.checkpoint import checkpoints

pytestmark = pytest.mark.faults

RUNNER = "srde.train.runner:RunTrainer"
STEP = "args[0].state.global_step"
ONE_SIZE = ["--target_sparsity", "0.25"]  # nothing is pruned


def bad_loss(*steps, value="nan"):
    """The loss is not finite in these steps, counted from 0."""
    return hook(
        "transformers.trainer:Trainer.compute_loss",
        after=f"result = result * float({value!r}) if {STEP} in {steps} else result",
    )


def bad_gradient(step, expert=1):
    """The gradient of one expert of the second layer is not finite."""
    values = "args[0].model.get_parameter('base_model.model.model.layers.1.mlp.srde_experts.default.values')"
    return hook(
        f"{RUNNER}.training_step",
        after=f"if {STEP} == {step}: {values}.grad[0, {expert}, 0, 0] = float('nan')",
    )


def tensors(value):
    """All tensors in something that was loaded."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


def require_finite(out):
    have = checkpoints(out)
    assert have
    for folder in have:
        found = [*load_file(folder / "adapter_model.safetensors").values()]
        found += load_file(folder / "run_state.safetensors").values()
        found += tensors(torch.load(folder / "optimizer.pt", weights_only=True))
        assert all(tensor.isfinite().all() for tensor in found if tensor.is_floating_point()), folder


def bad_batches(out):
    return [json.loads(line) for line in (out / "bad_batches.jsonl").read_text().splitlines()]


# ---- F11 ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inject", "what"),
    [
        (bad_gradient(4), "the gradient of base_model.model.model.layers.1.mlp.srde_experts.default.values"),
        pytest.param(bad_loss(4), "the loss", marks=pytest.mark.slow),
        pytest.param(bad_loss(4, value="inf"), "the loss", marks=pytest.mark.slow),
    ],
    ids=["gradient", "loss", "infinite loss"],
)
def test_a_number_that_is_not_finite_stops_the_run_and_changes_nothing(lab, tmp_path, inject, what):
    out = tmp_path / "out"
    job = lab.run(out, settings=SIMPLE, before=inject)
    assert job.code == 1, job.text()[-3000:]
    assert f"step=4: {what} is not finite" in job.last_line() and "--nan_policy skip" in job.last_line()
    (bad,) = bad_batches(out)
    assert bad["step"] == 4 and bad["rows"]
    names = {name for row in bad["rows"] for name in row.split(" + ")}
    assert names <= {f"{lab.rows}:{line}" for line in range(1, 41)} and str(lab.rows) in job.last_line()
    if "gradient" in what:
        assert bad["gradients"] == [what.removeprefix("the gradient of ")]
    require_finite(out)
    assert checkpoints(out)[0].name == "checkpoint-4" and events(out)[-1]["event"] == "failed"
    lab.same(out, settings=SIMPLE, steps=6)


@pytest.mark.parametrize("muon", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["adamw", "muon"])
def test_a_skipped_step_changes_no_bit(lab, tmp_path, muon):
    more = [*ONE_SIZE, "--save_steps", "1", "--nan_policy", "skip", *(["--use_muon"] if muon else [])]
    job = lab.run(tmp_path, *more, settings=SIMPLE, before=bad_loss(2) + bad_gradient(4))
    assert job.code == 0, job.text()[-3000:]
    for step in (2, 4):
        before, after = (tmp_path / f"checkpoint-{step + done}" for done in (0, 1))
        name = "adapter_model.safetensors"
        assert (before / name).read_bytes() == (after / name).read_bytes()
        states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (before, after)]
        one, other = (tensors(state) for state in states)
        assert len(one) == len(other) > 0 and all(map(torch.equal, one, other))
        later = tmp_path / f"checkpoint-{step + 2}" / name
        assert step == 4 or later.read_bytes() != (after / name).read_bytes()
    require_finite(tmp_path)
    assert [bad["step"] for bad in bad_batches(tmp_path)] == [2, 4]
    assert [event["step"] for event in events(tmp_path, "skipped_step")] == [2, 4]
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["skipped_steps"] == 2 and results["train_loss"] == pytest.approx(5.75, abs=0.1)
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path)}
    assert losses[3] is None and losses[5] is None and all(losses[step] for step in (1, 2, 4, 6))


def test_too_many_skipped_steps_end_the_run(lab, tmp_path):
    more = ["--nan_policy", "skip", "--max_skipped_steps", "1"]
    job = lab.run(tmp_path, *more, settings=SIMPLE, before=bad_loss(1, 3))
    assert job.code == 1, job.text()[-3000:]
    assert "step=3: the loss is not finite" in job.last_line() and "--nan_policy skip" not in job.last_line()
    assert [bad["step"] for bad in bad_batches(tmp_path)] == [1, 3]
    require_finite(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_masks_are_not_learned_from_numbers_that_are_not_finite(lab, tmp_path, value):
    """The loss is finite, and what the masks are learned from is not: no gradient of a parameter shows it."""
    gains = f"gains = args[0].controller.learner.gains; gains[min(gains)][0, 0] = float({value!r})"
    inject = hook(f"{RUNNER}.training_step", after=f"if {STEP} == 3: {gains}")
    job = lab.run(tmp_path, before=inject)
    assert job.code == 1 and "step=3: " in job.last_line() and "is not finite" in job.last_line(), job.text()[
        -3000:
    ]
    lab.same(tmp_path)


# ---- F12 ----------------------------------------------------------------------------------------------------------------------


FORWARD = "transformers.models.llama.modeling_llama:LlamaForCausalLM.forward"
MESSAGE = "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')"
PLAIN = [f"--{name}_loss_coef=0" for name in ("router_aux", "router_z", "orthogonality", "sparsity")]


def too_little_memory(tokens, where):
    """A model that cannot take more than so many tokens at once."""
    many = f"(kwargs.get('input_ids') if kwargs.get('input_ids') is not None else args[1]).numel() > {tokens}"
    throw = f"(_ for _ in ()).throw({MESSAGE})"
    code = "import torch\n"
    if where == "forward":
        statement = {"before": f"import torch; {many} and next({throw})"}
    else:
        statement = {
            "after": f"import torch; {many} and result.loss.register_hook(lambda grad: next({throw}))"
        }
    return code + hook(FORWARD, **statement)


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("backward", ["--gradient_accumulation_steps", "2"]),
        pytest.param("forward", ["--gradient_accumulation_steps", "2"], marks=pytest.mark.slow),
        pytest.param(
            "forward", ["--packing", "false", "--per_device_train_batch_size", "4"], marks=pytest.mark.slow
        ),
        pytest.param(
            "backward", ["--packing", "false", "--per_device_train_batch_size", "4"], marks=pytest.mark.slow
        ),
        pytest.param(
            "forward", ["--mask_init", "learned", "--mask_learning_steps", "2"], marks=pytest.mark.slow
        ),
    ],
    ids=["packed", "packed forward", "padded forward", "padded backward", "masks"],
)
def test_a_batch_that_does_not_fit_is_halved_and_the_loss_is_the_same(lab, tmp_path, where, more):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    settings = [*PLAIN, *ONE_SIZE, *more]
    assert lab.run(whole, *settings, settings=SIMPLE).code == 0
    job = lab.run(halved, *settings, settings=SIMPLE, before=too_little_memory(40, where))
    assert job.code == 0, job.text()[-3000:]
    told = events(halved, "out_of_memory")
    assert (
        told
        and "micro-batches are run in 2 parts" in told[0]["text"]
        and "effective batch is the same" in told[0]["text"]
    )
    assert len(told) <= 3  # and from then on they fit
    for one, other in zip(metrics(whole), metrics(halved), strict=True):
        if one["phase"] == "joint" and "--mask_learning_steps" in more:
            return  # masks are learned from each part's gradients by themselves, as with accumulation
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-6) and other["tokens"] == one["tokens"]
    a, b = (load_file(out / "adapter_model.safetensors") for out in (whole, halved))
    for name, tensor in a.items():
        if tensor.is_floating_point():
            assert (tensor - b[name]).norm() <= 2e-3 * tensor.norm(), name
        else:
            assert torch.equal(tensor, b[name]), name


def test_an_example_that_does_not_fit_is_named_with_what_to_lower(lab, tmp_path):
    """The long one of three that are packed together."""
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "c", "response": " ".join(WORDS * 2)},
        {"prompt": "d", "response": "e"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = tmp_path / "lengths.txt"
    spy = hook(
        "srde.data.pack:concatenate",
        f"open({str(lengths)!r}, 'w').write(repr([len(e.input_ids) for e in args[0]]))",
    )
    more = ["--train_file", str(file), "--max_length", "256"]
    job = lab.run(tmp_path / "out", *more, settings=SIMPLE, before=spy + too_little_memory(20, "forward"))
    assert job.code == 1, job.text()[-3000:]
    longest = max(json.loads(Path(lengths).read_text()))
    assert longest > 40
    assert f"batch='1 x {longest} tokens': out of memory" in job.last_line(), job.last_line()
    assert "Lower --max_length" in job.last_line()


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_told_too(lab, tmp_path):
    measuring = hook("srde.train.measure:measure", "os.environ['MEASURING'] = str(count)")
    fails = f"import torch; os.environ.get('MEASURING') == '2' and next((_ for _ in ()).throw({MESSAGE}))"
    job = lab.run(tmp_path, before=measuring + hook(FORWARD, fails))
    assert job.code == 1
    assert job.last_line().startswith("srde train: batch="), job.text()[-3000:]
    assert "Lower --per_device_eval_batch_size" in job.last_line()
