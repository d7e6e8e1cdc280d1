"""F6, F13, F16: a run goes on with the next row, with nothing but what it was made with, and with whole metrics."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from rig import hook, signal_at
from runs import SIMPLE, metrics, write_rows
from safetensors.torch import load_file, save_file

from srde.train.checkpoint import checkpoints
from tiny import CHAT_TEMPLATE

pytestmark = pytest.mark.faults

RUNNER = "srde.train.runner:RunTrainer"
STOPPED = 75


# ---- F6: which rows come when ---------------------------------------------------------------------------------------------


WRITE_ROWS = "open({file!r}, 'a').write(f'{{args[0].state.global_step}} {{args[0]._rows}}\\n')"


def rows_by_step(file):
    """The rows of each step; a step that was begun twice must have had the same."""
    result = {}
    for line in file.read_text().splitlines():
        step, rows = line.split(" ", 1)
        assert result.setdefault(int(step), json.loads(rows)) == json.loads(rows)
    return result


@pytest.mark.parametrize(
    ("packing", "workers", "accumulation", "stops"),
    [
        ("true", 0, 1, "at the edge"),
        pytest.param("true", 2, 1, "all", marks=pytest.mark.slow),
        pytest.param("true", 0, 2, "all", marks=pytest.mark.slow),
        pytest.param("false", 0, 2, "all", marks=pytest.mark.slow),
        pytest.param("false", 2, 1, "all", marks=pytest.mark.slow),
    ],
)
def test_no_row_is_seen_twice_or_skipped(lab, tmp_path, packing, workers, accumulation, stops):
    out, told, whole = tmp_path / "out", tmp_path / "rows.txt", tmp_path / "whole.txt"
    rows = 12 if packing == "false" else 36
    more = [
        "--train_file",
        str(write_rows(tmp_path / "few.jsonl", rows)),
        "--num_train_epochs",
        "3",
        "--max_steps",
        "-1",
    ]
    more += [
        "--packing",
        packing,
        "--dataloader_num_workers",
        str(workers),
        "--per_device_train_batch_size",
        "2",
    ]
    more += ["--gradient_accumulation_steps", str(accumulation), "--save_steps", "100"]
    watched = hook(f"{RUNNER}.get_batch_samples", after=WRITE_ROWS.format(file=str(whole)))
    assert lab.run(tmp_path / "whole", *more, settings=SIMPLE, before=watched).code == 0
    expected = rows_by_step(whole)
    steps = len(expected)
    assert steps % 3 == 0 and steps >= 9
    epoch = steps // 3
    orders = []
    for number in range(3):
        own = [expected[step] for step in range(number * epoch, (number + 1) * epoch)]
        orders.append([row for parts in own for part in parts for row in part])
        assert sorted(orders[-1]) == list(range(len(orders[-1]))) and len(orders[-1]) >= 9
    assert orders[0] != orders[1] != orders[2]
    watched = hook(f"{RUNNER}.get_batch_samples", after=WRITE_ROWS.format(file=str(told)))
    done = (
        {1, epoch - 1, epoch, epoch + 1, 2 * epoch, steps - 1} if stops == "all" else {epoch, 2 * epoch + 1}
    )
    for step in sorted(done):
        stop = signal_at(
            f"{RUNNER}.training_step", f"args[0].state.global_step == {step - 1}", signal.SIGTERM
        )
        job = lab.run(out, *more, settings=SIMPLE, before=watched + stop)
        assert job.code == STOPPED, job.text()[-3000:]
        assert checkpoints(out)[0].name == f"checkpoint-{step}"
    job = lab.run(out, *more, settings=SIMPLE, before=watched)
    assert job.code == 0, job.text()[-3000:]
    assert rows_by_step(told) == expected
    for name in ("adapter_model.safetensors", f"checkpoint-{steps}/optimizer.pt"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    job = lab.run(out, *more, settings=SIMPLE, before=watched)  # and once more, when nothing is left to do
    assert job.code == 0 and rows_by_step(told) == expected


# ---- F13: nothing but what it was made with -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(lab, tmp_path_factory):
    """A run that was stopped after its third step."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    stop = signal_at(f"{RUNNER}.training_step", "args[0].state.global_step == 2", signal.SIGTERM)
    job = lab.run(out, *CONSTANT, settings=SIMPLE, before=stop)
    assert job.code == STOPPED, job.text()[-3000:]
    return out


CONSTANT = ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]


def changed_base(lab, folder):
    base = shutil.copytree(lab.base, folder / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 0.1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return ["--model_name", str(base)]


def changed_tokenizer(lab, folder):
    base = shutil.copytree(lab.base, folder / "base")
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][0]["content"] = "<|other|>"
    content["model"]["vocab"]["<|other|>"] = content["model"]["vocab"].pop("<|endoftext|>")
    file.write_text(json.dumps(content))
    return ["--model_name", str(base)]


def changed_template(lab, folder):
    base = shutil.copytree(lab.base, folder / "base")
    longer = CHAT_TEMPLATE.replace("'\n' + message", "'\n\n' + message").replace(
        "assistant\n'", "assistant\n\n'"
    )
    assert longer != (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(longer)
    return ["--model_name", str(base)]


def changed_rows(lab, folder):
    return ["--train_file", str(write_rows(folder / "rows.jsonl", 40, seed=3))]


CHANGES = {
    "base": (changed_base, "model_name_or_path"),
    "tokenizer": (changed_tokenizer, "tokenizer"),
    "template": (changed_template, "tokenizer"),
    "data": (changed_rows, "train_file"),
    "num_experts": (["--num_experts", "4"], "num_experts=4"),
    "seed": (["--seed", "7"], "seed=7"),
    "learning_rate": (["--learning_rate", "0.5"], "learning_rate=0.5"),
    "max_steps": (["--max_steps", "9"], "max_steps=9"),
    "phases": (["--delta_training_steps", "2"], "delta_training_steps=2"),
    "accumulation": (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps=2"),
    "muon": (["--use_muon"], "use_muon=True"),
    "packing": (["--packing", "false"], "packing=False"),
    "max_length": (["--max_length", "80"], "max_length=80"),
}


AT_LEAST = ("seed", "template")


@pytest.mark.parametrize(
    "name", [*AT_LEAST, *(pytest.param(n, marks=pytest.mark.slow) for n in CHANGES if n not in AT_LEAST)]
)
def test_what_has_changed_is_refused_with_both_values_and_the_flag(lab, unfinished, tmp_path, name):
    change, field = CHANGES[name]
    more = change if isinstance(change, list) else change(lab, tmp_path)
    untouched = hook("srde.train.checkpoint:load_into", "os._exit(9)")
    job = lab.run(unfinished, *CONSTANT, *more, settings=SIMPLE, before=untouched)
    assert job.code == 1, job.text()[-3000:]
    assert f"srde train: {field}" in job.last_line()
    assert "checkpoint-3 was made with " in job.last_line()
    assert f"pass --allow_changed {field.split('=')[0]} to go on all the same" in job.last_line()
    assert checkpoints(unfinished)[0].name == "checkpoint-3"


@pytest.mark.slow
def test_a_phase_that_is_left_out_now_is_refused(lab, tmp_path):
    stop = signal_at(f"{RUNNER}.training_step", "args[0].state.global_step == 2", signal.SIGTERM)
    assert lab.run(tmp_path, "--delta_training_steps", "4", settings=SIMPLE, before=stop).code == STOPPED
    job = lab.run(tmp_path, settings=SIMPLE)
    assert job.code == 1 and "delta_training_steps=" in job.last_line(), job.text()[-3000:]


def test_what_is_allowed_to_change_counts_from_then_on(lab, unfinished, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "out")
    more = [
        *CONSTANT,
        "--learning_rate",
        "0.5",
        "--weight_decay",
        "0.25",
        "--allow_changed",
        "learning_rate",
        "weight_decay",
    ]
    job = lab.run(out, *more, settings=SIMPLE)
    assert job.code == 0, job.text()[-3000:]
    assert [line["learning_rate"] for line in metrics(out)] == [3e-3] * 3 + [0.5] * 3
    config = json.loads((checkpoints(out)[0] / "run_state.json").read_text())["identity"]
    assert config["learning_rate"] == 0.5


# ---- F16: torn metrics ------------------------------------------------------------------------------------------------


def test_torn_metrics_are_cut_to_the_restored_step(lab, tmp_path):
    out = tmp_path / "out"
    job = lab.run(out, before=signal_at(f"{RUNNER}._save_checkpoint", "args[0].state.global_step == 15"))
    assert job.code == -signal.SIGKILL
    assert [line["step"] for line in metrics(out)][-1] == 15
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(out / name, "ab") as stream:
            stream.write(b'{"kind": "train", "step": 16, "lo\xff')
    lab.same(out)
    for line in (out / "events.jsonl").read_text().splitlines():
        assert json.loads(line)["event"]
