"""General text: the built-in one, and files of one's own."""

from __future__ import annotations

import re

import pytest

from srde.data.tokenize import encode_row
from srde.errors import ConfigError, DataError
from srde.eval.general import BUILT_IN, load_general
from tiny import tiny_tokenizer


def test_the_built_in_text_is_sixty_paragraphs_of_prose():
    rows = load_general(None)
    assert len(rows) == 60 and len({row.response for row in rows}) == 60
    assert all(60 <= len(row.response.split()) <= 110 for row in rows)
    assert not any(row.prompt or row.domain or row.kind for row in rows)
    odd = re.compile(r"[{}<>=#\\_`*\[\]]|\d\s*[-+*/]\s*\d|\bdef \w|Answer:|Question:")  # code, sums, items
    assert [row.line for row in rows if odd.search(row.response)] == []
    assert BUILT_IN.read_bytes().decode("utf-8").endswith("}\n")


def test_whole_paragraphs_count_with_their_end():
    tokenizer = tiny_tokenizer()
    encoded = encode_row(tokenizer, load_general(None)[0])
    assert encoded.prompt_length == 0 and encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.trained_tokens == len(encoded.input_ids) - 1


def test_plain_text_is_split_at_blank_lines(tmp_path):
    file = tmp_path / "prose.txt"
    file.write_bytes("\n\nOne,\r\nstill one.\r\n\r\n \t\n  Two – ö.\n\n\n\nThree".encode())
    rows = load_general(str(file))
    assert [row.response for row in rows] == ["One,\nstill one.", "Two – ö.", "Three"]
    assert [row.line for row in rows] == [3, 7, 11] and not any(row.prompt for row in rows)


def test_rows_of_text_and_none(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "a b"}\n{"text": "c"}\n')
    assert [row.response for row in load_general(str(file))] == ["a b", "c"]
    assert load_general("none") == []


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("g.jsonl", b'{"prompt": "p", "response": "r"}\n', DataError, r"g\.jsonl:1: text: is missing"),
        ("g.txt", b" \n\n", DataError, r"g\.txt: file: is empty"),
        ("g.txt", b"a\xff", DataError, r"g\.txt: file: is not UTF-8: byte 1"),
        ("g.txt", None, DataError, r"g\.txt: file: does not exist"),
        ("g.md", b"text", ConfigError, r"general_file='.*g\.md': its name must end in \.jsonl .* or \.txt"),
    ],
    ids=["a question", "blank", "bytes", "missing", "other kind"],
)
def test_what_is_refused(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_general(str(tmp_path / name))
