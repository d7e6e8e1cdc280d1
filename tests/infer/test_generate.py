"""Answers: the same text as Transformers gives one by one, and the experts that produced them."""

import copy

import pytest
import torch
from peft import get_peft_model

from srde import SrdeConfig
from srde.errors import ConfigError
from srde.infer.generate import Answer, generate
from srde.infer.stream import stream
from tiny import VOCABULARY, tiny, tiny_tokenizer

PROMPTS = ["what is 1", "how many are there 2 3 4 5 6 7 8 9", "yes"]


@pytest.fixture(scope="module")
def adapted():
    tokenizer = tiny_tokenizer()
    base = tiny(vocab_size=VOCABULARY, eos_token_id=tokenizer.eos_token_id)
    model = get_peft_model(base, SrdeConfig(num_experts=4, target_sparsity=0.05, num_shared_experts=1)).eval()
    for layer in model.srde.layers.values():
        torch.nn.init.normal_(layer.srde_experts["default"].values, std=0.3)
    return model, tokenizer


def one_by_one(model, tokenizer, prompt):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_batch_gives_each_prompts_own_answer_in_order(adapted, batch_size):
    model, tokenizer = adapted
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert [a.text for a in answers] == [one_by_one(model, tokenizer, p) for p in PROMPTS]
    assert answers.tokens_per_second > 0 and all(1 <= a.new_tokens <= 12 for a in answers)


def test_the_load_is_the_mean_gate_where_the_answers_tokens_were_made(adapted):
    model, tokenizer = adapted
    batched = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=3).answers
    for prompt, answer in zip(PROMPTS, batched, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[:, :-1]  # the last token is never fed
        with model.srde.record() as record:
            model(out)
        start = ids["input_ids"].shape[1] - 1
        want = torch.stack(
            [r.gate_TE[start : start + answer.new_tokens] for r in record.calls[0].routes.values()]
        ).mean((0, 1))
        torch.testing.assert_close(answer.load_E, want, atol=1e-5, rtol=0)
        assert answer.load_E[4] == 1 and answer.expert == int(answer.load_E[:4].argmax())


def test_a_forced_expert_is_the_one_that_speaks(adapted):
    model, tokenizer = adapted
    with model.srde.force_experts(2):
        answers = generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    assert [a.expert for a in answers] == [2, 2, 2]
    texts = [a.text for a in generate(model, tokenizer, PROMPTS, max_new_tokens=12)]
    with model.disable_adapter():
        base = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert [a.load_E for a in base] == [None] * 3 and [a.text for a in base] != texts


def test_a_tokenizer_without_a_pad_token_answers_alike(named):
    model, tokenizer = named
    prompts = ["one two", "what is this and that", "7"]
    wanted = [answer.ids for answer in generate(model, tokenizer, prompts, max_new_tokens=4)]
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert [answer.ids for answer in generate(model, bare, prompts, max_new_tokens=4)] == wanted
    assert "".join(piece.text for piece in stream(model, bare, prompts, max_new_tokens=4))


def test_several_answers_per_prompt_are_refused(named):
    with pytest.raises(ConfigError, match="num_return_sequences=2: each prompt gets one answer"):
        generate(*named, ["a"], do_sample=True, temperature=1.0, num_return_sequences=2)


def test_no_expert_spoke_where_all_gates_are_zero():
    assert Answer("", 1, torch.zeros(4), 4).expert is None and Answer("", 1, None).expert is None
    assert Answer("", 1, torch.tensor([0, 0.2, 0.8]), 2).expert == 1
