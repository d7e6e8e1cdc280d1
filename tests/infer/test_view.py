"""Tokens in a terminal: colours where there are any, marks where not, and nothing that steers the terminal."""

import io

import pytest
import torch
from rich.console import Console

from srde.infer.stream import Piece
from srde.infer.view import Painter, summary

LABELS = ["0 math", "1 code", "2 logic"]


def piece(text, expert):
    gate_E = torch.zeros(3)
    if expert is not None:
        gate_E[expert] = 1
    return Piece(0, text, gate_E, 3)


def painted(pieces, *, routing=True, **console):
    file = io.StringIO()
    painter = Painter(Console(file=file, width=60, **console), routing=routing)
    for one in pieces:
        painter.write(one)
    painter.end()
    painter.legend(LABELS, [one.expert for one in pieces])
    return file.getvalue()


PIECES = [
    piece("The", 0),
    piece(" answer", 0),
    piece(" is", 2),
    piece("\n", 1),
    piece("42", 2),
    piece(" ok", None),
]


@pytest.mark.parametrize(
    "console", [{"force_terminal": False}, {"force_terminal": True, "no_color": True}], ids=str
)
def test_without_colours_each_change_of_expert_is_marked(console):
    text = painted(PIECES, **console)
    assert text.startswith("[0]The answer [2]is\n42 [-]ok\n")
    assert "experts:  [0] math  [1] code  [2] logic  [-] none" in text and "■" not in text


def test_with_colours_the_text_is_as_it_is():
    text = painted(PIECES, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;59;143;217mThe\x1b[0m\x1b[38;2;59;143;217m answer\x1b[0m" in text
    assert "■ 2 logic" in text and "[2]" not in text


def test_without_routing_the_text_is_plain():
    assert painted(PIECES, routing=False, force_terminal=False).startswith("The answer is\n42 ok\n")


def test_a_models_text_cannot_steer_the_terminal_and_a_pipe_gets_every_byte():
    evil = [Piece(0, "a\x1b[2Jb\rc\u200dé\tx", None)]
    assert painted(evil, force_terminal=True, color_system=None).startswith("a\\x1b[2Jb\\rc\u200dé")
    assert painted(evil, force_terminal=False).startswith("a\x1b[2Jb\rc\u200dé\tx\n")


def test_long_lines_are_left_to_the_terminal():
    long = "word " * 40
    assert painted([Piece(0, long.strip(), None)], force_terminal=True, color_system=None).startswith(
        long.strip()
    )


def test_a_summary_names_the_three_with_the_largest_shares():
    assert summary(torch.tensor([0.1, 0.6, 0.3, 1.0]), 3, LABELS) == (
        "expert 1 code: 60 %, expert 2 logic: 30 %, expert 0 math: 10 %"
    )
