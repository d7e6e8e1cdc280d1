"""The table, the files and the page: the figures are there, nothing comes from outside, no name can break out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from eval_models import CHOICE, adapted, row
from srde.errors import UsageError
from srde.eval.evaluate import compare, evaluate
from srde.eval.page import page
from srde.eval.plain import answers, as_json
from srde.eval.report import environment, file_hash, save_report
from srde.eval.results import Item, summed_up
from srde.eval.table import summary

HOSTILE = "</script><img src=x onerror=alert(1)> $\\frac{ %{x} & \" ' \x1b[31m\u202e"
SETTINGS = {"adapter": "runs/mine", "base": "models/base", "seed": None}


@pytest.fixture(scope="module")
def found():
    model, tokenizer = adapted()
    rows = [
        row("math", "what is 1", "the answer is 2", kind="number", answer="2", source="sums", id="sums/1"),
        row("math", "what is 3", "3", kind="number", answer="3", source="sums"),
        row("math", CHOICE, "The answer is B", kind="choice", answer="B", source="letters"),
        row("logic", "how many", "yes", kind="code", source="programs"),
        row("logic", "how many are there", "B", kind="choice", answer="B", source="letters"),
    ]
    general = [row(None, "", "yes no what how many"), row(None, "", "there are 5 6 the answer")]
    experts = evaluate(model, tokenizer, rows, general=general, max_new_tokens=3)
    with model.disable_adapter():
        base = evaluate(model, tokenizer, rows, general=general, max_new_tokens=3)
    return experts, base


def printed(thing, width=100):
    console = Console(record=True, width=width, highlight=False, markup=False, emoji=False)
    console.print(thing)
    return console.export_text()


def test_the_table_fits_and_shows_both_models_with_their_difference(found):
    experts, base = found
    text = printed(summary(experts, base, by="source"))
    assert max(map(len, text.splitlines())) <= 100
    paired = compare(experts, base)
    math = next(line for line in text.splitlines() if "math" in line)
    change = paired.domains["math"].loss
    assert f"{base.domains['math'].loss:.3f} → {experts.domains['math'].loss:.3f}" in math
    assert f"({change.value:+.3f} ± {change.half_width:.3f})" in math and "3/3" in math
    points = paired.domains["math"].accuracy
    assert f"({100 * points.value:+.1f} ± {100 * points.half_width:.1f})" in math
    source = next(line for line in text.splitlines() if "  sums" in line)
    assert f"{experts.sources['math', 'sums'].loss:.3f}" in source and "2/2" in source
    general = next(line for line in text.splitlines() if "general text" in line)
    assert f"{base.general_loss.value:.3f} → {experts.general_loss.value:.3f}" in general
    assert "1 program not run" in text and "1 choice row scored by the text" in text
    best = int(experts.routing.share_DE[0].argmax())
    assert f"{best} ({100 * experts.routing.share_DE[0, best]:.0f} %)" in text
    assert "entropy: " in text and "dead experts: " in text and "bits of mutual information" in text


def test_without_a_base_there_is_one_figure_with_its_interval(found):
    experts, _ = found
    text = printed(summary(experts))
    assert "→" not in text and "programs" not in text  # a source, not asked for
    loss = experts.domains["math"].loss_estimate
    assert f"{loss.value:.3f} ± {loss.half_width:.3f}" in text


def test_long_names_give_way_to_the_figures(found):
    experts, base = found
    rows = [replace(one, source="bigbench_evaluating_information_essentiality" * 2) for one in experts.rows]
    wide = [summed_up(rows, one.items) for one in (experts, base)]
    text = printed(summary(*wide, by="source"))
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text


def test_the_json_holds_every_figure(found):
    experts, base = found
    out = json.loads(json.dumps(as_json(experts, base, SETTINGS), allow_nan=False))
    assert list(out) == ["format", "settings", "srde", "base", "difference", "routing"]
    assert out["settings"] == SETTINGS and out["format"] == 1
    math, paired = out["srde"]["domains"]["math"], compare(experts, base)
    mine = experts.domains["math"]
    assert (math["rows"], math["scored"], math["tokens"]) == (3, 3, mine.tokens)
    assert (math["loss"], math["loss_se"]) == pytest.approx((mine.loss, mine.loss_se))
    assert (math["accuracy"], math["accuracy_se"]) == pytest.approx((mine.accuracy, mine.accuracy_se))
    assert math["accuracy_ci95"] == pytest.approx(mine.accuracy_estimate.ci95)
    assert math["loss_ci95"] == pytest.approx(mine.loss_estimate.ci95)
    assert out["base"]["domains"]["math"]["expert_load"] is None and len(math["expert_load"]) == 2
    assert out["srde"]["sources"]["math"]["sums"]["rows"] == 2 and out["srde"]["all"]["not_run"] == 1
    change = out["difference"]["domains"]["math"]["loss"]
    assert change["value"] == pytest.approx(paired.domains["math"].loss.value) and change["items"] == 3
    assert change["ci95"] == pytest.approx(paired.domains["math"].loss.ci95)
    assert out["difference"]["sources"]["math"]["letters"]["accuracy"]["se"] is None  # one item
    assert out["difference"]["all"]["accuracy"]["value"] == pytest.approx(paired.total.accuracy.value)
    assert out["difference"]["general"]["loss"]["value"] == pytest.approx(paired.general.value)
    assert out["srde"]["general"]["paragraphs"] == 2
    routing = out["routing"]
    assert set(routing["domain_expert"]) == {"math", "logic"} and len(routing["load"]) == 2
    assert sum(routing["domain_expert"]["math"]) == pytest.approx(1, abs=1e-4)
    assert 0 <= routing["token_entropy_relative"] <= routing["entropy_of_load_relative"] <= 1
    alone = as_json(experts, None, SETTINGS)
    assert "base" not in alone and "difference" not in alone


def test_a_loss_that_is_no_number_is_null(found):
    experts, _ = found
    broken = summed_up(experts.rows, [Item(float("nan"), 3) for _ in experts.rows])
    out = json.loads(json.dumps(as_json(broken, broken, {}), allow_nan=False))
    assert out["srde"]["all"]["loss"] is None and out["difference"]["all"]["loss"]["value"] is None
    assert "NaN" not in page(broken, broken, {}).split('id="figures">')[1].split("</script>")[0]


def test_every_answer_is_a_line(found):
    experts, base = found
    lines = answers(experts, base)
    assert [one["scored_by"] for one in lines] == ["text", "text", "letters", "not run", "text"]
    first, choice = lines[0], lines[2]
    assert (first["id"], first["source"], first["domain"], first["kind"]) == (
        "sums/1",
        "sums",
        "math",
        "number",
    )
    assert first["right_answer"] == "2" and first["srde"]["answer"] == experts.items[0].text
    assert first["base"]["loss"] == pytest.approx(base.items[0].loss / base.items[0].tokens)
    assert choice["srde"]["loglik"] == pytest.approx(experts.items[2].loglik, abs=1e-5)
    assert lines[3]["srde"]["score"] is None and "base" not in answers(experts, None)[0]


def test_the_files_are_written_and_replaced(found, tmp_path):
    experts, base = found
    (tmp_path / "adapter_config.json").write_text("{}")
    for _ in range(2):
        files = save_report(tmp_path, experts, base, SETTINGS)
    names = ["eval_results.json", "answers.jsonl", "report.html", "plots/routing.png"]
    assert [file.relative_to(tmp_path).as_posix() for file in files] == names
    assert json.loads(files[0].read_text())["settings"] == SETTINGS
    assert len(files[1].read_text().splitlines()) == 5
    assert files[3].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and files[3].stat().st_size > 10_000
    found_ = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert found_ == {"adapter_config.json", "routing.png", *names[:3]}
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output_dir='.*file': it cannot be written"):
        save_report(tmp_path / "file", experts, base, {})


def test_the_settings_can_name_what_was_used(tmp_path):
    (tmp_path / "rows").write_bytes(b"abc")
    assert file_hash(tmp_path / "rows") == hashlib.sha256(b"abc").hexdigest()
    assert {"python", "srde", "torch", "transformers", "peft"} == set(environment())


class Page(HTMLParser):
    """Tags with attributes, the text that is seen, and the scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.seen, self.scripts, self.inside = [], "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.seen += data


def test_the_page_has_the_figures_and_loads_nothing(found):
    experts, base = found
    text = page(experts, base, SETTINGS)
    read = Page(text)
    for section in ("Held-out rows", "What was lost", "By source", "Settings", "Routing: where each domain"):
        assert section in read.seen
    paired = compare(experts, base)
    assert f"{paired.domains['math'].loss.value:+.3f} ± " in read.seen and "runs/mine" in read.seen
    assert f"{paired.general.value:+.4f}" in read.seen
    assert not [
        tag for tag, attrs in read.tags if {"src", "href"} & set(attrs) or tag in ("link", "img", "iframe")
    ]
    policy = next(attrs["content"] for tag, attrs in read.tags if attrs.get("http-equiv"))
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in read.scripts[1:]]
    assert policy.startswith("default-src 'none'") and re.findall(r"'sha256-(.+?)'", policy) == hashes
    plots = json.loads(read.scripts[0])
    assert len(plots) == 6 == len([attrs for _, attrs in read.tags if attrs.get("class") == "plot"])
    losses = plots[1]["data"]
    assert [one["name"] for one in losses] == ["base", "srde"] and losses[0]["x"] == ["math", "logic", "all"]
    assert losses[1]["y"][0] == pytest.approx(experts.domains["math"].loss, abs=1e-4)
    assert losses[1]["error_y"]["array"][0] == pytest.approx(
        experts.domains["math"].loss_estimate.half_width, abs=1e-4
    )
    changes = plots[3]["data"][0]
    assert changes["y"] == ["math", "logic", "all", "general text"]
    assert changes["x"][3] == pytest.approx(paired.general.value, abs=1e-4)
    assert plots[4]["data"][0]["z"][0] == pytest.approx(
        (100 * experts.routing.share_DE[0]).tolist(), abs=0.01
    )


def test_a_page_without_a_base_or_general_text(found):
    experts, _ = found
    read = Page(page(replace(experts, general=()), None, {}))
    assert "What was lost" not in read.seen and len(json.loads(read.scripts[0])) == 4


def test_names_stay_text(found, tmp_path):
    experts, base = found
    rows = tuple(replace(one, domain=HOSTILE, source=HOSTILE, id=HOSTILE) for one in experts.rows)
    renamed = [
        summed_up(
            rows, one.items, general=one.general, routing=replace(experts.routing, domains=(HOSTILE, "b"))
        )
        for one in (experts, base)
    ]
    text = page(*renamed, {"adapter": HOSTILE, "base": HOSTILE, HOSTILE: [HOSTILE]})
    read = Page(text)
    assert len(read.scripts) == 3 and not [tag for tag, _ in read.tags if tag == "img"]
    assert "onerror=alert(1)>" in read.seen and "\x1b" not in text and "\u202e" not in text
    assert "%{x}" not in read.scripts[0] and "<" not in read.scripts[0]
    assert "\x1b" not in printed(summary(*renamed, by="source"), 200)
    save_report(tmp_path, *renamed, {})  # the plot draws it too
