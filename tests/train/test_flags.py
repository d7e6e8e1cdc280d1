"""Every flag that srde adds or redefines does what it says: a run of a few steps with it differs from one without it.

Each test names its flags with `shows`; a flag that none names fails `test_every_flag_is_tested`. Flags that stop and resume runs
or send notifications are tested here with one case each, and in full by the files beside them.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers.integrations.integration_utils as integrations
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import srde.train.record
from flag_runs import Runs
from srde.errors import ConfigError, DataError, TrainingError
from srde.train.arguments import DataArguments, ExpertArguments, ModelArguments, RunArguments, parse
from srde.train.data import NumberedCollator
from srde.train.resolve import resolve
from tiny import VOCABULARY, tiny, tiny_tokenizer
from webhook_server import WebhookServer

TESTED: set[str] = set()


def shows(*flags):
    """Marks a test as the one that fails when one of these flags is broken."""

    def mark(test):
        TESTED.update(flags)
        return test

    return mark


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs without what takes most of their time and has tests of its own: plots, waiting for the disk, looking for garbage
    among all that the other tests have imported."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srde.monitor.plots.save_plots", lambda *_: [])
        patch.setattr(os, "fsync", lambda _: None)
        yield Runs(tmp_path_factory.mktemp("flags"))
    gc.unfreeze()


# ---- the base -----------------------------------------------------------------------------------------------------------


@shows("model_name_or_path", "output_dir", "train_file", "max_steps")
def test_a_plain_run(runs):
    plain = runs()
    assert plain.read("adapter_config.json")["base_model_name_or_path"] == str(runs.base)
    assert plain.results["rows"] == 24 and plain.results["steps"] == 6 and len(plain.log("loss")) == 6


@shows("dtype", "attn_implementation", "layers_to_transform")
def test_the_base_is_loaded_as_asked(runs):
    plain, other = runs(), runs("--dtype bfloat16 --attn_implementation eager --layers_to_transform 1")
    assert [run.model.dtype for run in (plain, other)] == [torch.float32, torch.bfloat16]
    assert [run.model.config._attn_implementation for run in (plain, other)] == ["sdpa", "eager"]
    assert [len(run.read("run.json")["layers"]) for run in (plain, other)] == [2, 1]
    assert list(other.model.srde.layers) == ["model.layers.1.mlp"]


@shows("quantization")
@pytest.mark.quant
@pytest.mark.parametrize(
    ("kind", "package", "name"), [("nf4", "bitsandbytes", "Params4bit"), ("int8", "torchao", "Int8Tensor")]
)
def test_the_base_is_quantised(runs, tmp_path, kind, package, name):
    pytest.importorskip(package)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
    }
    tiny(**sizes, vocab_size=VOCABULARY).save_pretrained(tmp_path)  # bitsandbytes packs 64 weights to a scale
    tiny_tokenizer().save_pretrained(tmp_path)
    flags = f"--model_name {tmp_path} --quantization {kind} --max_steps 2 --mask_init random"
    weight = runs(flags).model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.weight")
    assert name in (type(weight).__name__, type(weight.data).__name__)


@shows("torch_compile")
def test_the_model_is_compiled(runs, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    runs("--max_steps 1 --mask_init random")
    assert not compiled
    runs("--max_steps 1 --mask_init random --torch_compile")
    assert len(compiled) == 1 and compiled[0].srde


@pytest.mark.slow
def test_a_compiled_model_is_trained_through_all_phases_and_prunings(runs):
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    plain, run = runs(), runs("--compile --torch_compile_backend eager")
    assert stats["unique_graphs"] > before and run.log("sparsity") == plain.log("sparsity")
    assert run.log("loss") == pytest.approx(plain.log("loss"), rel=1e-4)


# ---- the rows -----------------------------------------------------------------------------------------------------------


@shows("jsonl_data")
def test_jsonl_data_names_the_rows_or_those_of_the_packed_set(runs):
    other = runs(f"--jsonl_data {runs.rows} --max_steps 1 --mask_init random", rows=False)
    assert other.results["rows"] == 24
    with pytest.raises(DataError, match=r"/nowhere.jsonl: file: does not exist"):
        runs(f"--pretokenized_dir {runs.packed} --jsonl_data /nowhere.jsonl", rows=False)
    with pytest.raises(ConfigError, match=r"jsonl_data=.*another name of --train_file"):
        runs(f"--jsonl_data {runs.held_out}")


@shows("pretokenized_dir", "data_order")
def test_a_packed_set_is_trained_on_in_its_order(runs):
    plain = f"--pretokenized_dir {runs.packed} --jsonl_data {runs.rows} --max_steps 3 --mask_init random"
    losses = []
    for order in ("shuffled", "balanced", "curriculum"):
        run = runs(f"{plain} --data_order {order}", rows=False)
        assert run.results["rows"] > 60
        losses.append(tuple(run.log("loss")))
    assert len(set(losses)) == 3
    assert runs(plain, rows=False).log("loss") == list(losses[0])


@shows("on_bad_row")
def test_bad_rows_end_the_run_or_are_left_out(runs, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(runs.rows.read_text() + '{"prompt": "a"}\n')
    flags = f"--train_file {bad} --max_steps 1 --mask_init random"
    with pytest.raises(DataError, match=r"bad.jsonl:25: response: is missing"):
        runs(flags)
    assert runs(f"{flags} --on_bad_row skip").results["bad_rows"] == 1


@shows("max_length", "packing", "per_device_train_batch_size")
def test_rows_are_packed_to_a_length(runs):
    plain = runs()
    short = runs(
        "--max_length 40 --no_packing --per_device_train_batch_size 4 --max_steps 1 --mask_init random"
    )
    assert plain.results["rows_left_out"] == 0 < short.results["rows_left_out"]
    assert plain.results["packed"] and not short.results["packed"]
    assert plain.log("tokens")[0] <= 96  # one row
    assert short.log("tokens")[0] > 40  # several, none of which has more


@shows(
    "eval_file",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "logging_steps",
    "save_steps",
    "use_muon",
    "report_to",
    "heartbeat_steps",
)
def test_how_often_and_how_a_run_measures_saves_and_reports(runs, monkeypatch):
    told, beats, held_out = [], [], []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            told.append(state.global_step)

    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "fake", Tracker)
    write, collate = srde.train.record.replace_json, NumberedCollator.__call__
    monkeypatch.setattr(
        srde.train.record, "replace_json",
        lambda path, facts: (beats.append(facts["step"]) if facts.get("status") == "training" else None, write(path, facts)),
    )  # fmt: skip
    monkeypatch.setattr(
        NumberedCollator, "__call__",
        lambda self, rows: (held_out.append(len(rows)) if not isinstance(rows[0], tuple) else None, collate(self, rows))[1],
    )  # fmt: skip
    measures = f"--eval_file {runs.held_out} --no_packing"
    run = runs(f"{measures} --eval_steps 4 --per_device_eval_batch_size 5 --logging_steps 3 --save_steps 5 --use_muon "
               "--report_to fake --heartbeat_steps 2")  # fmt: skip
    assert run.log("step", "eval") == [0, 4, 6] and run.log("step") == [3, 6]
    assert held_out == [5, 1] * 3
    assert set(told) == {0, 3, 4, 6}
    assert {2, 4, 6} <= set(beats) and 3 not in beats  # others are of phases, evaluations and saves
    assert {path.name for path in run.out.glob("checkpoint-?")} == {"checkpoint-5", "checkpoint-6"}
    optimizer = torch.load(run.out / "checkpoint-6/optimizer.pt", weights_only=True)
    assert any("momentum_buffer" in state for state in optimizer["state"].values())
    assert not any(runs().log("step", "eval"))

    follows = runs(f"{measures} --save_steps 2 --mask_init random")
    assert follows.log("step", "eval") == [0, 2, 4, 6]  # without --eval_steps, as often as it saves
    silent = runs(f"{measures} --eval_strategy no --save_steps 2 --mask_init random")
    assert not silent.log("step", "eval")


# ---- the experts --------------------------------------------------------------------------------------------------------


@shows(
    "num_experts",
    "initial_sparsity",
    "target_sparsity",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "orthogonality_loss_coef",
    "sparsity_loss_coef",
)
def test_size_of_the_experts_and_their_losses(runs):
    plain = runs()
    assert plain.tensor("values").shape == (3, 3, 4, 32)  # 3 experts; 10 % of 48 neurons
    assert plain.log("sparsity")[0] == 0.25 and plain.log("sparsity")[-1] == 0.1
    assert (
        runs("--num_experts 5 --initial_sparsity 0.1 --max_steps 1 --mask_init random")
        .tensor("values")
        .shape[1]
        == 5
    )
    names = ("router_aux_loss", "router_z_loss", "orthogonality_loss", "sparsity_loss")
    off = runs(" ".join(f"--{name}_coef 0" for name in names))
    for name in names:
        assert len(plain.log(name)) == 5 and not off.log(name), name  # not while masks are learned


@shows("top_k", "null_expert", "num_shared_experts", "router_temperature", "target_modules")
def test_how_tokens_are_routed(runs):
    run = runs(
        "--top_k 1 --null_expert --num_shared_experts 2 --router_temperature 1.5 --target_modules model.layers.0.mlp"
    )
    assert run.tensor("values").shape[1] == 3 + 2 and run.tensor("weight").shape[0] == 3 + 1
    assert set(run.log("router_temperature")) == {1.5} and set(runs().log("router_temperature")) == {1.0}
    assert list(run.model.srde.layers) == ["model.layers.0.mlp"]
    for one, chosen in ((run, 1), (runs(), 2)):
        with one.model.srde.record() as record, torch.no_grad():
            one.model(input_ids=torch.arange(8)[None])
        assert next(iter(record.calls[0].routes.values())).slot_TK.shape == (8, chosen)


@shows("granularity", "mask_init", "mask_seed")
def test_what_experts_rewrite(runs):
    short = "--max_steps 1 --mask_init random --initial_sparsity 0.1"
    one, other = (
        runs(f"{short} --granularity element --mask_seed 1"),
        runs(f"{short} --granularity element --mask_seed 2"),
    )
    assert one.tensor("values").ndim == 3 < runs().tensor("values").ndim
    assert not torch.equal(one.tensor("index"), other.tensor("index"))
    assert list(runs().phases) == ["mask_learning", "delta_training", "joint"]
    assert "mask_learning" not in runs("--max_steps 1 --mask_init random").phases
    chosen = {rule: runs(f"--max_steps 2 --mask_init {rule} --initial_sparsity 0.1").tensor("index") for rule in
              ("random", "magnitude", "gradient", "learned")}  # fmt: skip
    assert len({tuple(index.flatten().tolist()) for index in chosen.values()}) == 4


# ---- the run ------------------------------------------------------------------------------------------------------------


@shows("num_train_epochs")
def test_epochs_count_rows(runs):
    plain = runs(
        "--max_steps -1 --num_train_epochs 1 --mask_init random --no_packing --per_device_train_batch_size 8"
    )
    assert plain.results["steps"] == 24 / 8
    assert parse(runs.argv("out", "--train_file", "t", "--max_steps", "-1"))[3].max_steps == 5000


@shows("learning_rate", "lr_scheduler_type", "warmup_steps")
def test_the_learning_rate_follows_its_schedule(runs):
    run = runs("--learning_rate 0.01 --lr_scheduler_type constant_with_warmup --warmup_steps 2")
    assert run.log("learning_rate") == pytest.approx(
        [0, 0, 0.005, 0.01, 0.01, 0.01]
    )  # the first step learns masks
    assert max(runs().log("learning_rate")) == pytest.approx(0.003) != runs().log("learning_rate")[-1]


@shows(
    "phase_warmup_steps", "mask_learning_steps", "delta_training_steps", "supervised_experts", "expert_pretrain_steps",
    "domain_experts", "router_temperature_start", "warm_start",
)  # fmt: skip
def test_phases_and_supervision(runs):
    flags = (
        "--phase_warmup_steps 1 --mask_learning_steps 2 --delta_training_steps 3 --supervised_experts --max_steps 10 "
        "--expert_pretrain_steps 2 --domain_experts math=2 code=2 logic=2 --router_temperature_start 3"
    )
    run = runs(flags)
    assert run.phases == {
        "warm_up": (0, 1), "mask_learning": (1, 3), "expert_pretraining": (3, 5), "delta_training": (5, 6), "joint": (6, 10)
    }  # fmt: skip
    planned = resolve(runs.argv("out", "--train_file", "t", *flags.split())).phases
    assert run.phases == {phase.name: (phase.start, phase.end) for phase in planned}
    assert run.log("expert_load")[3:5] == [[[0, 0, 1]] * 2] * 2
    assert run.log("router_temperature") == pytest.approx([3, 3, 3, 3, 2, 1, 1, 1, 1, 1])
    assert len(run.log("router_supervision_loss")) == 2 and not runs().log("router_supervision_loss")

    alone = runs.argv("out", "--train_file", "t", "--warm_start", "--use_muon")
    assert parse(alone)[3].warm_start == "kmeans"
    weights = {}
    for how in ("none", "kmeans", "domains"):
        other = runs(f"--max_steps 1 --mask_init random --warm_start {how}")
        said = [event["text"] for event in other.read("events.jsonl") if event["event"] == "warm_start"]
        assert said == ([] if how == "none" else [f"the routers start from {how}"])
        weights[how] = tuple(other.tensor("weight").flatten().tolist())
    assert len(set(weights.values())) == 3


def test_activations_that_are_computed_twice_change_nothing(runs):
    """Tokens are forced in the second forward of a layer, which is in backward, as in the first."""
    flags = "--supervised_experts --mask_init random --expert_pretrain_steps 2 --delta_training_steps 3"
    plain, twice = runs(flags), runs(f"{flags} --activation_checkpointing")
    assert twice.log("loss") == plain.log("loss") and twice.log("grad_norm") == plain.log("grad_norm")


@shows("progressive_unlock", "unlock_steps")
def test_experts_are_opened_one_after_the_other(runs):
    plain = "--mask_init random --phase_warmup_steps 0 --delta_training_steps 0"
    assert runs(f"{plain} --progressive_unlock linear --unlock_steps 4").log("open_experts") == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert runs(f"{plain} --progressive_unlock warmup").log("open_experts") == [1, 1, 3, 3, 3, 3]
    assert set(runs().log("open_experts")) == {3}


@shows("prune_by")
def test_what_is_kept_when_pruning(runs):
    kept = {
        rule: runs(f"--prune_by {rule} --learning_rate 0.1 --save_steps 2")
        for rule in ("magnitude", "taylor", "importance")
    }
    assert len({tuple(run.tensor("index").flatten().tolist()) for run in kept.values()}) == 3
    state = {rule: load_file(run.out / "checkpoint-2/run_state.safetensors") for rule, run in kept.items()}
    assert {rule: len(tensors) for rule, tensors in state.items()} == {
        "magnitude": 0,
        "taylor": 2,
        "importance": 2,
    }


@shows("nan_policy", "max_skipped_steps", "logging_nan_inf_filter")
def test_numbers_that_are_not_finite_stop_the_run_or_are_skipped(runs, tmp_path):
    """The first update makes the experts infinite; from then on no step is finite."""
    explode = (
        "--learning_rate 1e38 --warmup_steps 0 --lr_scheduler_type constant --initial_sparsity 0.1".split()
    )
    with pytest.raises(TrainingError, match="step=2: the loss is not finite"):
        runs.start(tmp_path / "stop", *explode)
    with pytest.raises(TrainingError, match="step=4: the loss is not finite"):
        runs.start(tmp_path / "two", *explode, "--nan_policy", "skip", "--max_skipped_steps", "2")
    run = runs.start(tmp_path / "skip", *explode, "--nan_policy", "skip", "--logging_nan_inf_filter")
    assert run.results["skipped_steps"] == 4 and None not in run.log("loss")
    shown = [
        line["loss"] for line in map(json.loads, (tmp_path / "two/metrics.jsonl").read_text().splitlines())
    ]
    assert shown[-1] is None and shown[0] > 0  # not a number, in JSON


@shows("resume_from_checkpoint", "allow_changed")
def test_a_run_goes_on_from_a_checkpoint_unless_something_else_is_asked_for(runs, tmp_path):
    first = runs("--save_steps 3")
    goes_on = ["--save_steps", "3", "--resume_from_checkpoint"]
    other = runs.start(tmp_path / "other", *goes_on, str(first.out / "checkpoint-3"))
    assert [e["step"] for e in other.read("events.jsonl") if e["event"] == "resumed"] == [3]
    assert (other.out / "adapter_model.safetensors").read_bytes() == (
        first.out / "adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(
        ConfigError, match=r"resume_from_checkpoint='none': .* holds checkpoint-6 of an earlier run"
    ):
        runs.start(other.out, *goes_on, "none")
    with pytest.raises(ConfigError, match=r"learning_rate=0.01: checkpoint-6 was made with 0.003"):
        runs.start(other.out, "--learning_rate", "0.01")
    runs.start(other.out, "--learning_rate", "0.01", "--allow_changed", "learning_rate")
    assert [e["step"] for e in other.read("events.jsonl") if e["event"] == "resumed"] == [3, 6]


@shows("init_adapter", "train_experts", "train_router_only")
def test_a_run_goes_on_from_an_adapter(runs):
    """In full: test_life_cycle.py."""
    old = runs("--supervised_experts")
    more = (
        f"--init_adapter {old.out} --initial_sparsity 0.1"  # what `PLAIN` says of the start is not true of it
    )
    whole = runs(more)
    assert whole.read("adapter_config.json")["sparsity"] == 0.1
    assert torch.equal(whole.tensor("index"), old.tensor("index"))
    one, routers = runs(f"{more} --train_experts math"), runs(f"{more} --train_router_only")
    for run, moved, rows in (
        (whole, [True] * 3, [True] * 3),
        (one, [True, False, False], [True, False, False]),
    ):
        assert (run.tensor("values") != old.tensor("values")).any(0).flatten(1).any(1).tolist() == moved
        assert (run.tensor("weight") != old.tensor("weight")).any(1).tolist() == rows
    assert torch.equal(routers.tensor("values"), old.tensor("values"))
    assert (routers.tensor("weight") != old.tensor("weight")).any()


@shows("webhook_url", "webhook_allow_private")
def test_notifications_go_to_the_address_given(runs, tmp_path):
    short = ["--max_steps", "1", "--mask_init", "random"]
    with WebhookServer() as server:
        with pytest.raises(ConfigError, match="webhook_url"):
            runs.start(tmp_path / "refused", *short, "--webhook_url", server.url)
        runs.start(tmp_path / "sent", *short, "--webhook_url", server.url, "--webhook_allow_private")
        assert len(server.wait(2)) == 2 and "started" in json.dumps(server.bodies[0])


# ---- all of them --------------------------------------------------------------------------------------------------------


def own_flags():
    """The fields that srde adds to Transformers' or defines anew."""
    own = [
        name
        for part in (ModelArguments, DataArguments, ExpertArguments)
        for name in (f.name for f in fields(part))
    ]
    theirs = {field.name: field for field in fields(TrainingArguments)}
    return {*own, *(f.name for f in fields(RunArguments) if f.init and f is not theirs.get(f.name))}


def test_every_flag_is_tested():
    wanted = own_flags()
    assert {"num_experts", "max_steps", "nan_policy", "packing"} <= wanted and "seed" not in wanted
    assert wanted == TESTED


def test_the_founding_notes_command_runs_as_written(runs):
    """With a tiny model, its packed set and few steps, on a machine that need not have a GPU."""
    command = """
        --model_name BASE --pretokenized_dir PACKED --jsonl_data ROWS --output_dir OUT --max_steps 10 --use_muon --bf16
        --supervised_experts --expert_pretrain_steps 2 --warm_start --progressive_unlock linear
    """
    out = runs.folder / "founding"
    places = {"BASE": runs.base, "PACKED": runs.packed, "ROWS": runs.rows, "OUT": out}
    words = [str(places.get(word, word)) for word in command.split()]
    run_it = [*words, "--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1"]
    runs.start(out, *run_it, rows=False)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines][1:4] == ["expert_pretraining", "expert_pretraining", "joint"]
    assert (out / "adapter_model.safetensors").is_file() and Path(out / "checkpoint-10").is_dir()
