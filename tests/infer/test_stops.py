"""Where an answer ends: what the template puts after it, also where the checkpoint does not know."""

import pytest
from transformers import GenerationConfig

from srde.errors import ConfigError
from srde.infer.generate import generate
from srde.infer.stops import end_of_turn, find_stops
from srde.infer.stream import stream
from tiny import CHAT_TEMPLATE, tiny_tokenizer

PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + END }}{% endfor %}"


class Checkpoint:
    def __init__(self, *ends):
        self.generation_config = GenerationConfig(eos_token_id=list(ends) or None)


@pytest.mark.parametrize(
    ("end", "found"),
    [
        ("'<|im_end|>\\n'", (2, "")), ("'\\n'", (None, "")), ("''", (None, "")), ("'\\n[END]\\n'", (None, "[END]")),
        ("' <|endoftext|>'", (0, "")),
    ],
)  # fmt: skip
def test_the_end_of_turn_is_what_follows_the_content(end, found):
    assert end_of_turn(tiny_tokenizer(PLAIN.replace("END", end))) == found


def test_an_end_that_the_checkpoint_knows_is_no_news():
    stops = find_stops(Checkpoint(2, 5), tiny_tokenizer())
    assert stops.ids == (2, 5) and stops.note is None and stops.strings == ()


def test_an_end_that_it_does_not_know_is_added_and_said():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    stops = find_stops(Checkpoint(0), tokenizer)
    assert stops.ids == (0, 2)
    assert (
        "ends a turn with '<|im_end|>' (2), which the model's generation_config does not list" in stops.note
    )
    assert find_stops(Checkpoint(0), tokenizer, raw=True).ids == (0,)


def test_a_text_that_ends_turns_is_a_stop_string():
    stops = find_stops(Checkpoint(), tiny_tokenizer(PLAIN.replace("END", "'[END]'")), ["###"])
    assert stops.strings == ("###", "[END]") and "with the text '[END]'" in stops.note


def test_without_a_template_the_checkpoints_own_ends_hold():
    assert find_stops(Checkpoint(7), tiny_tokenizer(None)).ids == (7, 2)


def test_a_template_that_refuses_any_conversation_is_named():
    with pytest.raises(ConfigError, match="chat_template='no': it refuses a conversation of one question"):
        find_stops(Checkpoint(), tiny_tokenizer("{{ raise_exception('no') }}"))
    with pytest.raises(ConfigError, match="stop_strings=\\['']: none of them may be empty"):
        find_stops(Checkpoint(), tiny_tokenizer(), [""])


def test_an_answer_ends_where_the_template_says_though_the_checkpoint_does_not(named):
    """The token that the model says third is made the template's end of turn."""
    model, _ = named
    tokenizer = tiny_tokenizer()
    ids = generate(model, tokenizer, ["yes"], max_new_tokens=8).answers[0].ids
    third = ids.index(ids[2]) + 1
    end = tokenizer.convert_ids_to_tokens(ids[2])
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    assert len(generate(model, tokenizer, ["yes"], max_new_tokens=8).answers[0].ids) > third
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "message['content'] + '<|im_end|>'",
        f"message['content'] + ('{end}' if message['role'] == 'assistant' else '<|im_end|>')",
    )
    assert generate(model, tokenizer, ["yes"], max_new_tokens=8).answers[0].ids == ids[:third]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_stop_string_ends_each_answer_of_a_batch_and_is_not_part_of_it(named, streamed):
    model, tokenizer = named
    prompts = ["what is 1", "how many are there 2 3 4", "yes"]
    free = generate(model, tokenizer, prompts, max_new_tokens=12).answers
    stop = free[1].text[2:5]  # crosses the border of two tokens or lies in one
    options = {"max_new_tokens": 12, "batch_size": 3, "stop_strings": [stop]}
    if streamed:
        came = stream(model, tokenizer, prompts, **options)
        pieces = list(came)
        got = [came.answers[i] for i in range(3)]
        assert ["".join(p.text for p in pieces if p.index == i) for i in range(3)] == [a.text for a in got]
    else:
        got = generate(model, tokenizer, prompts, **options).answers
    for answer, whole in zip(got, free, strict=True):
        assert answer.ids == whole.ids[: answer.new_tokens] and stop not in answer.text
        assert answer.text == whole.text.split(stop)[0].strip()
    assert got[1].new_tokens < free[1].new_tokens
