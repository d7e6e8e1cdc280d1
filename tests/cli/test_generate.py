"""`srde generate` from the command line: prompts, routes, output, and flags that contradict each other."""

import io
import json
import sys

import pytest
from adapters import config, fill
from matplotlib.image import imread
from peft import get_peft_model

from srde.cli import main
from srde.hub.export import Source, export_sardine
from srde.infer.generate import generate
from srde.infer.route import routed
from srde.tuner.loading import load_adapter, load_base
from tiny import save_tiny

NAMES = ["math", "code", "math", "logic"]
PROMPTS = ["what is 1", "how many are there 2 3 4"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A saved adapter that changes what its base says."""
    folder = tmp_path_factory.mktemp("adapter")
    base = save_tiny(folder / "base")
    model = fill(get_peft_model(load_base(str(base)), config(expert_names=NAMES)))
    model.save_pretrained(folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def model(adapter):
    return load_adapter(str(adapter))


@pytest.fixture
def ask(adapter, capsys):
    def ask(*argv, status=0):
        assert main(["generate", "--adapter", str(adapter), "--max_new_tokens", "6", *argv]) == status
        return capsys.readouterr()

    return ask


def texts(model, prompts=PROMPTS, *route, **options):
    with routed(model[0], *route):
        return [a.text for a in generate(*model, prompts, max_new_tokens=6, **options)]


def test_one_prompt_gives_its_answer_alone(ask, model):
    assert ask("--prompt", PROMPTS[0]).out == texts(model)[0] + "\n"


@pytest.mark.parametrize(
    "more", [[], ["--stream"], ["--batch_size", "1"], ["--no_cache"], ["--show_routing"]], ids="-".join
)
def test_several_prompts_are_headed_and_answered_alike(ask, model, more):
    lines = ask("--prompt", *PROMPTS, *more).out
    for n, (prompt, text) in enumerate(zip(PROMPTS, texts(model), strict=True), start=1):
        assert f"# {n}/2 {prompt}\n" in lines
        if "--show_routing" not in more:
            assert f"{prompt}\n{text}\n" in lines
    assert ("experts:" in lines) == ("--show_routing" in more)
    if "--show_routing" in more:
        assert lines.count("  [expert ") == 2 and lines.rstrip().splitlines()[-1].startswith("experts:  [")


@pytest.mark.parametrize(
    ("flags", "route"),
    [
        (["--route", "off"], ("off",)), (["--base"], ("off",)), (["--route", "math"], ("math",)),
        (["--expert", "3"], (None, 3)), (["--route", "code=0.7,logic=0.3"], ("code=0.7,logic=0.3",)),
    ],
    ids=str,
)  # fmt: skip
def test_a_route_is_forced(ask, model, flags, route):
    out = ask("--prompt", PROMPTS[0], *flags).out
    assert out == texts(model, PROMPTS[:1], *route)[0] + "\n" != texts(model)[0] + "\n"


def test_system_and_raw(ask, model):
    assert ask("--prompt", "yes", "--system", "no").out == texts(model, ["yes"], system="no")[0] + "\n"
    assert ask("--prompt", "yes", "--raw").out == texts(model, ["yes"], raw=True)[0] + "\n"


def test_a_file_of_prompts_and_a_file_of_answers(ask, model, tmp_path):
    rows = [{"prompt": PROMPTS[0]}, {"messages": [{"role": "user", "content": PROMPTS[1]}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask("--prompts_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / "out.jsonl"))
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in got] == texts(model)
    assert got[0]["prompt"] == PROMPTS[0] and got[1]["messages"] == rows[1]["messages"]
    for row in got:
        assert list(row["load"]) == ["0 math", "1 code", "2 math", "3 logic"]
        assert sum(row["load"].values()) == pytest.approx(1, abs=1e-3) and 1 <= row["new_tokens"] <= 6
        assert row["load"][f"{row['expert']} {NAMES[row['expert']]}"] == max(row["load"].values())


def test_an_analysis_is_printed_and_written_for_each_prompt(ask, tmp_path):
    out = ask("--prompt", *PROMPTS, "--analysis", "--output_dir", str(tmp_path / "new")).out
    assert out.count("layers that used it most") == 2 and out.count("Layers, answer") == 2
    for n in ("001", "002"):
        assert imread(tmp_path / f"new/analysis-{n}.png").shape[0] > 200
        figures = json.loads((tmp_path / f"new/analysis-{n}.json").read_text())
        assert figures["answer_text"] in out and figures["prompt"]
    quiet = ask("--prompt", "yes", "--output_dir", str(tmp_path / "two")).out
    assert "Layers" not in quiet and (tmp_path / "two/analysis-001.png").is_file()


def test_interactive_is_a_conversation(ask, model, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPTS[0]}\n/route off\n/regenerate\n".encode()))
    )
    got = ask("--interactive")
    assert (
        got.out == f"{texts(model)[0]}\n{texts(model, PROMPTS[:1], 'off')[0]}\n" and "base speaks" in got.err
    )


def test_the_seeds_names_of_weights_mean_the_folder(adapter, model, capsys):
    argv = [
        "generate",
        "--srde_weights",
        str(adapter / "srde_weights.pt"),
        "--prompt",
        "yes",
        "--max_new_tokens",
        "6",
    ]
    assert main(argv) == 0
    assert capsys.readouterr().out == texts(model, ["yes"])[0] + "\n"


def test_an_exported_model_is_asked_like_its_adapter(adapter, ask, tmp_path, capsys):
    argv = ["--prompt", *PROMPTS, "--max_new_tokens", "6"]
    export_sardine(Source(str(adapter)), tmp_path / "model")
    for flags in ([], ["--base"], ["--route", "math"], ["--expert", "3"], ["--show_routing"], ["--analysis"]):
        want = ask("--prompt", *PROMPTS, *flags).out
        assert main(["generate", "--adapter", str(tmp_path / "model"), *argv, *flags]) == 0
        assert capsys.readouterr().out == want


@pytest.mark.quant
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_answers(ask, kind):
    assert ask("--prompt", "yes", "--quantization", kind, "--show_routing").out.startswith("[")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a", "--adapter", "/nowhere"], "adapter='/nowhere': it must be a folder or hub id"),
        (["--prompt", "a", "--adapter", "no/where"], "adapter='no/where': it must be a folder or hub id"),
        (["--prompt", "a", "--quantization", "int3"], "quantization='int3': it must be none, nf4 or int8"),
        (["--prompt", "a", "--quantization", "nf4", "--device", "cpu"], "device='cpu': where quantised weights go"),
        ([], "prompt=None: there is nothing to answer. use --prompt, --prompts_file or --interactive."),
        (["--prompt", "a", "--prompts_file", "b"], "prompts_file='b': it cannot be used with --prompt"),
        (["--interactive", "--prompt", "a"], "prompt=['a']: it cannot be used with --interactive"),
        (["--prompt", "a", "--raw", "--system", "b"], "system='b': it cannot be used with --raw"),
        (["--prompt", "a", "--stream", "--batch_size", "2"], "batch_size=2: it cannot be used with --stream"),
        (["--prompt", "a", "--stream", "--num_beams", "2"], "num_beams=2: beam search knows its text only at the end"),
        (["--prompt", "a", "--num_beams", "2", "--temperature", "1"], "num_beams=2: beam search looks for the likeliest"),
        (["--prompt", "a", "--top_p", "0.9"], "top_p=0.9: it is for drawn tokens"),
        (["--prompt", "a", "--base", "--expert", "1"], "base=True: it cannot be used with --route or --expert"),
        (["--prompt", "a", "--base", "--analysis"], "analysis='off': the base has no experts to look at"),
        (["--prompt", "a", "--route", "b", "--expert", "1"], "route and expert=('b', '1'): they exclude each other"),
        (["--prompt", "a", "--route", "maths"], "expert='maths': the adapter's experts are numbered 0 to 3, named math"),
        (["--prompt", "a", "--device", "nothing"], "device='nothing': this torch cannot use it"),
        (["--prompt", "a", "--batch_size", "-1"], "batch_size=-1: a batch has at least 1 prompt"),
        (["--prompt", "a", "--tempurature", "1"], "srde generate has no such flag. the nearest is --temperature"),
        (["--prompt", "a", "--output_file", "/nowhere/a.jsonl"], "it cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_exit_1(ask, argv, message):
    assert message in ask(*argv, status=1).err.strip().splitlines()[-1]
