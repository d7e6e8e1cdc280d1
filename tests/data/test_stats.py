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
from srde.data.view.rates import set_rates
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
    rows += [rows[0], *(row(f"{text} and so what", answer=1) for text in (LONG, NEAR)), row("long " * 90)]
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
    rows = [row("a b", "c"), row("d", "e f g h", source="other"), row("i", "j", domain="zoology")]
    path = write(tmp_path / "rows.jsonl", [*rows, row("k", "l", domain=None)])
    found = row_stats(path)
    assert found["unit"] == "words"
    assert list(found["domains"]) == ["math", NONE, "zoology"], "the six first, then others by name"
    assert found["total"] == {
        "rows": 4, "tokens": 12, "trained_tokens": 7, "share": 1.0,
        "lengths": {"min": 2, "5 %": 2, "25 %": 2, "50 %": 2, "75 %": 3, "95 %": 5, "99 %": 5, "max": 5},
    }  # fmt: skip
    assert found["domains"]["math"]["rows"] == 2 and found["domains"]["math"]["share"] == round(8 / 12, 6)
    assert found["sources"]["other"]["tokens"] == 5
    assert found["sources"]["own"]["domains"] == ["math", "zoology", NONE]
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
    assert sum(found["domains"]["math"]) == sum(found["sources"]["own"]) == 400
    bars = row_stats(write(path, [row("w " * size, "a") for size in range(1, 80)]))["histograms"]
    assert set(bars["domains"]["math"]) <= {0, 1, 2} and bars["edges"][:3] == [0, 2, 4], (
        "bars of one width in whole words"
    )
    assert found["open_end"] and found["edges"][-1] < 500, (
        "one very long row must not press the others into one bar"
    )
    mixed = [row("w " * (4 if i else 9), "a", source="short") for i in range(960)]
    mixed += [row("w " * (100 + i), "a", source=f"long {i % 2}") for i in range(40)]
    found = row_stats(write(path, mixed))["histograms"]
    assert {name: sum(counts) for name, counts in found["sources"].items()} == {
        "short": 960, "long 0": 20, "long 1": 20
    }  # fmt: skip
    width = found["edges"][1]
    assert found["sources"]["short"][5 // width] == 959 and found["sources"]["short"][10 // width] == 1
    assert sum(count > 0 for count in found["sources"]["long 0"]) > 5, "no source lies all in the last bar"
    assert found["domains"]["math"] == [
        sum(counts) for counts in zip(*found["sources"].values(), strict=True)
    ]


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
    rows = [row(LONG), row("what else"), row(f" {LONG} "), row(NEAR), row(LONG, answer="no"), other]
    rows += [row(f"so {LONG}")]
    path = write(tmp_path / "rows.jsonl", rows)
    found = row_stats(path)
    # Exact: rows 3 and 5. Near, with the same answer or none: rows 4 and 7; row 6 has an answer of its own.
    rate = 0.285714
    assert found["duplicates"] == {"of": 7, "exact": 2, "near": 2, "exact_rate": rate, "near_rate": rate}
    questions = write(tmp_path / "test.jsonl", [row(LONG)])
    leaking = row_stats(path, evaluation=evaluation_index([questions]))["contamination"]
    assert leaking["of"] == 7 and leaking["contaminated"] >= 4 and leaking["contaminated_rate"] >= 0.571


def test_rates_of_data_files_by_domain_and_source(tmp_path):
    rows = [
        row(LONG),
        row(LONG, domain="logic", source="b"),
        row(NEAR, source="b"),
        row("what else", source="c"),
    ]
    path = write(tmp_path / "rows.jsonl", [*[{"prompt": "bad"}] * 1023, *rows])  # in two batches
    found = row_stats(path, evaluation=evaluation_index([write(tmp_path / "t.jsonl", [row("what else")])]))
    cells = {sheet.title: sheet.rows for sheet in sheets(found)}
    assert cells["Duplicates and leaks, by domain"] == (
        ("math", "3", "0", "0.0 %", "1", "33.3 %", "1", "33.3 %"),
        ("logic", "1", "1", "100.0 %", "0", "0.0 %", "0", "0.0 %"),
        ("all", "4", "1", "25.0 %", "1", "25.0 %", "1", "25.0 %"),
    )
    by_source = {name: entry for name, *entry in cells["Duplicates and leaks, by source"]}
    assert by_source["b"] == ["2", "1", "50.0 %", "1", "50.0 %", "0", "0.0 %"]
    assert by_source["c"][-2:] == ["1", "100.0 %"] and by_source["own"][1:] == ["0", "0.0 %"] * 3
    assert found["rates"]["sources"]["by_name"]["b"]["duplicates"] == {
        "of": 2, "exact": 1, "near": 1, "exact_rate": 0.5, "near_rate": 0.5
    }  # fmt: skip
    found = row_stats(path)
    assert all(one["contamination"] is None for one in found["rates"]["domains"]["by_name"].values())
    assert "not compared with evaluation questions" in page(found)


def test_rates_of_a_set_are_told_or_left_empty(tmp_path):
    leaks = ["a/1", "a/2", "two/file/x:3", "gone/4"]
    others = [{"source": "a", "id": "a/9", "reason": "near duplicate"}]
    counts = {"usable": 8, "exact_duplicates": 2, "near_duplicates": 1}
    report = {
        "domains": {"math": counts, "logic": counts, "code": counts},
        "sources": {"a": counts, "two": counts, "p": counts, "p/q": counts},
        "evaluation": ["test"],
    }
    of = {"a": {"math"}, "two": {"logic", "code"}, "p": {"math"}, "p/q": {"math"}}

    def told(*ids: str) -> tuple[dict, dict, str]:
        lines = [{"source": "entry", "id": one, "reason": "contaminated"} for one in ids]
        found = set_rates(
            report, write(tmp_path / "dropped.jsonl", lines + others), of, dict.fromkeys(report, ())
        )
        every = [found[kind]["by_name"].items() for kind in ("domains", "sources")]
        rates = [{name: one["contamination"]["contaminated_rate"] for name, one in kind} for kind in every]
        return *rates, " ".join(found["domains"]["notes"] + found["sources"]["notes"])

    assert told(*leaks[:2])[:2] == (
        {"math": 0.2, "logic": 0, "code": 0},
        {"a": 0.2, "two": 0, "p": 0, "p/q": 0},
    )
    domains, sources, notes = told(*leaks[:3])
    assert domains == {"math": 0.2, "logic": None, "code": None} and sources["two"] == round(1 / 9, 6)
    assert "Empty cells: 1 leaking row(s) may be of these domains" in notes
    domains, sources, _ = told(*leaks)
    assert set(domains.values()) == {None} and sources["gone"] == 1.0
    domains, sources, notes = told("p/q/1")
    assert domains["math"] == round(1 / 9, 6) and sources == {"a": 0, "two": 0, "p": None, "p/q": None}
    assert "Empty cells: 1 leaking row(s) may be of these sources" in notes
    assert "In no line: 1 leaking row(s)" in told("x/y/z")[2]


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
    reasons = ("contaminated", "too long", "exact duplicate", "near duplicate")
    assert found["left_out"]["by_reason"] == dict.fromkeys(reasons, 1)
    assert found["left_out"]["read"] == 65
    assert found["packing"]["train"]["filled"] == train["filled"]
    for kind in ("domains", "sources"):
        bars, rates = found["histograms"][kind], found["rates"][kind]["by_name"]
        assert {name: sum(counts) for name, counts in bars.items()} == {
            name: entry["rows"] for name, entry in found[kind].items()
        }
        for name, counts in report[kind].items():
            twins = rates[name]["duplicates"]
            assert [twins[key] for key in ("of", "exact", "near")] == [
                counts[key] for key in ("usable", "exact_duplicates", "near_duplicates")
            ]
    assert found["rates"]["sources"]["by_name"]["own"]["contamination"]["contaminated_rate"] == round(
        1 / 64, 6
    )
    assert found["rates"]["domains"]["by_name"]["math"]["contamination"]["contaminated"] is None, (
        "of which domain?"
    )


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
    assert found.tags.count("svg") == 5 and found.tags.count("title") == 1
    assert "prefers-color-scheme: dark" in html and "currentColor" in html and "#010203" not in html
    assert "#ffffff" not in html, "plots have no ground of their own"
    text = " ".join(found.texts)
    for said in (
        "Length in tokens, by domain",
        "Length in tokens, by source, coloured by domain",
        "Duplicates and leaks, by domain",
        "Duplicates and leaks, by source",
        "Empty cells: 1 leaking row(s)",
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


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 30, pytest.param(60, marks=pytest.mark.slow)])
def test_any_number_of_domains_and_sources_can_be_drawn(tmp_path, count):
    rows = [row(f"{i}", domain=f"domain {i}", source=f"source {i}") for i in range(count)]
    html = page(row_stats(write(tmp_path / "rows.jsonl", rows)))
    assert parsed(html).tags.count("svg") == 4
    drawn = html[html.index("by source, coloured") :].split("</svg>")[0]
    assert all(f">source {i}<" in drawn for i in range(count)), "each has a histogram of its own"


def test_the_verb(capsys, tmp_path, built):
    rows = write(tmp_path / "rows.jsonl", [row("a b"), row("c d", domain="[bold]x :smile:", source="[/b]")])
    files = ["--html", str(tmp_path / ":smile:.html"), "--json", str(tmp_path / "figures.json")]
    model = ["--model_name", str(built.parent / "model")]
    assert main(["data", "stats", str(rows), *model, "--eval_file", str(rows), *files]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("[bold]x :smile:", "[/b]", files[1])), "nothing in the data is markup"
    assert "Length in tokens, by source" in out and "hold an evaluation question     2   2  100.0 %" in out
    assert json.loads((tmp_path / "figures.json").read_text())["total"]["rows"] == 2
    assert Path(files[1]).read_text().startswith("<!DOCTYPE html>")
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
