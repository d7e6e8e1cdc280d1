"""One answer, whatever way it is made: routed, forced or the base; alone or in a batch of eight, padded on the left; streamed or
not; with a cache that grows, a fixed one, or none. The reference is a loop of whole forwards and argmax, without `generate`.

The tiny models are in float64: in float32 their random logits lie so close together that rounding decides some of them.
SmolLM2 is in float32, and the margins of its reference are checked.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from adapters import config, fill
from peft import get_peft_model

from srde.data.tokenizers import load_tokenizer
from srde.infer.generate import generate
from srde.infer.prompts import encode_prompt, padded
from srde.infer.route import routed
from srde.infer.stream import stream
from srde.tuner.loading import load_base
from tiny import VOCABULARY, tiny, tiny_tokenizer

NEW = 14
PROMPTS = [
    "what is 1",
    "how many are there 2 3 4 5 6 7 8 9 how many are there",
    "yes",
    "no no no no",
    "is the answer 9",
    "how many",
    "there are 3 3 3 3 3 3 3 and 2 are not",
    "0",
]
ALONE = 3  # of these are also asked one at a time
MODES = {"routed": (None, None), "off": ("off", None), "forced": (None, 2), "mixture": ("0=0.5,3=0.7", None)}
SLOW_MODES = ("routed", "off", "forced")
CACHES = {"cache": {}, "static": {"cache_implementation": "static"}, "no_cache": {"use_cache": False}}
TYPES = {
    "llama": {},
    "mistral": {"sliding_window": 8},  # shorter than the prompts
    "qwen2": {},
    "qwen3": {},
    "gpt2": {"n_positions": 256},
}


@dataclasses.dataclass
class Case:
    """A model, and what it says in each mode: the new tokens of each prompt, and the smallest margin of its logits."""

    model: torch.nn.Module
    tokenizer: object
    prompts: list
    ids: dict[str, list[list[int]]]
    margin: float


def says(model, ids, ends, new):
    """The greedy continuations of rows by whole forwards, and the smallest distance between the two best logits."""
    rows, margin = [], float("inf")
    for given in ids:
        row = list(given)
        while len(row) < len(given) + new and (len(row) == len(given) or row[-1] not in ends):
            best = model(torch.tensor([row]), use_cache=False).logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            row.append(int(best.indices[0]))
        rows.append(row[len(given) :])
    return rows, margin


def says_at_once(model, ids, ends, new):
    """The same: proposed by `generate`, and confirmed by a whole forward of each row, whose tokens must be the best each."""
    pad = model.generation_config.pad_token_id
    out = model.generate(
        **padded(ids, pad, model.device), max_new_tokens=new, do_sample=False, eos_token_id=list(ends)
    )
    rows, margin = [], float("inf")
    for given, row in zip(ids, out[:, -new:].tolist(), strict=True):
        rows.append(row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))])
        logits = model(torch.tensor([[*given, *rows[-1]]]), use_cache=False).logits
        best = logits[0, len(given) - 1 : -1].topk(2)
        assert best.indices[:, 0].tolist() == rows[-1]
        margin = min(margin, float((best.values[:, 0] - best.values[:, 1]).min()))
    return rows, margin


@torch.inference_mode()
def reference(model, tokenizer, prompts, new=NEW, says=says, modes=tuple(MODES)):
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    # one of the tokens that are said ends an answer, so that some rows of a batch end before the others
    first, _ = says(model, ids, {tokenizer.eos_token_id}, new)
    early = next(
        t for n in range(5, new) for row in first for t in row[n : n + 1]
        if t not in row[:n] and sum(t in other[1:] for other in first) <= len(first) // 2
    )  # fmt: skip
    ends = [tokenizer.eos_token_id, early]
    model.generation_config.eos_token_id = ends
    found, margins = {}, []
    for mode in modes:
        with routed(model, *MODES[mode]):
            found[mode], margin = says(model, ids, set(ends), new)
        margins.append(margin)
    return Case(model, tokenizer, prompts, found, min(margins))


@pytest.fixture(scope="module", params=TYPES)
def case(request):
    tokenizer = tiny_tokenizer()
    base = tiny(request.param, vocab_size=VOCABULARY, initializer_range=0.3, **TYPES[request.param])
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    model = fill(get_peft_model(base, config(num_experts=4, num_shared_experts=1))).double().eval()
    return reference(model, tokenizer, PROMPTS)


@pytest.fixture(scope="module")
def smollm2_case(smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    model = fill(
        get_peft_model(load_base(str(smollm2), "float32"), config(num_experts=4, target_sparsity=0.01))
    )
    for layer in model.srde.layers.values():
        layer.srde_experts["default"].values.data *= 0.1
    # a short system turn of our own: the template's default would double the work
    prompts = [
        [{"role": "system", "content": "Hi"}, {"role": "user", "content": text}]
        for text in ("What is 12 times 7?", "Name a planet that has rings.", "Why?", "List three colours of cats.",
                     "Write one line of Python.", "Say yes or no", "Who wrote Hamlet, and in which year was that?", "Hello")
    ]  # fmt: skip
    return reference(model.eval(), tokenizer, prompts, 12, says_at_once, SLOW_MODES)


def answers(case, prompts, *, streamed, new=NEW, **options):
    """What `generate` or `stream` answers, with the text that the pieces gave."""
    call = {"max_new_tokens": new, **options}
    if not streamed:
        return generate(case.model, case.tokenizer, prompts, **call).answers
    came = stream(case.model, case.tokenizer, prompts, **call)
    texts = ["" for _ in prompts]
    for piece in came:
        texts[piece.index] += piece.text
    return [dataclasses.replace(came.answers[i], text=text) for i, text in enumerate(texts)]


def check_matrix(case, mode, cache, streamed, new=NEW):
    want, (route, expert) = case.ids[mode], MODES[mode]
    with routed(case.model, route, expert):
        for batch_size, count in ((1, ALONE), (8, len(case.prompts))):
            got = answers(
                case, case.prompts[:count], streamed=streamed, new=new, batch_size=batch_size, **CACHES[cache]
            )
            assert [list(a.ids) for a in got] == want[:count]
            texts = [case.tokenizer.decode(row, skip_special_tokens=True).strip() for row in want[:count]]
            assert [a.text for a in got] == texts


def check_case(case, new=NEW):
    """The matrix proves something: the modes differ, lengths differ, and no near-tie decides."""
    for one, other in itertools.combinations(case.ids.values(), 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 4
    lengths = {len(row) for rows in case.ids.values() for row in rows}
    assert max(lengths) == new >= 12 and any(5 <= n < new for n in lengths)
    prompts = {len(encode_prompt(case.tokenizer, prompt)) for prompt in case.prompts}
    assert len(prompts) >= 5


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_greedy_tokens_in_every_way(case, mode, cache, streamed):
    check_matrix(case, mode, cache, streamed)


def test_the_matrix_can_tell_right_from_wrong(case):
    check_case(case)
    assert case.margin > 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", SLOW_MODES)
def test_the_same_greedy_tokens_of_smollm2(smollm2_case, mode, cache, streamed):
    check_matrix(smollm2_case, mode, cache, streamed, 12)


@pytest.mark.slow
def test_the_matrix_of_smollm2_can_tell_right_from_wrong(smollm2_case):
    check_case(smollm2_case, 12)
    assert smollm2_case.margin > 2e-3
