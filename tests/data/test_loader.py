"""The packed set's loader: order, resumption, isolation of packed examples."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model

from data_sets import rows, write_rows
from srde import SrdeConfig
from srde.cli import main
from srde.data.build.build import build
from srde.data.build.settings import BuildSettings
from srde.data.loader import ORDERS, PackedDataset, PackedLoader, balanced, curriculum
from srde.data.pack import packed_collator, packing_is_exact
from srde.errors import ArtifactError, ConfigError
from tiny import save_tiny, tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A small set: domains of unequal sizes."""
    folder = tmp_path_factory.mktemp("set")
    tiny_tokenizer().save_pretrained(folder / "model")
    made = [
        row
        for place, row in enumerate(rows(400, seed=4, low=4, high=30))
        if place % 6 != 1 or place % 3 == 0 or place < 60
    ]
    source = write_rows(folder / "rows.jsonl", made)
    wanted = {"sources": [str(source)], "max_length": 1024, "num_proc": 1, "validation_fraction": 0.1}
    build(BuildSettings(str(folder / "model"), str(folder / "out"), **wanted))
    return folder / "out"


def key(row):
    return tuple(np.asarray(row.input_ids).tolist())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_goes_on_at_the_exact_row_with_any_number_of_workers(work, order, workers):
    dataset = PackedDataset(work, order=order, seed=3)
    loader = PackedLoader(dataset, batch_size=3)
    whole = [batch["input_ids"] for _ in range(2) for batch in loader]
    assert len(whole) == 2 * len(loader)
    assert torch.equal(whole[0], whole[len(loader)]) == (order == "curriculum")
    for cut in (1, len(loader) - 1, len(loader), len(loader) + 2):
        first = PackedLoader(dataset, batch_size=3, num_workers=workers)
        seen = []
        while len(seen) < cut:
            for batch in first:
                seen.append(batch["input_ids"])
                if len(seen) == cut:
                    state = first.state_dict()
                    break
        second = PackedLoader(PackedDataset(work, order=order, seed=3), batch_size=3, num_workers=2 - workers)
        second.load_state_dict(state)
        while second.epoch < 2:
            seen += [batch["input_ids"] for batch in second]
        assert len(seen) == len(whole) and all(map(torch.equal, seen, whole))


def test_an_epoch_has_every_row_once_and_the_next_another_order(work):
    dataset = PackedDataset(work, seed=1)
    epochs = [[key(dataset[row]) for row in dataset.epoch(number)] for number in (0, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(key, dataset))
    other = PackedDataset(work, seed=2)
    assert [key(other[row]) for row in other.epoch(0)] != epochs[0]


def test_ranks_share_an_epoch(work):
    dataset = PackedDataset(work)
    alone = [batch["input_ids"] for batch in PackedLoader(dataset, batch_size=2)]
    shares = [
        [batch["input_ids"] for batch in PackedLoader(dataset, batch_size=2, rank=rank, world_size=3)]
        for rank in range(3)
    ]
    assert len({len(share) for share in shares}) == 1
    joined = [share[place] for place in range(len(shares[0])) for share in shares]
    assert all(map(torch.equal, joined, alone))  # zip ends with the shorter: what follows is repeated
    assert all(torch.equal(one, alone[place]) for place, one in enumerate(joined[len(alone) :]))


def domain_tokens(row):
    trained = np.asarray(row.labels) != -100
    return np.bincount(np.asarray(row.domain_ids)[trained], minlength=6)


def test_balanced_order_gives_every_domain_as_many_trained_tokens(work):
    plain, even = PackedDataset(work), PackedDataset(work, order="balanced")
    given = sum(domain_tokens(row) for row in plain)
    assert given.max() > 1.5 * given.min()
    running = np.cumsum([domain_tokens(row) for row in even], axis=0)
    assert running[-1].max() < 1.1 * running[-1].min()
    half = running[len(running) // 2]
    assert half.max() < 1.3 * half.min()
    examples = {key_of for row in plain for key_of in split(row)}
    assert {key_of for row in even for key_of in split(row)} == examples


def test_curriculum_goes_from_short_responses_to_long_ones_in_every_domain(work):
    plain, rising = PackedDataset(work), PackedDataset(work, order="curriculum")
    assert sorted(one for row in rising for one in split(row)) == sorted(
        one for row in plain for one in split(row)
    )
    means = [domain_tokens(row).sum() / len(split(row)) for row in rising]
    third = len(means) // 3
    assert np.mean(means[:third]) < 0.7 * np.mean(means[-third:])
    assert (sum(domain_tokens(row) for row in list(rising)[:third]) > 0).all()


def split(row):
    """The examples of a row: ids and labels."""
    starts = [*np.flatnonzero(np.asarray(row.position_ids) == 0), len(row.input_ids)]
    return [
        (tuple(row.input_ids[a:b].tolist()), tuple(row.labels[a:b].tolist()))
        for a, b in itertools.pairwise(starts)
    ]


def test_the_orders_against_slow_references():
    rng = np.random.default_rng(0)
    domains, trained = rng.integers(0, 3, 200), rng.integers(1, 50, 200)
    totals = np.zeros(3)
    for place in balanced(domains, trained, seed=5):
        assert totals[domains[place]] == totals.min()
        totals[domains[place]] += trained[place]
    longest = np.argmax([trained[domains == domain].sum() for domain in range(3)])
    assert totals[longest] == trained[domains == longest].sum()
    order = curriculum(domains, trained)
    assert sorted(order) == list(range(200))
    for domain in range(3):
        own = [trained[place] for place in order if domains[place] == domain]
        assert own == sorted(own)
    assert balanced(domains[:0], trained[:0], 0) == []


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gpt2"])
def test_nothing_crosses_from_one_packed_example_to_the_next(work, model_type):
    """Changing one example changes no bit of another's logits or of its loss."""
    dataset = PackedDataset(work)
    longest = {"n_positions": 2048} if model_type == "gpt2" else {"max_position_embeddings": 2048}
    model = tiny(model_type, vocab_size=320, **longest)
    model = get_peft_model(model, SrdeConfig(num_experts=3, sparsity=0.1, task_type="CAUSAL_LM")).eval()
    assert packing_is_exact(model)
    batch = packed_collator([max(dataset, key=lambda row: len(split(row)))])
    batch.pop("domain_ids")
    starts = [*np.flatnonzero(batch["position_ids"][0].numpy() == 0), batch["input_ids"].shape[1]]
    assert len(starts) > 3
    before, after = starts[1], starts[2]  # the second example is changed
    changed = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
    changed["input_ids"][0, before:after] = (changed["input_ids"][0, before:after] + 7) % 300
    with torch.no_grad():
        one, other = (
            model(**{k: v for k, v in b.items() if k != "labels"}).logits[0] for b in (batch, changed)
        )
    same = torch.ones(len(one), dtype=torch.bool)
    same[before:after] = False
    assert torch.equal(one[same], other[same])
    assert not torch.equal(one[~same], other[~same])
    # The first token of an example is predicted by nobody: the loss of the one before ends with it.
    assert all(batch["labels"][0, start] == -100 for start in starts[:-1])
    losses = [
        torch.nn.functional.cross_entropy(logits[:-1], batch["labels"][0, 1:], reduction="none")
        for logits in (one, other)
    ]
    assert torch.equal(losses[0][: before - 1], losses[1][: before - 1])
    assert torch.equal(losses[0][after:], losses[1][after:])


def test_states_of_other_runs_are_refused(work):
    state = PackedLoader(PackedDataset(work), batch_size=2).state_dict()
    for loader, field in (
        (PackedLoader(PackedDataset(work), batch_size=3), "batch_size=3"),
        (PackedLoader(PackedDataset(work, seed=9), batch_size=2), "seed=9"),
        (PackedLoader(PackedDataset(work, order="balanced"), batch_size=2), "order='balanced'"),
        (PackedLoader(PackedDataset(work, "validation"), batch_size=2), "data="),
        (PackedLoader(PackedDataset(work), batch_size=2, world_size=2), "world_size=2"),
    ):
        with pytest.raises(ConfigError, match=field):
            loader.load_state_dict(state)
    with pytest.raises(ConfigError, match="ranks count from 0"):
        PackedLoader(PackedDataset(work), rank=2, world_size=2)


@pytest.mark.faults
def test_a_damaged_set_is_refused(work, tmp_path):
    copy = Path(shutil.copytree(work, tmp_path / "copy"))
    shard = copy / "tokenized/train/data-00000-of-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"data-00000-of-00001\.arrow: sha256"):
        PackedDataset(copy)
    shard.write_bytes(content[:-8])
    with pytest.raises(ArtifactError, match=r"data-00000-of-00001\.arrow: bytes"):
        PackedDataset(copy)
    with pytest.raises(ArtifactError):
        PackedDataset(tmp_path)
    with pytest.raises(ConfigError, match="order='random': it must be one of shuffled, balanced, curriculum"):
        PackedDataset(work, order="random")
    with pytest.raises(ConfigError, match="split='test': the set has train and validation"):
        PackedDataset(work, "test")


def test_training_on_a_packed_set(work, tmp_path, capfd):
    save_tiny(tmp_path / "model")
    flags = [
        "train", "--model_name_or_path", str(tmp_path / "model"), "--pretokenized_dir", str(work / "tokenized"),
        "--max_steps", "6", "--num_experts", "6", "--logging_steps", "2", "--supervised_experts", "--expert_pretrain_steps", "3",
        "--eval_strategy", "steps", "--eval_steps", "3", "--report_to", "none", "--learning_rate", "0.02",
    ]  # fmt: skip
    assert main([*flags, "--output_dir", str(tmp_path / "run"), "--data_order", "balanced"]) == 0
    out = capfd.readouterr().out
    assert (
        "router_supervision_loss" in out
        and "eval_loss" in out
        and (tmp_path / "run/adapter_model.safetensors").is_file()
    )
    assert main([*flags, "--output_dir", str(tmp_path / "unpacked"), "--packing", "False"]) == 0
    assert main([*flags, "--output_dir", str(tmp_path / "both"), "--train_file", "x.jsonl"]) == 1
    assert "pass one of --train_file and --pretokenized_dir" in capfd.readouterr().err


def test_the_trainer_takes_the_rows_in_the_sets_own_order(work, tmp_path):
    from transformers import TrainingArguments

    from srde.train.trainer import SrdeTrainer

    dataset = PackedDataset(work, seed=5)
    model = get_peft_model(tiny(vocab_size=320), SrdeConfig(num_experts=2, sparsity=0.1))
    args = TrainingArguments(
        str(tmp_path),
        report_to="none",
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = SrdeTrainer(model=model, args=args, train_dataset=dataset, data_collator=packed_collator)
    seen = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    expected = [batch["input_ids"] for batch in PackedLoader(dataset, batch_size=2)]
    assert len(seen) == len(expected) and all(map(torch.equal, seen, expected))


def test_another_tokenizer_is_refused(work, tmp_path, capfd):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    save_tiny(tmp_path / "model")
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), eos_token="b"
    )
    other.save_pretrained(tmp_path / "model")
    flags = [
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--pretokenized_dir",
        str(work),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert main(["train", *flags]) == 1
    assert "it was made for model (vocabulary" in capfd.readouterr().err
