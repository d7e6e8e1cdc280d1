"""A batch in parts: every token once, and the parts' losses and gradients add up to the whole's."""

from itertools import pairwise

import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

from srde import SrdeConfig
from srde.errors import TrainingError
from srde.train.memory import halves, means_out_of_memory, out_of_memory, parts
from srde.train.trainer import SrdeTrainer
from srde.tuner.config import LOSS_COEFS
from tiny import tiny

IGNORE = -100


def trained(batch):
    """Tokens that are predicted and count."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def padded(lengths):
    """One example a row; the first two tokens of each are not trained."""
    longest, generator = max(lengths), torch.Generator().manual_seed(0)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(6, 64, mask.shape, generator=generator)
    labels = ids.masked_fill((mask == 0) | (torch.arange(longest) < 2), IGNORE)
    domains = torch.arange(len(lengths))[:, None].expand_as(ids).masked_fill(mask == 0, -1)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "domain_ids": domains}


def packed(lengths):
    one = padded(lengths)
    keep = one.pop("attention_mask").bool()
    batch = {name: value[keep][None] for name, value in one.items()}
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    return batch | {"use_cache": False}


LENGTHS = [9, 4, 6, 12, 3, 8, 5]
BATCHES = {"padded": padded(LENGTHS), "packed": packed(LENGTHS)}


def examples(batch):
    """What each example of a batch holds, as plain numbers."""
    found = []
    for row, ids in enumerate(batch["input_ids"]):
        if "position_ids" in batch:
            starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), len(ids)]
        else:
            starts = [0, int(batch["attention_mask"][row].sum())]
        names = ("input_ids", "labels", "domain_ids")
        found += [[batch[name][row, a:b].tolist() for name in names] for a, b in pairwise(starts)]
    return found


@pytest.mark.parametrize("times", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("kind", BATCHES)
def test_the_parts_hold_every_example_once_and_whole(kind, times):
    batch = BATCHES[kind]
    found = parts(batch, times)
    assert [one for part in found for one in examples(part)] == examples(batch)
    assert len(found) == min(2**times, len(LENGTHS))
    assert sum(map(trained, found)) == trained(batch)
    assert all(set(part) == set(batch) and part.get("use_cache") == batch.get("use_cache") for part in found)
    if times == 10:
        assert [len(examples(part)) for part in found] == [1] * len(LENGTHS)


def test_packed_examples_are_cut_where_the_parts_are_most_even():
    first, second = halves(packed([2, 3, 20, 4, 5]))
    assert [first["input_ids"].shape[1], second["input_ids"].shape[1]] == [25, 9]
    first, second = halves(packed([10, 3, 4, 3]))
    assert [first["input_ids"].shape[1], second["input_ids"].shape[1]] == [10, 10]


def test_one_example_cannot_be_halved():
    assert halves(padded([7])) is None and halves(packed([7])) is None
    assert [part["input_ids"].shape for part in parts(packed([7]), 3)] == [(1, 7)]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("kind", BATCHES)
def test_shares_of_the_loss_and_gradients_add_up_to_the_wholes(kind, counted, tmp_path):
    """With the trainer's count of tokens, and with means over the part that are weighted by their share."""
    torch.manual_seed(0)
    settings = dict.fromkeys(LOSS_COEFS, 0.0)
    model = get_peft_model(tiny(), SrdeConfig(num_experts=4, **settings))
    for layer in model.srde.layers.values():
        torch.nn.init.normal_(layer.srde_experts["default"].values, std=0.1)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = SrdeTrainer(model=model, args=args, train_dataset=[])
    trainer.current_gradient_accumulation_steps = 1
    batch = BATCHES[kind]
    items = torch.tensor(trained(batch)) if counted else None

    def run(pieces):
        model.zero_grad()
        total = 0.0
        for part in pieces:
            trainer.share = trained(part) / trained(batch)
            inputs = {name: value for name, value in part.items() if name != "domain_ids"}
            loss = trainer.compute_loss(model.train(), inputs, num_items_in_batch=items)
            loss.backward()
            total += float(trainer.language_loss)
        return total, [p.grad.clone() for p in model.parameters() if p.requires_grad]

    whole = run([batch])
    for times in (1, 2, 3):
        split = run(parts(batch, times))
        assert split[0] == pytest.approx(whole[0], rel=1e-6)
        for a, b in zip(split[1], whole[1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] not enough memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_want_of_memory_is_told_from_other_failures(error, want):
    assert means_out_of_memory(error) == want


def test_the_error_says_what_does_not_fit_and_what_to_lower():
    error = out_of_memory(padded([7, 9]), RuntimeError("out of memory: tried 5 GiB\nmore"))
    assert isinstance(error, TrainingError)
    assert str(error) == (
        "batch='2 x 9 tokens': out of memory: out of memory: tried 5 GiB. Lower --max_length, then "
        "--per_device_train_batch_size, or pass --gradient_checkpointing true, --dtype bfloat16 or --quantization nf4."
    )
    assert "out of memory: MemoryError." in str(out_of_memory(padded([7]), MemoryError()))
