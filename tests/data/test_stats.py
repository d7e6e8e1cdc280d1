"""`srde data stats`: the figures are right, the page stands alone and nothing in the data can break out of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from srde.artifacts import write_manifest
from srde.cli import main
from srde.data.build.build import build
from srde.data.build.settings import BuildSettings
from srde.data.rows import read_rows
from srde.data.tokenize import encode_row
from srde.data.view.page import page
from srde.data.view.reading import evaluation_index
from srde.data.view.stats import NONE, row_stats, set_stats
from srde.data.view.tables import as_group, percent, sheets
from srde.errors import ArtifactError, DataError
from tiny import tiny_tokenizer

LONG = "in the year of the great flood many people of the town left their houses and went up to the hills with all they had"
NEAR = LONG.replace("many", "some")
HOSTILE = "$\\frac{$ <script>alert('1')</script> & \" ]]> --> [red]\x1b[31m\u202e"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(prompt: str, response: str = "yes it is", **fields: object) -> dict:
    return {"prompt": prompt, "response": response, "domain": "math", "source": "own"} | fields


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("built")
    tiny_tokenizer().save_pretrained(work / "model")
    rows = [
        row(f"what is {i} and {7 * i}", f"{8 * i}", domain=("math", "logic")[i % 2], answer=i)
        for i in range(60)
    ]
    rows += [
        rows[0],
        row(f"{LONG} and so what", answer=1),
        row(f"{NEAR} and so what", answer=1),
        row("long " * 90),
    ]
    question = "how many of them are there in the system that the answer is to the question of now"
    rows.append(row(question))
    settings = BuildSettings(
        str(work / "model"),
        str(work / "out"),
        sources=[str(write(work / "rows.jsonl", rows))],
        eval_sources=[str(write(work / "test.jsonl", [row(question)]))],
        max_length=256,
        num_proc=1,
        validation_fraction=0.1,
    )
    build(settings)
    return work / "out"


def test_counts_and_lengths_of_data_files(tmp_path, chat_tokenizer):
    path = write(
        tmp_path / "rows.jsonl",
        [
            row("a b", "c"),
            row("d", "e f g h", source="other"),
            row("i", "j", domain="zoology"),
            row("k", "l", domain=None),
        ],
    )
    found = row_stats(path)
    assert found["unit"] == "words"
    assert list(found["domains"]) == ["math", NONE, "zoology"], "the six first, then others by name"
    assert found["total"] == {
        "rows": 4, "tokens": 12, "trained_tokens": 7, "share": 1.0,
        "lengths": {"min": 2, "5 %": 2, "25 %": 2, "50 %": 2, "75 %": 3, "95 %": 5, "99 %": 5, "max": 5},
    }  # fmt: skip
    assert found["domains"]["math"]["rows"] == 2 and found["domains"]["math"]["share"] == round(8 / 12, 6)
    assert found["sources"]["other"]["tokens"] == 5 and found["sources"]["own"]["domains"] == [
        "math",
        "zoology",
        NONE,
    ]
    assert found["contamination"] is None and found["packing"] == {}

    tokens = [encode_row(chat_tokenizer, one) for one in read_rows(path)]
    found = row_stats(path, chat_tokenizer)
    assert found["unit"] == "tokens"
    assert found["total"]["tokens"] == sum(len(one.input_ids) for one in tokens)
    assert found["total"]["trained_tokens"] == sum(one.trained_tokens for one in tokens)
    (packing,) = found["packing"].values()
    assert packing["rows"] == 1 and packing["filled"] == round(found["total"]["tokens"] / 2048, 4)


def test_histograms_count_every_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row("w " * size, "a") for size in [*range(1, 400), 9000]])
    found = row_stats(path)["histograms"]
    assert sum(found["domains"]["math"]) == 400
    bars = row_stats(write(path, [row("w " * size, "a") for size in range(1, 80)]))["histograms"]
    assert set(bars["domains"]["math"]) <= {0, 1, 2} and bars["edges"][:3] == [0, 2, 4], (
        "bars of one width in whole words"
    )
    assert found["open_end"] and found["edges"][-1] < 500, (
        "one very long row must not press the others into one bar"
    )


def test_bad_rows_are_counted(tmp_path, make_tokenizer):
    path = write(tmp_path / "rows.jsonl", [row("a"), {"prompt": "no response"}])
    assert row_stats(path)["left_out"] == {"by_reason": {"bad row": 1}, "by_entry": {}, "read": 2}
    with pytest.raises(DataError, match="no such role"):
        row_stats(
            write(tmp_path / "rows.jsonl", [row("a")]),
            make_tokenizer("{{ raise_exception('no such role') }}"),
        )


def test_duplicates_and_leaks_of_data_files(tmp_path):
    other = row(LONG.replace("many", "few"), answer="yes")
    rows = [
        row(LONG),
        row("what else"),
        row(f" {LONG} "),
        row(NEAR),
        row(LONG, answer="no"),
        other,
        row(f"so {LONG}"),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    found = row_stats(path)
    # Exact: rows 3 and 5. Near, with the same answer or none: rows 4 and 7; row 6 has an answer of its own.
    assert found["duplicates"] == {
        "of": 7,
        "exact": 2,
        "near": 2,
        "exact_rate": 0.285714,
        "near_rate": 0.285714,
    }
    questions = write(tmp_path / "test.jsonl", [row(LONG)])
    leaking = row_stats(path, evaluation=evaluation_index([questions]))["contamination"]
    assert leaking["of"] == 7 and leaking["contaminated"] >= 4 and leaking["contaminated_rate"] >= 0.571


def test_questions_on_one_passage_are_no_near_duplicates(tmp_path):
    questions = ("who left", "then where", "which year")
    rows = [row(f"{LONG}\n{question}", document=LONG) for question in questions]
    assert row_stats(write(tmp_path / "rows.jsonl", rows))["duplicates"]["near"] == 0
    for one in rows:
        del one["document"]
    assert row_stats(write(tmp_path / "rows.jsonl", rows))["duplicates"]["near"] > 0


def test_a_built_set(built):
    found = set_stats(built / "tokenized")
    report = json.loads((built / "tokenized/report.json").read_text())
    train = report["splits"]["train"]
    total = found["total"]
    assert (total["rows"], total["tokens"], total["trained_tokens"], total["held_out"]) == (
        train["examples"], train["tokens"], train["trained_tokens"], report["splits"]["validation"]["examples"]
    )  # fmt: skip
    for kind in ("domains", "sources"):
        for name, counts in report[kind].items():
            entry = found[kind][name]
            assert (entry["rows"], entry["held_out"], entry["tokens"]) == (
                counts["train"], counts["validation"], counts["train_tokens"]
            )  # fmt: skip
    assert found["duplicates"]["exact"] == 1 and found["duplicates"]["near"] == 1
    assert found["contamination"]["contaminated"] == 1 and found["contamination"]["of"] == 64
    assert found["left_out"]["by_reason"] == {
        "contaminated": 1,
        "too long": 1,
        "exact duplicate": 1,
        "near duplicate": 1,
    }
    assert found["left_out"]["read"] == 65
    assert found["packing"]["train"]["filled"] == train["filled"]
    assert sum(map(sum, found["histograms"]["domains"].values())) == total["rows"]


def test_a_set_is_what_its_rows_are(built, chat_tokenizer):
    packed, rows = set_stats(built / "tokenized"), row_stats(built / "data.jsonl", chat_tokenizer)
    assert packed["domains"]["math"]["lengths"] == rows["domains"]["math"]["lengths"]
    assert packed["total"]["trained_tokens"] == rows["total"]["trained_tokens"]


def test_a_damaged_or_foreign_set_is_refused(built, tmp_path):
    (tmp_path / "x").write_text("x")
    write_manifest(tmp_path, {"kind": "adapter"})
    with pytest.raises(ArtifactError, match="must be 'pretokenized', not 'adapter'"):
        set_stats(tmp_path)
    (tmp_path / "x").write_text("y")
    with pytest.raises(ArtifactError, match="sha256"):
        set_stats(tmp_path)


def test_tables_read_well_at_80_columns(built, tmp_path):
    from rich.console import Console

    names = [
        row(f"{i} what", source="a/very-long-name_of_a_data_set-without-any-space_" * 2, domain="x" * 90)
        for i in range(9)
    ]
    for stats in (set_stats(built / "tokenized"), row_stats(write(tmp_path / "rows.jsonl", names))):
        console = Console(width=80, record=True, file=(tmp_path / "out").open("w"), highlight=False)
        with console.file:
            console.print(as_group(stats))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        for sheet in sheets(stats):
            for cells in sheet.rows:
                assert all(cell in text for cell in cells[1:]), "numbers are never cut"


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0 %"), (0.5, "50.0 %"), (0.00004, "0.004 %"), (1.0, "100.0 %")]
)
def test_percent(share, text):
    assert percent(share) == text


class Tags(HTMLParser):
    """Collects a page's tags, what they refer to and its text, and sees that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_stands_alone(built):
    html = page(set_stats(built / "tokenized"))
    found = parsed(html)
    assert "script" not in found.tags and "link" not in found.tags and "img" not in found.tags
    assert all(link.startswith("#") for link in found.links)
    assert "http" not in html and "url(" not in re.sub(r"url\(#", "", html)
    assert len(found.ids) == len(set(found.ids)) and {link[1:] for link in found.links} <= set(found.ids)
    assert found.tags.count("svg") == 4 and found.tags.count("title") == 1
    assert "prefers-color-scheme: dark" in html and "currentColor" in html and "#010203" not in html
    assert "#ffffff" not in html, "plots have no ground of their own"
    text = " ".join(found.texts)
    for said in (
        "Length in tokens, by domain",
        "Left out, and why",
        "near duplicate",
        "logic",
        "trained tokens",
        "Packing",
    ):
        assert said in text


def test_the_page_is_the_same_twice(built):
    stats = set_stats(built / "tokenized")
    assert page(stats) == page(stats)


@pytest.mark.security
def test_names_cannot_break_out_of_the_page(tmp_path):
    rows = [row(f"{i}", domain=f"{HOSTILE}{i % 2}", source=f"日本{HOSTILE}") for i in range(4)]
    html = page(row_stats(write(tmp_path / "a<b>.jsonl", rows)))
    found = parsed(html)
    assert "script" not in found.tags and "b" not in found.tags[: found.tags.index("p")]
    assert "\x1b" not in html and "\u202e" not in html
    assert "<script>alert('1')</script>" in " ".join(found.texts), "it is shown as the text it is"


@pytest.mark.parametrize("count", [1, 30, 60])
def test_any_number_of_domains_and_sources_can_be_drawn(tmp_path, count):
    rows = [row(f"{i}", domain=f"domain {i}", source=f"source {i}") for i in range(count)]
    assert parsed(page(row_stats(write(tmp_path / "rows.jsonl", rows)))).tags.count("svg") == 3


def test_the_verb(capsys, tmp_path, built):
    rows = write(tmp_path / "rows.jsonl", [row("a b"), row("c d", "[bold]x")])
    files = ["--html", str(tmp_path / "page.html"), "--json", str(tmp_path / "figures.json")]
    model = ["--model_name", str(built.parent / "model")]
    assert main(["data", "stats", str(rows), *model, "--eval_file", str(rows), *files]) == 0
    out = capsys.readouterr().out
    assert "Length in tokens, by source" in out and "hold an evaluation question     2   2  100.0 %" in out
    assert json.loads((tmp_path / "figures.json").read_text())["total"]["rows"] == 2
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["data", "stats", str(built)]) == 0
    assert "held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_file", "x"], "eval_file=['x']: it is for data files"),
        (["--model_name", "x"], "model_name='x': it is for data files"),
        (["--html", "/no/such/folder/x.html"], "it cannot be written"),
        (["--htlm", "x"], "the nearest is --html"),
    ],
)
def test_wrong_flags(capsys, built, flags, message):
    assert main(["data", "stats", str(built), *flags]) == 1
    assert message in capsys.readouterr().err
