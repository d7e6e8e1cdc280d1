from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, OPTConfig

from srde.data.pack import PaddedCollator, pack, packed_collator, packing_is_exact
from srde.data.tokenize import IGNORE, Example
from srde.errors import DataError

SIZE = 64
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    ),
    "gpt2": GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(
        vocab_size=SIZE, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "bloom": BloomConfig(vocab_size=SIZE, hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip
ISOLATING = [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gpt2", "eager")]


def tiny(name: str, attention: str = "eager"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).double().eval()


def examples(count: int = 7, seed: int = 0) -> list[Example]:
    """Random examples of 4 to 12 tokens, the first half of each masked."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [rng.randrange(3, SIZE) for _ in range(rng.randint(4, 12))]
        half = len(ids) // 2
        made.append(Example(ids, [IGNORE] * half + ids[half:]))
    return made


def test_each_example_is_packed_once_and_rows_keep_to_the_length():
    given = examples(200)
    rows = pack(given, max_length=40)
    assert max(len(row.input_ids) for row in rows) <= 40
    unpacked = []
    for row in rows:
        assert len(row.input_ids) == len(row.labels) == len(row.position_ids)
        starts = [place for place, position in enumerate(row.position_ids) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row.input_ids)], strict=True):
            assert row.position_ids[start:end] == list(range(end - start))
            assert row.labels[start] == IGNORE
            unpacked.append((tuple(row.input_ids[start:end]), tuple(row.labels[start:end])))
    assert sorted(unpacked) == sorted((tuple(one.input_ids), tuple(one.labels)) for one in given)


def test_no_loss_crosses_into_the_next_example():
    whole = Example([5, 6, 7], [5, 6, 7])  # plain text: even its first label is set
    (row,) = pack([whole, whole], max_length=8)
    assert row.labels == [IGNORE, 6, 7, IGNORE, 6, 7]


def test_packing_is_tight():
    given = examples(500)
    total = sum(len(one.input_ids) for one in given)
    assert len(pack(given, max_length=64)) <= 1.04 * total / 64 + 1


def test_a_row_mixes_what_the_file_sorts():
    rows = pack([Example([kind] * 8, [kind] * 8) for kind in (1, 2) for _ in range(64)], max_length=128)
    assert len(rows) == 8
    for row in rows:
        assert 0.15 < row.input_ids.count(1) / 128 < 0.85
    assert rows == pack(
        [Example([kind] * 8, [kind] * 8) for kind in (1, 2) for _ in range(64)], max_length=128
    )


def test_an_example_that_fits_no_row_is_refused():
    with pytest.raises(DataError, match="has 9 tokens, more than max_length=8"):
        pack([Example([1] * 9, [1] * 9)], max_length=8)


def test_padded_batches():
    batch = PaddedCollator(pad_token_id=9)([Example([1, 2, 3], [IGNORE, 2, 3]), Example([4, 5], [IGNORE, 5])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [IGNORE, 5, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(("name", "attention"), ISOLATING)
def test_a_packed_example_does_not_see_the_others(name, attention):
    model = tiny(name, attention)
    given = examples(5)
    rows = pack(given, max_length=24)
    assert len(rows) > 1, "the batch must hold rows as well as examples within a row"
    batch = packed_collator(rows)
    starts = [*torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist(), batch["input_ids"].shape[1]]
    with torch.no_grad():
        before = model(**batch).logits
        for start, end in itertools.pairwise(starts):
            ids = batch["input_ids"].clone()
            ids[0, start:end] = (ids[0, start:end] + 7) % SIZE
            after = model(**{**batch, "input_ids": ids}).logits
            changed = (after != before).any(-1)[0]
            assert changed[start:end].all()
            assert not changed[:start].any() and not changed[end:].any()


@pytest.mark.parametrize(("name", "attention"), ISOLATING)
def test_packed_padded_and_single_losses_and_gradients_agree(name, attention):
    model = tiny(name, attention)
    given = examples(6)
    trained = sum(label != IGNORE for one in given for label in one.labels[1:])

    def gradients(batches):
        model.zero_grad()
        loss = sum(model(**batch, num_items_in_batch=trained).loss for batch in batches)
        loss.backward()
        return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    collate = PaddedCollator(pad_token_id=0)
    single = gradients(
        [{name: value for name, value in collate([one]).items() if name != "attention_mask"} for one in given]
    )
    for other in (gradients([packed_collator(pack(given, max_length=24))]), gradients([collate(given)])):
        for ours, reference in zip(other, single, strict=True):
            # Transformers takes the loss and eager attention's softmax in float32, whatever the model's dtype.
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_the_batch_itself_switches_the_cache_off():
    # Why the collator says use_cache=False: with the cache of a model's default, examples see each other.
    model = tiny("llama", "sdpa")
    batch = packed_collator(pack(examples(2), max_length=24))
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, model(**{**batch, "use_cache": True}).logits)


@pytest.mark.parametrize(
    ("name", "exact"), [("llama", True), ("gpt2", True), ("opt", False), ("bloom", False)]
)
def test_the_probe_tells_which_models_isolate(name, exact):
    model = tiny(name).train()
    assert packing_is_exact(model) is exact
    assert model.training
