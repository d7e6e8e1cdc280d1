"""Training that goes on from an adapter: only what is named changes, and not one bit more, whatever the optimizer does."""

from __future__ import annotations

import gc
import json
import os
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from flag_runs import PLAIN, Finished, Runs
from srde.cli import main
from srde.errors import ArtifactError, ConfigError
from srde.train.arguments import RunArguments, parse
from srde.train.course import rest_for
from srde.train.resolve import resolve
from srde.train.run import run
from srde.train.supervision import Supervision, domain_table
from srde.tuner import SrdeConfig
from srde.tuner.experts import (
    add_expert,
    choose_masks,
    compare_adapters,
    freeze_experts,
    read_adapter,
    switch_experts,
    write_adapter,
)
from srde.tuner.loading import load_base
from tiny import save_tiny, tiny

WAYS = {
    "adamw": "--weight_decay 0.1",
    "muon": "--weight_decay 0.1 --use_muon",
    "accumulated": "--weight_decay 0.1 --gradient_accumulation_steps 2 --max_grad_norm 0",
}
MORE = "--max_steps 6 --max_length 96 --logging_steps 1 --disable_tqdm true --use_cpu --learning_rate 0.05 --warmup_steps 0"
"""Settings of the runs that go on: what the adapter says itself is left out."""


class Story(Runs):
    """Runs that start from a trained adapter with one more expert.

    Attributes:
        old: The adapter of three experts, a shared one and a null slot.
        start: The same with an expert "medicine", number 3.
        pills: Rows without a domain.
    """

    def __init__(self, folder):
        super().__init__(folder)
        self.old = self("--supervised_experts --num_shared_experts 1 --null_expert true").out
        grown = read_adapter(self.old)
        grown = add_expert(grown, "medicine", masks=choose_masks(grown, "magnitude"))
        self.start_from = folder / "grown"
        write_adapter(grown, self.start_from)
        rows = [{"prompt": f"pill {n}", "response": "red blue " * (1 + n % 4)} for n in range(16)]
        self.pills = folder / "pills.jsonl"
        self.pills.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def go_on(self, out, flags="", *, adapter=None, rows=None):
        """A run from an adapter, which is the grown one, on the rows without a domain, if nothing else is said."""
        words = [
            "--model_name",
            str(self.base),
            "--train_file",
            str(rows or self.pills),
            "--output_dir",
            str(out),
        ]
        words += ["--init_adapter", str(adapter or self.start_from), *MORE.split(), *flags.split()]
        return Finished(out, run(*parse(words)).model)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Runs without plots, without waiting for the disk, without looking for garbage."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srde.monitor.plots.save_plots", lambda *_: [])
        patch.setattr(os, "fsync", lambda _: None)
        yield Story(tmp_path_factory.mktemp("story"))
    gc.unfreeze()


def differences(one, two):
    found = compare_adapters(read_adapter(one), read_adapter(two))
    return [expert["name"] for expert in found.experts if not expert["identical"]], found


# ---- one more expert -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_training_one_expert_leaves_all_else_bit_identical(story, tmp_path, way):
    done = story.go_on(tmp_path / "out", f"--train_experts medicine {WAYS[way]}")
    names, found = differences(story.start_from, done.out)
    assert names == ["medicine"] and found.tensors == []  # the shared expert and the null slot stay too
    assert found.settings == {"disabled_experts": ([3], None)}  # switched on, and nobody is left frozen
    new = read_adapter(done.out)
    assert all(layer.values[:, 3].abs().max() > 0 for layer in new.layers.values())
    assert found.experts[3]["masks"] == 0 and found.experts[3]["router"] > 0
    assert done.phases == {"expert_pretraining": (0, 1), "joint": (1, 6)}
    load = done.log("expert_load")
    assert all(row[:3] == [0, 0, 0] and row[3] == 1 for row in load[0])  # all rows are its own at first
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(story.base), done.out).eval()
    ids = torch.arange(10).view(1, -1)
    assert torch.equal(model(ids).logits, done.model.eval()(ids).logits)


def test_the_phases_and_the_warm_start_of_one_expert(story, tmp_path):
    flags = "--train_experts 3 --expert_pretrain_steps 2 --delta_training_steps 3 --phase_warmup_steps 1 --warm_start domains"
    done = story.go_on(tmp_path / "out", flags)
    assert done.phases == {
        "warm_up": (0, 1), "expert_pretraining": (1, 3), "delta_training": (3, 4), "joint": (4, 6)
    }  # fmt: skip
    names, found = differences(story.start_from, done.out)
    assert names == ["medicine"] and found.tensors == []
    assert [e["event"] for e in done.read("events.jsonl")].count("warm_start") == 1


def test_rows_of_a_domain_go_to_the_experts_of_its_name(story, tmp_path):
    rows = [json.loads(line) for line in story.rows.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["domain"] = ("medicine", "math", "art")[number % 3]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--train_experts medicine --expert_pretrain_steps 6"
    done = story.go_on(tmp_path / "out", flags, rows=tmp_path / "rows.jsonl")
    assert differences(story.start_from, done.out)[0] == ["medicine"]
    load = torch.tensor(done.log("expert_load")).mean((0, 1))
    assert load[0] > 0.2 and load[3] > 0.2  # of math and of medicine; art is routed


def test_several_experts_are_trained_and_the_others_not(story, tmp_path):
    done = story.go_on(
        tmp_path / "out", "--train_experts math medicine --expert_pretrain_steps 6 --weight_decay 0.1"
    )
    assert differences(story.start_from, done.out)[0] == ["math", "medicine"]


def test_a_killed_run_goes_on_to_the_same_bits_and_with_nothing_else(story, tmp_path):
    flags = "--train_experts medicine --weight_decay 0.1 --save_steps 2"
    whole = story.go_on(tmp_path / "whole", flags)
    shutil.copytree(
        whole.out, tmp_path / "killed", ignore=shutil.ignore_patterns("adapter_*", "*-6", "MANIFEST.json")
    )
    shutil.copytree(whole.out / "checkpoint-2", tmp_path / "killed/checkpoint-2", dirs_exist_ok=True)
    shutil.copytree(whole.out / "checkpoint-4", tmp_path / "killed/checkpoint-4", dirs_exist_ok=True)
    for change, message in (
        ("--train_experts math", r"train_experts=\[0\]: checkpoint-4 was made with \[3\]"),
        (f"--init_adapter {story.old} --train_experts math", r"init_adapter='\w+'|num_experts=3"),
    ):
        with pytest.raises(ConfigError, match=message):
            story.go_on(tmp_path / "killed", f"{flags} {change}")
    again = story.go_on(tmp_path / "killed", flags)
    assert [e["step"] for e in again.read("events.jsonl") if e["event"] == "resumed"] == [4]
    assert (again.out / "adapter_model.safetensors").read_bytes() == (
        whole.out / "adapter_model.safetensors"
    ).read_bytes()
    assert (again.out / "adapter_config.json").read_bytes() == (
        whole.out / "adapter_config.json"
    ).read_bytes()


# ---- the routers alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["adamw", *(pytest.param(way, marks=pytest.mark.slow) for way in ("muon", "accumulated"))]
)
def test_a_refit_moves_the_routers_alone(story, tmp_path, way):
    done = story.go_on(
        tmp_path / "out", f"--train_router_only {WAYS[way]}", adapter=story.old, rows=story.rows
    )
    assert done.phases == {"joint": (0, 6)}
    old, new = read_adapter(story.old), read_adapter(done.out)
    for name, layer in old.layers.items():
        other = new.layers[name]
        assert torch.equal(layer.values, other.values) and torch.equal(layer.index, other.index)
        assert (layer.weight != other.weight).any(1).all()  # each row, the null slot's too
    found = compare_adapters(old, new)
    assert not found.settings and all(e["values"] == 0 and e["router"] > 0 for e in found.experts[:3])


@pytest.mark.parametrize("flags", ["--train_experts 1", "--train_router_only", ""])
def test_modules_beside_the_experts_are_trained_only_with_all_of_them(story, tmp_path, flags):
    config = SrdeConfig(
        num_experts=3, target_sparsity=0.05, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    get_peft_model(load_base(str(story.base)), config).save_pretrained(tmp_path / "start")
    done = story.go_on(tmp_path / "out", f"{flags} --weight_decay 0.1", adapter=tmp_path / "start")
    old, new = read_adapter(tmp_path / "start").others, read_adapter(done.out).others
    assert list(old) == list(new) and len(old) == 1
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items()) == bool(flags)


@pytest.mark.parametrize("way", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_single_entries_are_held_alike(story, tmp_path, way):
    old = story("--granularity element --mask_init random --num_shared_experts 1 --max_steps 3").out
    grown = add_expert(read_adapter(old), "medicine", copy_of=1, names=["a", "b", "c"])
    write_adapter(grown, tmp_path / "start")
    done = story.go_on(tmp_path / "out", f"--train_experts medicine {WAYS[way]}", adapter=tmp_path / "start")
    assert differences(tmp_path / "start", done.out)[0] == ["medicine"]
    refit = story.go_on(tmp_path / "refit", f"--train_router_only {WAYS[way]}", adapter=done.out)
    found = differences(done.out, refit.out)[1]
    assert [one["values"] for one in found.experts[:4]] == [0] * 4 and found.experts[4]["identical"]


# ---- frozen and disabled experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["adamw", "muon"])
def test_frozen_and_disabled_experts_stay_in_every_run(story, tmp_path, way):
    adapter = switch_experts(freeze_experts(read_adapter(story.start_from), [1]), [2], on=False)
    write_adapter(adapter, tmp_path / "start")
    flags = f"--supervised_experts --warm_start domains {WAYS[way]}"
    done = story.go_on(tmp_path / "out", flags, adapter=tmp_path / "start", rows=story.rows)
    names, found = differences(tmp_path / "start", done.out)
    assert names == ["math", "shared 0"] and not found.settings
    assert len(found.tensors) == 2  # the null slot's row, in both layers
    with torch.no_grad(), done.model.srde.record() as record:
        done.model.eval()(torch.arange(40).view(1, -1))
    slots = torch.cat([route.slot_TK[:, 0] for route in record.calls[0].routes.values()])
    assert not ({2, 3} & set(slots.tolist()))


# ---- what a run takes over, and what it refuses ------------------------------------------------------------------------------


def test_settings_are_the_adapters_but_for_those_given(story, tmp_path):
    words = [
        "--model_name",
        str(story.base),
        "--train_file",
        str(story.pills),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    words += ["--init_adapter", str(story.start_from)]
    config = resolve([*words, "--max_steps", "9"])
    assert config.run.train_experts is None and [phase.name for phase in config.phases] == ["joint"]
    flags = "--router_aux_loss_coef 0.5 --top_k 2 --num_experts 4 --mask_init gradient --router_temperature 2"
    done = story.go_on(tmp_path / "out", flags, rows=story.rows)
    config = done.read("adapter_config.json")
    assert (
        config["router_aux_loss_coef"] == 0.5
        and config["router_temperature"] == 2
        and config["num_experts"] == 4
    )
    assert (
        config["sparsity"] == 0.1 and config["mask_init"] == "learned" and config["disabled_experts"] == [3]
    )
    old, new = read_adapter(story.start_from), read_adapter(done.out)
    assert all(torch.equal(layer.index, new.layers[name].index) for name, layer in old.layers.items())
    told = [event["text"] for event in done.read("events.jsonl") if event["event"] == "start"]
    assert told[0].endswith("trains all experts that are not frozen or disabled, and the routers")
    assert told[1] == f"--mask_init is ignored: the masks are those of {story.start_from}"


def test_an_adapter_is_pruned_further_where_all_of_it_is_trained(story, tmp_path):
    done = story.go_on(tmp_path / "out", "--target_sparsity 0.05", adapter=story.old, rows=story.rows)
    assert done.read("adapter_config.json")["sparsity"] == 0.05 and done.tensor("index").shape == (4, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_experts 8", r"num_experts=8: .*grown has 4, and is trained as it is"),
        ("--granularity element", "granularity='element': .*grown has 'neuron'"),
        ("--layers_to_transform 0", r"layers_to_transform=\[0\]: .*grown has None"),
        ("--initial_sparsity 0.05", r"initial_sparsity=0.05: .*grown has 0\.1"),
        ("--target_sparsity 0.2", r"target_sparsity=0.2: .*grown has 0\.1, and training only prunes"),
        (
            "--target_sparsity 0.05",
            "target_sparsity=0.05: with frozen or disabled experts some experts must stay",
        ),
        (
            "--target_sparsity 0.05 --train_experts 3",
            "target_sparsity=0.05: with --train_experts some experts must stay",
        ),
        (
            "--train_experts law",
            "expert='law': the adapter's experts are numbered 0 to 3, named math, logic, code, medicine",
        ),
        (
            "--train_experts 3 --train_router_only",
            "train_router_only=True: it leaves all experts as they are",
        ),
        ("--progressive_unlock linear", "progressive_unlock='linear': it opens untrained experts one by one"),
        ("--mask_learning_steps 2", "mask_learning_steps=2: the masks are those of --init_adapter"),
        ("--train_router_only --delta_training_steps 2", "delta_training_steps=2: they train the experts"),
        ("--prune_by importance", "prune_by='importance': importance is what mask learning finds"),
        (
            "--expert_pretrain_steps 2",
            "expert_pretrain_steps=2: it does nothing without --supervised_experts",
        ),
        ("--train_experts 3 --domain_experts math=9", "domain_experts='math=9': an entry is a domain"),
        ("--supervised_experts --domain_experts math=3", "domain_experts='math=3': expert 3 is disabled"),
    ],
)
def test_what_contradicts_the_adapter_is_refused(story, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        story.go_on(tmp_path / "out", flags, rows=story.rows)
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_flags_that_are_the_default_contradict_too_when_they_are_given(story, tmp_path):
    with pytest.raises(ConfigError, match=r"num_experts=8: .* has 3"):  # eight is the default
        story.go_on(tmp_path / "out", "--num_experts 8", adapter=story.old)


def test_what_cannot_be_the_start_is_refused(story, tmp_path):
    with pytest.raises(ArtifactError, match=r"it must be a local folder with an adapter_config\.json"):
        story.go_on(tmp_path / "out", adapter=tmp_path / "nowhere")
    with pytest.raises(
        ConfigError, match="it is --output_dir, and a run that is stopped must find its start again"
    ):
        story.go_on(story.start_from)
    frozen = tmp_path / "frozen"
    write_adapter(freeze_experts(read_adapter(story.old), [0]), frozen)
    with pytest.raises(ConfigError, match=r"train_experts=\['math'\]: expert 0 is frozen in .*frozen"):
        story.go_on(tmp_path / "out", "--train_experts math", adapter=frozen)
    write_adapter(freeze_experts(read_adapter(frozen), [1, 2]), frozen)
    with pytest.raises(
        ConfigError, match="all of its experts are frozen or disabled, and nothing is left to train"
    ):
        story.go_on(tmp_path / "out", adapter=frozen)
    for flags in ("--train_experts 0", "--train_router_only"):
        with pytest.raises(ConfigError, match="new experts are trained all together, with their routers"):
            story.start(tmp_path / "out", *flags.split())


def test_rows_that_are_for_nobody_who_is_trained_are_refused(story, tmp_path):
    with pytest.raises(
        ConfigError, match="the rows are of the domains math, logic, code, and none of these is theirs"
    ):
        story.go_on(tmp_path / "out", "--train_experts medicine", rows=story.rows)
    done = story.go_on(tmp_path / "out", "--train_experts medicine --domain_experts math=3", rows=story.rows)
    assert differences(story.start_from, done.out)[0] == ["medicine"]


def test_another_base_is_refused(story, tmp_path):
    other = save_tiny(tmp_path / "base")
    tiny(seed=5, vocab_size=320, max_position_embeddings=2048).save_pretrained(other)
    with pytest.raises(ArtifactError, match="the adapter was trained on other weights"):
        story.go_on(tmp_path / "out", f"--model_name {other}")


# ---- whose tokens are whose ------------------------------------------------------------------------------------------------


def test_tokens_without_a_domain_go_to_the_experts_that_are_trained():
    domains = torch.tensor([[0, 0, 1, 1, -1, -1]])
    positions = torch.tensor([[0, 1, 0, 1, 0, 1]])
    given = Supervision(9, 4, table=((0,), ()), rest=(3,)).experts(domains, positions)
    assert given.tolist() == [[0, 0, -1, -1, 3, 3]]
    nothing = torch.full((2, 3), -1)
    assert Supervision(9, 4, rest=(3,)).experts(nothing).tolist() == [[3] * 3] * 2
    shared = Supervision(9, 4, table=(), rest=(1, 2)).experts(nothing).tolist()
    assert sorted(shared) == [[1] * 3, [2] * 3]


def test_domains_have_the_experts_of_their_names_that_are_switched_on():
    names = ["math", "code", "art"]
    assert domain_table(names, 3, None, named=["code", "math", "code"], disabled=[2]) == ((1,), (0,), ())
    assert domain_table(names, 2, None) == ((0,), (1,), (0,))
    assert domain_table(names, 3, ["art=1"], named=["code", "math", "code"]) == ((1,), (0, 2), (1,))


def test_rows_for_those_who_are_trained():
    table = ((0,), (1,), (3,))
    assert rest_for([3], table, {0, 2, -1}, ["a", "b", "c"]) == ()
    assert rest_for([3], table, {0, -1}, ["a", "b", "c"]) == (3,) == rest_for([3], (), {-1}, [])
    with pytest.raises(ConfigError, match="--domain_experts a=3"):
        rest_for([3], table, {0, 1}, ["a", "b", "c"])


# ---- names -----------------------------------------------------------------------------------------------------------------


def test_a_run_that_ties_experts_to_domains_names_them(story):
    assert story().read("adapter_config.json")["expert_names"] is None  # nothing ties them
    assert read_adapter(story.old).config.expert_names == ["math", "logic", "code"]
    more = story(
        "--num_experts 5 --supervised_experts --domain_experts math=0,4 logic=1 --max_steps 2 --mask_init random"
    )
    assert more.read("adapter_config.json")["expert_names"] == ["math", "logic", "code", "expert 3", "math"]
    few = story("--num_experts 2 --supervised_experts --max_steps 2 --mask_init random")
    assert few.read("adapter_config.json")["expert_names"] == ["math+code", "logic"]


@pytest.mark.slow
def test_the_domains_of_a_packed_set_name_experts(story):
    done = story(
        f"--pretokenized_dir {story.packed} --supervised_experts --max_steps 2 --mask_init random", rows=False
    )
    assert done.read("adapter_config.json")["expert_names"] == ["math", "logic", "code"]


def test_flags_of_a_run_from_python_are_those_that_are_not_the_default(story, tmp_path):
    from srde.train.arguments import ExpertArguments
    from srde.train.start import start_of

    args = RunArguments(output_dir=str(tmp_path / "o"), init_adapter=str(story.start_from), use_cpu=True)
    assert start_of(ExpertArguments(), args).config.num_experts == 4
    with pytest.raises(ConfigError, match="num_experts=5"):
        start_of(ExpertArguments(num_experts=5), args)


def test_srde_train_says_in_one_line_what_is_wrong(story, tmp_path, capsys):
    argv = [
        "train",
        "--model_name",
        str(story.base),
        "--train_file",
        str(story.pills),
        "--output_dir",
        str(tmp_path),
        *PLAIN,
    ]
    assert main([*argv, "--train_experts", "math"]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .startswith("srde train: train_experts=['math']: new experts")
    )
