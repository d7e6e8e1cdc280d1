"""An analysis says what the routers did: experts, layers, certainty; and what it looks like."""

import io
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from srde.errors import UsageError
from srde.infer.analysis import analyse
from srde.infer.colors import expert_color
from srde.infer.generate import generate
from srde.infer.plot import save_plot
from srde.infer.prompts import encode_prompt
from srde.infer.route import routed
from srde.infer.view import expert_table, layer_table

PROMPT = "how many are there 2 3"


@pytest.fixture(scope="module")
def looked(named):
    model, tokenizer = named
    answer = generate(model, tokenizer, [PROMPT], max_new_tokens=8).answers[0]
    return answer, analyse(model, tokenizer, PROMPT, answer.ids)


def test_it_is_what_the_routers_say(named, looked):
    model, tokenizer = named
    answer, analysis = looked
    ids = encode_prompt(tokenizer, PROMPT)
    with torch.no_grad(), model.srde.record() as record:
        model(torch.tensor([[*ids, *answer.ids]]))
    for n, route in enumerate(record.calls[0].routes.values()):
        p_TE = route.logits_TE.softmax(-1)
        entropy_T = -(p_TE * p_TE.log()).sum(-1) / math.log(4)
        for part, at in (
            (analysis.prompt, slice(0, len(ids))),
            (analysis.answer, slice(len(ids) - 1, len(ids) - 1 + len(answer.ids))),
        ):
            torch.testing.assert_close(part.gate_LTE[n], route.gate_TE[at])
            torch.testing.assert_close(part.sure_LT[n], p_TE.amax(-1)[at])
            torch.testing.assert_close(part.entropy_LT[n], entropy_T[at])
            assert part.experts_LT[n] == route.gate_TE[at].argmax(-1).tolist()
    assert 0 <= float(analysis.answer.entropy_LT.min()) <= float(analysis.answer.entropy_LT.max()) <= 1
    torch.testing.assert_close(analysis.answer.load_E, answer.load_E, atol=1e-5, rtol=0)
    assert analysis.labels == ["0 math", "1 code", "2 math", "3 logic"] and analysis.numbers == ["0", "1"]
    assert "".join(analysis.prompt.texts).startswith("<|im_start|>user\nhow many") and not analysis.forced


def test_without_an_answer_the_prompt_speaks(named):
    analysis = analyse(*named, PROMPT)
    assert analysis.answer is None and analysis.spoken is analysis.prompt
    assert analysis.to_dict()["answer"] is None


def test_a_forced_expert_has_all_and_the_routers_opinion_is_kept(named, looked):
    model, tokenizer = named
    with routed(model, "logic"):
        analysis = analyse(model, tokenizer, PROMPT, looked[0].ids)
    assert analysis.forced and analysis.answer.load_E.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(analysis.prompt.sure_LT[0], looked[1].prompt.sure_LT[0])


def test_locked_experts_do_not_count_as_choices(named):
    with routed(named[0], "code,logic"):
        part = analyse(*named, PROMPT).prompt
    assert float(part.sure_LT.min()) >= 0.5 and float(part.entropy_LT.max()) <= 1
    with (
        routed(named[0], "off"),
        pytest.raises(UsageError, match="no adapter is active, so there is no router"),
    ):
        analyse(*named, PROMPT)


def test_the_tables_name_experts_layers_and_certainty(looked):
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(expert_table(looked[1]))
    console.print(layer_table(looked[1]))
    text = console.export_text()
    best = int(looked[1].answer.load_E.argmax())
    row = next(line for line in text.splitlines() if f"■ {looked[1].labels[best]}" in line)
    assert f"{100 * float(looked[1].answer.load_E[best]):.0f} %" in row
    assert f"{float(looked[1].answer.sure_LT.mean()):.2f}" in text and "Layers, answer" in text
    assert text.index(f"■ {looked[1].labels[best]}") < text.index("sureness", text.index("■"))


def test_the_figures_are_plain_json(looked):
    figures = json.loads(json.dumps(looked[1].to_dict()))
    assert set(figures) == {"experts", "layers", "null_expert", "forced", "prompt", "answer"}
    assert (
        len(figures["answer"]["tokens"]) == len(figures["answer"]["expert_per_token"]) == len(looked[0].ids)
    )
    assert sum(figures["answer"]["load"]) == pytest.approx(1, abs=1e-3)


def test_the_picture_holds_the_colours_of_the_experts(named, looked, tmp_path):
    model, tokenizer = named
    with routed(model, expert=2):
        analysis = analyse(model, tokenizer, PROMPT, looked[0].ids)
    path = save_plot(analysis, tmp_path / "new/analysis.png", title="a $prompt$ with 日本語")
    assert [p.name for p in path.parent.iterdir()] == ["analysis.png"]
    pixels = np.round(imread(path)[..., :3] * 255).astype(int)
    share = {
        e: float((pixels == [int(expert_color(e)[n : n + 2], 16) for n in (1, 3, 5)]).all(-1).mean())
        for e in (1, 2)
    }
    assert share[2] > 0.2 > 10 * share[1]
    long = analyse(model, tokenizer, "0 1 2 " * 100)
    assert imread(save_plot(long, tmp_path / "long.png")).shape[1] < 4000


def test_each_expert_has_a_colour_of_its_own():
    assert len({expert_color(e) for e in [None, *range(64)]}) == 65
