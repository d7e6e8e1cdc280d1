"""Letters by log-likelihood against one whole forward per option."""

from __future__ import annotations

import pytest
import torch

from eval_models import adapted
from srde.data.rows import Row
from srde.data.tokenize import encode_row, encode_rows, prompt_ids
from srde.eval.choices import choices, extra_passages, letters_of, loglik, pick, right_letter, row_passage
from srde.eval.losses import Passage, read
from tiny import tiny_tokenizer


def row(prompt, answer, response="The answer is B", **more):
    turns = [{"role": "user", "content": prompt}]
    return Row(turns, response, "f", 1, kind="choice", answer=answer, **more)


LISTED = "Which one?\n\nOptions:\nA) yes\nB) no\nC) 3\n\nAnswer with the letter."
ROWS = [
    row(LISTED, "B", "The answer is B) no"),
    row("what is 1\nOptions:\n(A) 1\n(B) 2", "A", "The answer is A"),
    row(LISTED * 3, "C", "no, it is 3"),  # does not begin as the candidates do
    row("how many are there", "D", metadata={"n_options": 5}),
    row("how many", "2"),  # no letters
]


def slowly(model, tokenizer, one):
    """A whole forward for each option, alone and without padding."""
    found = []
    for letter in letters_of(one):
        before = prompt_ids(tokenizer, one.prompt)
        said = tokenizer(f"The answer is {letter}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([before + said])).logits[0].log_softmax(-1)
        found.append(sum(float(logits[len(before) + t - 1, token]) for t, token in enumerate(said)))
    return found


def quickly(model, tokenizer, rows, batch_size):
    own = encode_rows(tokenizer, rows)
    plans = choices(tokenizer, rows, own)
    options = {"pad_token_id": tokenizer.pad_token_id, "batch_size": batch_size}
    readings = read(model, [row_passage(one, plan) for one, plan in zip(own, plans, strict=True)], **options)
    found = []
    for plan, reading in zip(plans, readings, strict=True):
        others = read(model, extra_passages(plan), **options) if plan else []
        found.append(list(loglik(plan, reading, others)) if plan else None)
    return found, plans


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize(("batch_size", "side"), [(1, "left"), (3, "right"), (16, "left")])
def test_it_equals_a_whole_forward_for_each_option(model_type, batch_size, side):
    model, tokenizer = adapted(model_type)
    tokenizer.padding_side = side
    found, plans = quickly(model, tokenizer, ROWS, batch_size)
    assert [plan and plan.in_row for plan in plans] == [True, True, False, True, None]
    for one, values in zip(ROWS[:4], found, strict=False):
        assert values == pytest.approx(slowly(model, tokenizer, one), abs=2e-4)
    assert found[4] is None


def test_the_base_is_scored_in_the_same_way():
    model, tokenizer = adapted()
    with model.disable_adapter():
        found, _ = quickly(model, tokenizer, ROWS, 2)
        assert found[0] == pytest.approx(slowly(model, tokenizer, ROWS[0]), abs=2e-4)
    assert found[0] != pytest.approx(slowly(model, tokenizer, ROWS[0]), abs=1e-3)


def test_options_of_several_tokens_are_summed():
    model, tokenizer = adapted()
    backend = tokenizer.backend_tokenizer
    from tokenizers import normalizers

    backend.normalizer = normalizers.Replace("is B", "is BB")  # a letter that takes two tokens
    found, plans = quickly(model, tokenizer, ROWS[:2], 4)
    assert not plans[0].in_row and len(plans[0].passages) == 3
    assert len({len(passage.ids) for passage in plans[0].passages}) == 2
    for one, values in zip(ROWS[:2], found, strict=True):
        assert values == pytest.approx(slowly(model, tokenizer, one), abs=2e-4)


def test_the_row_that_begins_as_its_candidates_needs_no_other_forward():
    model, tokenizer = adapted()
    forwards = []
    model.get_base_model().register_forward_hook(lambda *_: forwards.append(1))
    quickly(model, tokenizer, [ROWS[0], ROWS[1]], 4)
    assert len(forwards) == 1


def test_a_template_without_chat_is_scored_too():
    model, _ = adapted()
    tokenizer = tiny_tokenizer(chat_template=None)
    found, _ = quickly(model, tokenizer, ROWS[:1], 1)
    assert found[0] == pytest.approx(slowly(model, tokenizer, ROWS[0]), abs=2e-4)


@pytest.mark.parametrize(
    ("one", "letters"),
    [
        (ROWS[0], "ABC"),
        (ROWS[1], "AB"),
        (ROWS[3], "ABCDE"),
        (row("First:\nA) 1\nB) 2\nC) 3\nAnswer: A\n\nNow:\nA) 4\nB) 5", "B"), "AB"),
        (row("A. one\nB. two\nD. four", "A"), "AB"),
        (row("  (A) one\n  that goes on\n  (B) two", "(b)"), "AB"),
        (row("A) one\nB) two", "C"), ""),
        (row("A) only one", "A"), ""),
        (row("A man walks in. (B) is not a line", "B"), ""),
        (row(LISTED, "B", metadata={"n_options": 2}), "AB"),
        (row(LISTED, "B", metadata={"n_options": "3"}), "ABC"),
        (Row([], "A) one\nB) two", "f", 1, kind="choice", answer="A"), ""),
        (Row(ROWS[0].prompt, "B", "f", 1, kind="exact", answer="B"), ""),
    ],
    ids=[
        "listed", "in brackets", "counted", "worked example", "gap", "more lines", "answer beyond", "only one", "no lines",
        "count wins", "count is text", "plain text", "other kind",
    ],
)  # fmt: skip
def test_where_letters_are_found(one, letters):
    assert letters_of(one) == letters


def test_ties_share_the_point():
    plan = choices(tiny_tokenizer(), ROWS[:1], [encode_row(tiny_tokenizer(), ROWS[0])])[0]
    assert right_letter(ROWS[0]) == "B"
    assert pick(plan, (-3.0, -1.0, -2.0), "B") == ("The answer is B", 1.0)
    assert pick(plan, (-1.0, -1.0, -2.0), "B") == ("The answer is A or B", 0.5)
    assert pick(plan, (-1.0, -2.0, -1.0), "B") == ("The answer is A or C", 0.0)
    assert pick(plan, (-1.0, -1.0, -1.0), "B")[1] == pytest.approx(1 / 3)


def test_a_passage_ends_where_the_letter_would_stand():
    model, _ = adapted()
    reading = read(model, [Passage([5, 6, 7], 2, 3, (8, 9))], pad_token_id=0)[0]
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0].log_softmax(-1)
    first = float(logits[1, 7])
    assert reading.loss == pytest.approx(-first, abs=1e-5) and reading.tokens == 1
    assert reading.loglik == pytest.approx([first + float(logits[2, t]) for t in (8, 9)], abs=1e-5)
