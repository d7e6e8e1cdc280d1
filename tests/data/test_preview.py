"""`srde data preview`: every token is shown once and whole, and what is trained is marked."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from srde.cli import main
from srde.data.build.build import build
from srde.data.build.settings import BuildSettings
from srde.data.rows import read_rows
from srde.data.tokenize import encode_row
from srde.data.view.pieces import pieces
from srde.data.view.preview import CLOSE, OPEN, as_page, as_text, preview_rows, preview_set
from srde.data.view.shards import open_set, read_shard
from srde.errors import ArtifactError, ConfigError, DataError
from tiny import tiny_tokenizer

ROWS = [
    {"prompt": "how many", "response": "the answer is 7", "domain": "math", "source": "own", "id": "a1"},
    {"prompt": "Grüße 🎉 日本", "response": "ja 🎈\nnein", "domain": "logic"},
    {"text": "0 1 2 3", "domain": "code"},
]


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    return path


@pytest.fixture(scope="module")
def built(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("built")
    rows = [
        {"prompt": f"what is {i} 🎉", "response": f"{8 * i}", "domain": ("math", "logic")[i % 2], "answer": i}
        for i in range(40)
    ]
    source = write(work / "rows.jsonl", *rows)
    build(
        BuildSettings(
            str(tokenizer_folder),
            str(work / "out"),
            sources=[str(source)],
            max_length=128,
            num_proc=1,
            validation_fraction=0.2,
        )
    )
    return work / "out"


def plain(shown) -> str:
    return as_text(shown, color=False).plain


def test_pieces_are_whole_characters_and_leave_nothing_out(chat_tokenizer):
    text = "Grüße 🎉🎈 日本 \ufffd end é"
    ids = chat_tokenizer(text)["input_ids"]
    found = list(pieces(chat_tokenizer, ids, [False] * len(ids)))
    assert "".join(piece.text for piece in found) == text
    assert [piece.start for piece in found] == [0, *(piece.end for piece in found[:-1])] and found[
        -1
    ].end == len(ids)
    assert "🎉" in [piece.text for piece in found], "four tokens, one piece"
    assert len(found) > len(text) // 2, "token by token where that can be done"


def test_borders_and_special_tokens_cut_pieces(chat_tokenizer):
    ids = chat_tokenizer("🎉<|im_end|>🎉")["input_ids"]
    trained = [place >= 2 for place in range(len(ids))]
    found = list(pieces(chat_tokenizer, ids, trained))
    assert [(piece.trained, piece.special) for piece in found] == [
        (False, False),
        (True, False),
        (True, True),
        (True, False),
    ]
    assert [piece.text for piece in found[2:]] == ["<|im_end|>", "🎉"]
    assert "\ufffd" in found[0].text and "\ufffd" in found[1].text


def test_ids_outside_the_vocabulary_are_shown(chat_tokenizer):
    ids = [*chat_tokenizer("is")["input_ids"], 99_999, -3, *chat_tokenizer("no")["input_ids"]]
    found = list(pieces(chat_tokenizer, ids, [False] * len(ids)))
    assert "".join(piece.text for piece in found) == "is<id 99999><id -3>no"


def test_a_tokenizer_that_marks_words_by_their_spaces():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁yes", "▁it", "▁is"]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    found = list(pieces(spaced, [1, 2, 3], [False, False, True]))
    assert "".join(piece.text for piece in found[:2]) == "yes it" and found[2].text.strip() == "is"
    assert len(found) == 3


def test_a_row_of_a_data_file(tmp_path, chat_tokenizer):
    path = write(tmp_path / "rows.jsonl", *ROWS)
    (shown,) = preview_rows(path, chat_tokenizer)
    encoded = encode_row(chat_tokenizer, read_rows(path)[0])
    assert plain(shown) == (
        f"{path}:1 · math · own · a1 · {len(encoded.input_ids)} tokens, {encoded.trained_tokens} trained\n"
        f"<|im_start|>user\nhow many<|im_end|>\n<|im_start|>assistant\n{OPEN}the answer is 7<|im_end|>{CLOSE}\n"
    )
    trained = sum(piece.end - piece.start for piece in shown.parts[0].pieces if piece.trained)
    assert trained == encoded.trained_tokens


def test_many_bytes_and_plain_text(tmp_path, chat_tokenizer):
    path = write(tmp_path / "rows.jsonl", *ROWS)
    first, second, third = preview_rows(path, chat_tokenizer, count=9)
    assert "Grüße 🎉 日本" in plain(second) and f"{OPEN}ja 🎈\nnein<|im_end|>{CLOSE}" in plain(second)
    assert "logic · no source · no id" in plain(second)
    assert plain(third).endswith(f"0{OPEN} 1 2 3<|im_end|>{CLOSE}\n"), (
        "the first token of all is never predicted"
    )
    assert first.head.startswith(f"{path}:1 ")


def test_rows_are_chosen_by_line_and_domain(tmp_path, chat_tokenizer):
    path = write(tmp_path / "rows.jsonl", ROWS[0], "", "{", ROWS[1], ROWS[2], ROWS[0])

    def heads(**chosen):
        return [
            shown.head.removeprefix(f"{path}:").split(" ")[0]
            for shown in preview_rows(path, chat_tokenizer, **chosen)
        ]

    assert heads() == ["1"]
    assert heads(row=2, count=2) == ["3:", "4"], "a row that breaks a rule is shown as that"
    assert heads(row=5) == ["5"]
    assert heads(domain="math", count=5) == ["1", "6"]
    assert heads(row=2, domain="math") == ["6"]
    with pytest.raises(
        DataError, match=r"rows.jsonl:7: row: there is none to show from here on; its last row is on line 6"
    ):
        heads(row=7)
    with pytest.raises(ConfigError, match="the domains there are math, logic, code"):
        heads(domain="maths")
    with pytest.raises(DataError, match="does not exist"):
        list(preview_rows(tmp_path / "none.jsonl", chat_tokenizer))


def test_packed_rows(built, chat_tokenizer):
    packed = next(read_shard(next((built / "tokenized/train").glob("*.arrow"))))
    (shown,) = preview_set(built / "tokenized", chat_tokenizer, row=2)
    count, before = packed.examples_B[1], packed.examples_B[0]
    lengths = packed.examples["lengths"][before : before + count]
    assert len(shown.parts) == count
    assert shown.head.startswith(
        f"train/data-00000-of-00001.arrow:2 · {count} examples · {packed.tokens_B[1]} of 128 tokens, "
    )
    place = 0
    for number, (part, length) in enumerate(zip(shown.parts, lengths, strict=True), start=1):
        pattern = (
            rf"example {number} of {count} · (math|logic) · rows · tokens {place} to {place + length - 1} · "
            rf"positions 0 to {length - 1} · {length} tokens, \d+ trained"
        )
        assert re.fullmatch(pattern, part.head), part.head
        text = "".join(piece.text for piece in part.pieces)
        assert text.startswith("<|im_start|>user\nwhat is ") and "🎉" in text and text.endswith("<|im_end|>")
        place += length


def test_packed_rows_say_what_the_readable_rows_say(built, chat_tokenizer):
    def trained(shown):
        return sorted(re.findall(f"{OPEN}(.*?){CLOSE}", "".join(map(plain, shown)), re.DOTALL))

    rows = len(open_set(built / "tokenized").shards("train")) * 2048
    train = [
        one
        for one in preview_set(built / "tokenized", chat_tokenizer, count=rows)
        if one.head.startswith("train")
    ]
    assert trained(train) == trained(preview_rows(built / "data.jsonl", chat_tokenizer, count=rows))


def test_packed_rows_of_a_domain(built, chat_tokenizer):
    shown = list(preview_set(built / "tokenized", chat_tokenizer, domain="logic", count=3))
    assert len(shown) == 3 and all(" · logic · " in part.head for one in shown for part in one.parts)
    with pytest.raises(ConfigError, match="the domains there are math"):
        list(preview_set(built / "tokenized", chat_tokenizer, domain="art"))
    with pytest.raises(DataError, match="packed rows"):
        list(preview_set(built / "tokenized", chat_tokenizer, row=10_000))


def test_held_out_rows_come_last(built, chat_tokenizer):
    splits = open_set(built / "tokenized").metadata["splits"]
    (shown,) = preview_set(built / "tokenized", chat_tokenizer, row=splits["train"]["rows"] + 1)
    assert shown.head.startswith("validation/data-00000-of-00001.arrow:1 ")


def test_another_tokenizer_is_refused_for_a_set(built):
    other = tiny_tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(ArtifactError, match="the set was made with the vocabulary of"):
        list(preview_set(built / "tokenized", other))


def test_colours_mark_exactly_what_brackets_mark(tmp_path, chat_tokenizer):
    (shown,) = preview_rows(write(tmp_path / "rows.jsonl", *ROWS), chat_tokenizer)
    text = as_text(shown, color=True)
    assert OPEN not in text.plain
    ground = "".join(text.plain[span.start : span.end] for span in text.spans if " on " in str(span.style))
    assert ground == "the answer is 7<|im_end|>"


@pytest.mark.security
def test_texts_steer_neither_terminal_nor_page(tmp_path, chat_tokenizer):
    hostile = {
        "prompt": "<b>\x1b[2J\u202e[red]x[/red]",
        "response": "</pre><script>1</script>\x07",
        "domain": "<i>",
    }
    shown = list(preview_rows(write(tmp_path / "<u>.jsonl", hostile), chat_tokenizer))
    text, html = plain(shown[0]), as_page(shown, "<title>")
    for out in (text, html):
        assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out and "\\x1b[2J" in out
    assert "[red]x[/red]" in text
    for tag in ("<b>", "<script", "<u>", "<title></", "domain <i>"):
        assert tag not in html
    assert html.count("<pre>") == html.count("</pre>") == 1


def test_the_page_marks_what_is_trained(tmp_path, chat_tokenizer):
    html = as_page(list(preview_rows(write(tmp_path / "rows.jsonl", *ROWS), chat_tokenizer)), "Rows")
    assert "<mark>the answer is 7<i>&lt;|im_end|&gt;</i></mark></pre>" in html
    assert "<title>Rows</title>" in html and "http" not in html


def test_the_verb(capsys, tmp_path, tokenizer_folder, built):
    path = write(tmp_path / "rows.jsonl", *ROWS)
    page = tmp_path / "page.html"
    assert (
        main(
            [
                "data",
                "preview",
                str(path),
                "--row",
                "2",
                "--count",
                "2",
                "--model_name",
                str(tokenizer_folder),
                "--html",
                str(page),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("tokens, ") == 2 and f"{OPEN}ja 🎈" in out and "<mark>ja" in page.read_text()
    assert main(["data", "preview", str(built), "--model_name", str(tokenizer_folder)]) == 0
    assert "example 1 of" in capsys.readouterr().out


def test_a_set_names_its_model_where_it_can_be_loaded(capsys, built, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(tokenizer_folder.parent)
    assert main(["data", "preview", str(built)]) == 0
    monkeypatch.chdir(built)
    assert main(["data", "preview", str(built)]) == 1
    assert "name the model with --model_name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "rows are shown as a model's tokenizer splits them"),
        (["--row", "0"], "row=0: it is counted from 1"),
        (["--count", "0"], "count=0: it is counted from 1"),
        (["--rows", "2"], "the nearest is --row"),
    ],
)
def test_wrong_flags(capsys, tmp_path, flags, message):
    assert main(["data", "preview", str(write(tmp_path / "rows.jsonl", *ROWS)), *flags]) == 1
    assert message in capsys.readouterr().err


def test_nothing_in_the_data_is_markup(capsys, tmp_path, tokenizer_folder):
    marked = {"prompt": "[bold]a[/bold] [/b] :smile:", "response": "[red]b", "domain": "[/i] :smile:"}
    path = write(tmp_path / "rows.jsonl", marked)
    assert main(["data", "preview", str(path), "--model_name", str(tokenizer_folder)]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in marked.values())


@pytest.mark.parametrize("verb", ["stats", "check", "preview"])
def test_help_says_what_the_verb_does(capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        main(["data", verb, "--help"])
    assert "\n\nPrints " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_colours_unless_asked_not_to(tmp_path, tokenizer_folder, no_color):
    path = write(tmp_path / "rows.jsonl", *ROWS)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": no_color}
    command = [
        sys.executable,
        "-m",
        "srde",
        "data",
        "preview",
        str(path),
        "--model_name",
        str(tokenizer_folder),
    ]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        out = b""
        try:
            while part := os.read(ours, 4096):
                out += part
        except OSError:  # the other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    assert (OPEN.encode() in out) == bool(no_color)
    assert (b"\x1b[" in out) == (not no_color)
