"""The page and the plots: the numbers are there, nothing comes from outside, nothing in a run's files can break out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from srde.cli import main
from srde.errors import UsageError
from srde.monitor.figures import figures
from srde.monitor.plots import save_plots
from srde.monitor.report import page, write_report
from srde.monitor.run import read_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> $\\frac{ %{x} & \" ' \x1b[31m\u202e"


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


@pytest.fixture
def hostile(fabricate):
    """A run whose every name is made to do harm."""
    fabricated = fabricate(
        steps=90, layers=2, model=HOSTILE, domains=[HOSTILE, "math"], identity={"seed": HOSTILE},
        phases=[{"name": HOSTILE, "start": 0, "end": 100}],
    )  # fmt: skip
    fabricated.facts["layers"] = [HOSTILE, HOSTILE]
    fabricated.event("prune", HOSTILE)
    fabricated.checkpoint("checkpoint-80")
    fabricated.damage("checkpoint-80")
    fabricated.beat("failed", phase=HOSTILE, reason=HOSTILE)
    return fabricated


def test_the_page_has_the_numbers(fabricate):
    fabricated = fabricate(steps=60)
    fabricated.checkpoint()
    fabricated.event("prune", "sparsity 5.0 % -> 4.2 %")
    run = read_run(fabricated.folder)
    seen = Page(page(run)).seen
    for part in (
        "running", "60 of 100", f"{run.train.last('loss'):.3f}", "1.432", "2.000", "-28.4 %", "8.2 k", "9.1 GB", "2.6 %",
        "checkpoint-60", "verified", "sparsity 5.0 % -> 4.2 %", "No alerts.", "HuggingFaceTB/SmolLM2-135M-Instruct",
        "warm_up 0-10, expert_pretraining 10-20, joint 20-100", '"seed": 0',
    ):  # fmt: skip
        assert part in seen, part


def test_the_plots_have_the_numbers(fabricate):
    run = read_run(fabricate(steps=60).folder)
    drawn = {figure_title: figure["data"] for figure_title, figure in figures(run).items()}
    training, held_out, base = drawn["Loss"]
    assert training["x"] == list(range(1, 61)) and training["y"] == pytest.approx(run.train["loss"], rel=1e-5)
    assert (
        held_out["x"] == [20, 40, 60]
        and held_out["y"][-1] == pytest.approx(1.4322, abs=1e-4)
        and base["y"] == [2, 2]
    )
    assert [trace["name"] for trace in drawn["Held-out loss by domain"]][::2] == ["math", "logic", "code"]
    assert np.shape(drawn["Expert load by layer, last windows"][0]["z"]) == (8, 4)
    assert drawn["Expert load over the run"][0]["x"] == list(range(11, 61))
    assert drawn["Sparsity and learning rate"][0]["y"][0] == pytest.approx(4.96)
    assert len(drawn) == 7


def test_plotly_knows_every_property_of_the_plots(hostile):
    from plotly.graph_objects import Figure

    for figure in figures(read_run(hostile.folder)).values():
        Figure(figure)  # raises for a property that there is not
        assert "nan" not in json.dumps(figure).lower().replace("nanc", "")


def test_nothing_comes_from_outside(fabricate):
    parsed = Page(page(read_run(fabricate(steps=40).folder)))
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "img", "object", "base") and not {"src", "href"} & set(
            attributes
        )
    library = max(parsed.scripts, key=len)
    text = page(read_run(fabricate(steps=40).folder)).replace(library, "")
    assert "://" not in text and "url(" not in text and "@import" not in text and len(text) < 200_000
    policy = dict(parsed.tags)["meta"] and next(
        attributes["content"] for _, attributes in parsed.tags if "http-equiv" in attributes
    )
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    runs = [script for script in parsed.scripts if not script.startswith("[")]
    for script in runs:  # the page's own policy lets exactly these run
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert len(runs) == 2 and policy.count("sha256-") == 2 and "plotly.js v" in library


def test_names_from_files_stay_text(hostile):
    parsed = Page(page(read_run(hostile.folder)))
    assert [tag for tag, _ in parsed.tags].count("script") == 3
    assert not any(attribute.startswith("on") for _, attributes in parsed.tags for attribute in attributes)
    assert "img" not in dict(parsed.tags) and parsed.seen.count("<script>alert(1)") >= 6
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", parsed.seen)
    values = next(script for script in parsed.scripts if script.startswith("["))
    assert "<" not in values and len(json.loads(values)) == 7
    assert "<script" not in json.dumps(json.loads(values))  # plotly.js reads texts as HTML of its own


def test_the_page_through_the_command_line(fabricate, capsys, tmp_path):
    fabricated = fabricate(steps=0)
    file = tmp_path / "pages" / "run.html"
    assert main(["monitor", "--output_dir", str(fabricated.folder), "--html", str(file)]) == 0
    assert f"Page: {file}" in capsys.readouterr().out and file.read_text().startswith("<!DOCTYPE html>")
    assert [one.name for one in file.parent.iterdir()] == ["run.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(read_run(fabricated.folder), tmp_path / "file" / "run.html")


def test_the_plots_exist_and_are_not_blank(hostile, fabricate, tmp_path):
    from matplotlib.image import imread

    files = save_plots(read_run(hostile.folder), tmp_path / "plots")
    assert [file.name for file in files] == ["loss.png", "experts.png", "schedule.png"]
    assert sorted(tmp_path.glob("plots/*")) == sorted(files)
    for file in files:
        image = imread(file)[..., :3]
        assert min(image.shape[:2]) > 300
        assert 0.02 < (image.min(-1) < 0.9).mean() < 0.9
    assert (
        len(np.unique((imread(files[1]) * 255).astype(int).reshape(-1, 4), axis=0)) > 50
    )  # a heatmap's colours
    assert save_plots(read_run(fabricate("new", steps=0).folder), tmp_path / "none") == []
