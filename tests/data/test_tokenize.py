from __future__ import annotations

import itertools
from random import Random

import pytest

from srde.data import tokenize
from srde.data.rows import Row
from srde.data.tokenize import (
    IGNORE,
    Encoded,
    encode_row,
    encode_rows,
    prompt_ids,
    tokenize_row,
    tokenize_rows,
)
from srde.errors import DataError
from tiny import CHAT_TEMPLATE


def row(prompt: str | None, response: str, line: int = 1) -> Row:
    turns = [] if prompt is None else [{"role": "user", "content": prompt}]
    return Row(prompt=turns, response=response, file="f.jsonl", line=line)


def trained_text(tokenizer, example) -> str:
    assert len(example.input_ids) == len(example.labels)
    assert all(
        label in (IGNORE, token) for token, label in zip(example.input_ids, example.labels, strict=True)
    )
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


def test_chat_trains_the_response_and_the_end_of_turn(chat_tokenizer):
    example = tokenize_row(chat_tokenizer, row("how many?", "the answer is 42"))
    assert trained_text(chat_tokenizer, example) == "the answer is 42<|im_end|>"
    assert chat_tokenizer.decode(example.input_ids) == (
        "<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\nthe answer is 42<|im_end|>"
    )


def test_the_prompt_is_what_generation_starts_from(chat_tokenizer):
    a = row("how many?", "42")
    ids = prompt_ids(chat_tokenizer, a.prompt)
    example = tokenize_row(chat_tokenizer, a)
    assert example.input_ids[: len(ids)] == ids
    assert example.labels[: len(ids)] == [IGNORE] * len(ids)
    assert IGNORE not in example.labels[len(ids) :]


def test_earlier_assistant_turns_are_not_trained(chat_tokenizer):
    said = [("user", "a"), ("assistant", "b"), ("user", "c")]
    turns = [{"role": role, "content": text} for role, text in said]
    example = tokenize_row(chat_tokenizer, Row(prompt=turns, response="d", file="f", line=1))
    assert trained_text(chat_tokenizer, example) == "d<|im_end|>"


@pytest.mark.parametrize("fixture", ["chat_tokenizer", "plain_tokenizer"])
def test_a_token_across_the_border_does_not_change_the_prompt(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    a = row("what", "\nyes")
    # The premise: "\n" of the prompt and "\n" of the response make one token when tokenised together.
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    ids = prompt_ids(tokenizer, a.prompt)
    example = tokenize_row(tokenizer, a)
    assert example.input_ids[: len(ids)] == ids
    assert trained_text(tokenizer, example) == "\nyes<|im_end|>"


def test_a_template_without_an_ending_gets_the_end_of_sequence(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    example = tokenize_row(tokenizer, row("what", "yes"))
    assert trained_text(tokenizer, example) == "yes<|im_end|>"


def test_without_a_template_prompt_line_break_response_end(plain_tokenizer):
    example = tokenize_row(plain_tokenizer, row("how many?", "42"))
    assert plain_tokenizer.decode(example.input_ids) == "how many?\n42<|im_end|>"
    assert trained_text(plain_tokenizer, example) == "42<|im_end|>"
    assert plain_tokenizer.decode(prompt_ids(plain_tokenizer, row("how many?", "").prompt)) == "how many?\n"


@pytest.mark.parametrize("fixture", ["chat_tokenizer", "plain_tokenizer"])
def test_plain_text_is_trained_whole(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    example = tokenize_row(tokenizer, row(None, "the answer is yes"))
    assert trained_text(tokenizer, example) == "the answer is yes<|im_end|>"
    assert example.labels == example.input_ids


def test_a_refusal_of_the_template_names_the_row(make_tokenizer):
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        DataError, match=r"f\.jsonl:7: messages: the model's chat template refuses them: roles must"
    ):
        tokenize_row(tokenizer, row("a", "b", line=7))


def test_a_template_whose_prompt_is_no_prefix_is_refused(make_tokenizer, chat_tokenizer):
    tokenizer = make_tokenizer(chat_tokenizer.chat_template.replace("assistant\n'", "assistant\n<think>'"))
    with pytest.raises(DataError, match=r"f\.jsonl:3: messages: .* no prefix of the conversation"):
        tokenize_row(tokenizer, row("a", "b", line=3))


def test_a_row_with_every_label_masked_is_refused(make_tokenizer):
    drops_answers = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|im_start|>{% endfor %}"
    rule = r"f\.jsonl:5: response: leaves no token to train: every label is masked"
    with pytest.raises(DataError, match=rule):
        tokenize_row(make_tokenizer(drops_answers), row("a", "b", line=5))


@pytest.mark.faults
def test_a_response_that_nothing_would_end_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=None)
    tokenizer.eos_token = None
    with pytest.raises(
        DataError, match=r"f\.jsonl:5: response: nothing would end it: .* Set the tokenizer's eos_token"
    ):
        tokenize_row(tokenizer, row("a", "b", line=5))


def test_long_rows_are_dropped_and_counted_never_cut(chat_tokenizer):
    rows = [row("a", "b"), row("a", "long " * 50), row("a", "c")]
    short = len(tokenize_row(chat_tokenizer, rows[0]).input_ids)
    result = tokenize_rows(chat_tokenizer, rows, max_length=short)
    assert result.dropped == 1
    assert [trained_text(chat_tokenizer, one) for one in result.examples] == ["b<|im_end|>", "c<|im_end|>"]
    assert result.trained_tokens == 4


def test_nothing_left_names_the_shortest_row_and_the_fix(chat_tokenizer):
    rows = [row("a", "long " * 50, line=1), row("a", "b", line=2)]
    length = len(tokenize_row(chat_tokenizer, rows[1]).input_ids)
    with pytest.raises(
        DataError, match=rf"f\.jsonl:2: row: .*max_length=4; .* Set --max_length to {length} or more"
    ):
        tokenize_rows(chat_tokenizer, rows, max_length=4)
    assert len(tokenize_rows(chat_tokenizer, rows, max_length=length).examples) == 1  # the advice holds


def test_no_rows_are_refused(chat_tokenizer):
    with pytest.raises(DataError, match="no row to train on"):
        tokenize_rows(chat_tokenizer, [], max_length=8)


# --- many rows at once -----------------------------------------------------------------------------------------------------

STRIPS = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
THINKS = (  # as reasoning models do: an empty thought where the answer has none of its own, and none in earlier turns
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '<think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' and not loop.last else m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if 'no' in messages[-1]['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TEMPLATES = {
    "smollm": CHAT_TEMPLATE,
    "default system": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nyou are<|im_end|>\n' }}{% endif %}"
    + CHAT_TEMPLATE,
    "strips": STRIPS,
    "thinks": THINKS,
    "no special token at the prompt": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ '<|im_end|>' if m['role'] == 'assistant' else '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "no special token": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    "nothing after the marker": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}"
    "{% else %}{{ m['content'] + '<|im_start|>' }}{% endif %}{% endfor %}",
    "a blank after the marker": "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}",
    "no end of turn": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "drops answers": "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|im_start|>{% endfor %}",
    "refuses systems": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + CHAT_TEMPLATE,
    "no prefix": CHAT_TEMPLATE.replace("assistant\n'", "assistant\n<think>'"),
    "no prefix, with the same end": "{{ messages | length }}" + CHAT_TEMPLATE,
    "none": None,
}
SAID = [
    "the answer is 42", " yes", "\nyes", "\n\n", "yes  \n", "é\u2028日本 🙂", "<|im_end|>",
    "yes<|im_end|>no", "<|im_start|>assistant\nyes",    "<|im_start|>", "yes <|endoftext|>", "<|endoftext|>", "assistant\n",
    "<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n",
    "<think>how many</think>\n\nyes", "</think>", "0", "<|im_", "start|>",
]  # fmt: skip


def conversations(seed: int) -> list[Row]:
    """Every text as a question to every other as the answer, some of them after a system turn or after other turns."""
    rng = Random(seed)
    rows = []
    for line, (asked, said) in enumerate(itertools.product(SAID, repeat=2), start=1):
        turns = [{"role": "user", "content": asked}]
        if rng.random() < 0.3:
            more = [{"role": role, "content": rng.choice(SAID)} for role in ("user", "assistant")]
            turns = more * rng.randint(1, 2) + turns
        if rng.random() < 0.2:
            turns.insert(0, {"role": "system", "content": rng.choice(SAID)})
        rows.append(Row(turns if rng.random() < 0.95 else [], said, "f.jsonl", line))
    rng.shuffle(rows)
    return rows


def one_by_one(tokenizer, rows: list[Row]) -> list[Encoded | str]:
    found = []
    for one in rows:
        try:
            found.append(encode_row(tokenizer, one))
        except DataError as error:
            found.append(str(error))
    return found


def at_once(tokenizer, rows: list[Row]) -> list[Encoded | str]:
    return [str(one) if isinstance(one, DataError) else one for one in encode_rows(tokenizer, rows)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_at_once_are_those_one_by_one(make_tokenizer, name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    for seed in range(2):
        rows = conversations(seed)
        for part in (
            rows,
            rows[:1],
            rows[7:20],
            [one for one in rows if one.prompt and one.prompt[0]["role"] != "system"],
        ):
            assert at_once(tokenizer, part) == one_by_one(tokenizer, part)
    assert encode_rows(tokenizer, []) == []


@pytest.mark.parametrize("name", ["smollm", "default system", "strips", "nothing after the marker"])
def test_plain_conversations_take_the_fast_way(make_tokenizer, monkeypatch, name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    rows = [row(f"how many {n}?", f"the answer is {n}") for n in range(20)]
    expected = one_by_one(tokenizer, rows)
    monkeypatch.setattr(tokenize, "encode_row", None)
    assert encode_rows(tokenizer, rows) == expected


def test_a_tokenizer_that_cuts_and_pads_does_neither_here(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [row("how many?", "the answer is " + "very " * 50), row("a", "b")]
    expected = one_by_one(tokenizer, rows)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)  # leaves its settings behind
    assert at_once(tokenizer, rows) == expected
    assert len(expected[0].input_ids) > len(expected[1].input_ids)


def test_an_error_stands_in_the_place_of_its_row(make_tokenizer):
    tokenizer = make_tokenizer(TEMPLATES["refuses systems"])
    system = Row([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "a", "f.jsonl", 2)
    good, bad, last = encode_rows(tokenizer, [row("a", "b"), system, row("c", "d", line=3)])
    assert isinstance(bad, DataError) and str(bad).startswith(
        "f.jsonl:2: messages: the model's chat template refuses them: no system"
    )
    assert [good, last] == one_by_one(tokenizer, [row("a", "b"), row("c", "d")])
