"""Streams: pieces with their experts, readers that leave early, errors from the thread."""

import threading
from contextlib import closing

import pytest
import torch
from adapters import adapted

from srde.errors import ConfigError, UsageError
from srde.infer.analysis import analyse
from srde.infer.generate import generate
from srde.infer.route import routed
from srde.infer.stream import Piece, stream
from srde.infer.texts import LiveText
from tiny import VOCABULARY, tiny, tiny_tokenizer

PROMPTS = ["what is 1", "how many are there 2 3 4 5 6 7 8 9", "yes"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_generate_with_the_same_load(named, batch_size):
    model, tokenizer = named
    want = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size).answers
    came = stream(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size)
    pieces = list(came)
    for index, answer in enumerate(want):
        got = came.answers[index]
        assert (got.ids, got.text, got.new_tokens, got.num_routed) == (
            answer.ids,
            answer.text,
            answer.new_tokens,
            4,
        )
        assert "".join(p.text for p in pieces if p.index == index) == answer.text
        torch.testing.assert_close(got.load_E, answer.load_E)


def test_each_piece_names_the_expert_that_the_analysis_finds(named):
    model, tokenizer = named
    came = stream(model, tokenizer, "yes", max_new_tokens=12)
    pieces = list(came)
    ids = came.answers[0].ids
    experts_T = analyse(model, tokenizer, "yes", ids).answer.experts_T
    live = LiveText(tokenizer)
    want = [piece for token, expert in zip(ids, experts_T, strict=True) for piece in live.push(token, expert)]
    assert [(p.text, p.expert) for p in pieces] == want + live.finish()
    assert len({p.expert for p in pieces}) > 1


def test_the_base_streams_without_experts_and_a_forced_expert_is_each_pieces(named):
    model, tokenizer = named
    with routed(model, "off"):
        off = stream(model, tokenizer, "yes", max_new_tokens=6)
        assert {p.expert for p in off} == {None} and off.answers[0].expert is None
    with routed(model, expert=3):
        assert {p.expert for p in stream(model, tokenizer, "yes", max_new_tokens=6)} == {3}
    plain = tiny(vocab_size=VOCABULARY).eval()
    assert {p.gate_E for p in stream(plain, tokenizer, "yes", max_new_tokens=6)} == {None}


def test_a_token_that_chose_no_expert_has_none():
    assert Piece(0, "a", torch.tensor([0.0, 0.0, 1.0]), num_routed=2).expert is None
    assert Piece(0, "a", torch.tensor([0.0, 0.2, 1.0]), num_routed=2).expert == 1


def test_a_reader_that_leaves_ends_the_thread_and_keeps_what_there_was(named):
    model, tokenizer = named
    threads = threading.active_count()
    came = stream(model, tokenizer, ["yes", "no"], max_new_tokens=500, eos_token_id=None)
    with closing(iter(came)) as pieces:
        text = next(pieces).text + next(pieces).text
    assert threading.active_count() == threads
    assert came.answers[0].text == text and came.answers[0].new_tokens < 400 and 1 not in came.answers
    with model.srde.record() as record:  # nothing goes on in the background
        pass
    assert record.calls == []


def test_what_goes_wrong_in_the_thread_is_raised_to_the_reader(named):
    model, tokenizer = named
    with pytest.raises(UsageError, match="this layer sees"):
        with model.srde.force_experts([0, 1, 2, 3, 0, 1, 2]):  # for a batch of seven
            list(stream(model, tokenizer, "yes", max_new_tokens=6))
    assert len(list(stream(model, tokenizer, "yes", max_new_tokens=6))) > 1


def test_what_cannot_be_streamed_is_refused_before_anything_runs(named):
    model, tokenizer = named
    with pytest.raises(ConfigError, match="num_beams=2: beam search knows its text only at the end"):
        stream(model, tokenizer, "yes", num_beams=2)
    with pytest.raises(ConfigError, match=r"prompt's tokens=.*exceed the model's 2048 positions"):
        stream(model, tokenizer, "yes", max_new_tokens=2048)


def test_a_conversation_is_one_prompt(named):
    model, tokenizer = named
    turns = [{"role": "user", "content": "yes"}]
    came = stream(model, tokenizer, turns, max_new_tokens=4)
    list(came)
    assert came.answers[0].ids == generate(model, tokenizer, ["yes"], max_new_tokens=4).answers[0].ids


def test_the_null_expert_is_no_expert():
    model = adapted(null_expert=True, top_k=1)
    for layer in model.srde.layers.values():
        layer.srde_router["default"].lock(range(4))
    part = analyse(model, tiny_tokenizer(), [6, 7, 8], [9, 10]).answer
    assert part.experts_T == [None, None] and float(part.load_E.sum()) == 0
