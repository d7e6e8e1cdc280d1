"""Text while it comes: no half characters, no white space at the ends, nothing of a stop string."""

import pytest

from srde.infer.texts import LiveText, answer_text, token_texts
from tiny import tiny_tokenizer

TEXTS = ["naïve 😀 日本語", "  spaces around \n", "a\n\n  b ", "", "\n\n", "1 2 3 the answer", "é"]


def live(tokenizer, ids, strings=()):
    text = LiveText(tokenizer, strings)
    pieces = [text.push(token, n) for n, token in enumerate(ids)]
    return [*pieces, text.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("strings", [(), ("the",), ("\n",), ("answer!", "  b", "語")], ids=str)
def test_the_pieces_are_the_text(text, strings):
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer(text)["input_ids"], 2]
    pieces = live(tokenizer, ids, strings)
    assert "".join(t for step in pieces for t, _ in step) == answer_text(tokenizer, ids, strings)
    assert not any("\ufffd" in t for step in pieces for t, _ in step)


def test_a_character_of_several_tokens_comes_with_its_last():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a😀b")["input_ids"]
    steps = live(tokenizer, ids)
    assert len(ids) == 6 and [len(step) for step in steps] == [1, 0, 0, 0, 1, 1, 0]
    assert steps[4] == [("😀", 4)]


def test_each_piece_keeps_the_mark_of_its_token():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the answer is")["input_ids"]
    pieces = [piece for step in live(tokenizer, ids) for piece in step]
    texts = [tokenizer.decode([token]) for token in ids]
    assert "".join(texts) == "the answer is" and [mark for text, mark in pieces if text.strip()] == [
        n for n, text in enumerate(texts) if text.strip()
    ]


def test_what_may_become_a_stop_string_is_held_back_until_it_is_not():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("x#y##")["input_ids"]
    steps = ["".join(t for t, _ in step) for step in live(tokenizer, ids, ("##",))]
    assert steps == ["x", "", "#y", "", "", ""]
    assert "".join("".join(t for t, _ in step) for step in live(tokenizer, ids[:-1], ("##",))) == "x#y#"


def test_broken_bytes_at_the_end_are_shown_as_such():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a😀")["input_ids"][:-1]
    for mark in (None, 0):
        text = LiveText(tokenizer)
        pieces = [p for token in ids for p in text.push(token, mark)] + text.finish()
        assert "".join(t for t, _ in pieces) == answer_text(tokenizer, ids) == "a\ufffd"


def test_token_texts_are_the_whole_text_with_special_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("<|im_start|>user\n日<|im_end|>")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "<|im_start|>user\n日<|im_end|>" and len(texts) == len(ids)
    assert texts[0] == "<|im_start|>" and token_texts(tokenizer, []) == []
