"""lm-evaluation-harness: its scores of the base are ours, to the item; adapters, routes, errors, files, and being found."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import json
import math
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from random import Random

import lm_eval
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from peft import get_peft_model
from rich.console import Console

import hub_makers
import hub_rows
import srde
from srde import SrdeConfig
from srde.errors import ArtifactError, ConfigError, DataError, UsageError
from srde.eval import harness
from srde.eval.harness import compare, run_tasks, save_tasks, task_names, tasks_table
from srde.eval.lm_eval_model import SrdeLM
from srde.tuner.loading import load_adapter
from srde.tuner.store import save_adapter
from standin_hub import StandInHub
from tiny import VOCABULARY, save_tiny, tiny, tiny_tokenizer

ITEMS, NEW_TOKENS = 6, 12
# Our task -> lm-eval's definition that it includes, and the maker of its rows
TASKS = {
    "local_arc_easy": ("arc/arc_easy.yaml", hub_makers.arc),
    "local_gsm8k": ("gsm8k/gsm8k.yaml", hub_makers.gsm8k),
    "local_sciq": ("sciq/sciq.yaml", hub_makers.sciq),
}
SOURCE = Path(srde.__file__).parents[1]
HUB = ("allenai/ai2_arc", "openai/gsm8k", "allenai/sciq", "baber/piqa", "allenai/winogrande")
NAMES = ["arc_easy", "gsm8k", "piqa", "sciq", "winogrande"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "changed", std=0.5)


def make_adapter(base, folder, std):
    """An adapter whose deltas are drawn anew; with `std` 0 they are nothing."""
    from srde.tuner.loading import load_base

    config = SrdeConfig(num_experts=4, target_sparsity=0.05, expert_names=["math", "math", "code", "law"])
    model = get_peft_model(load_base(base), config)
    torch.manual_seed(0)
    for layer in model.srde.layers.values():
        torch.nn.init.normal_(layer.srde_experts["default"].values, std=std)
    save_adapter(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """lm-eval's own definitions on local files: only the name and the place of the rows are ours."""
    folder = tmp_path_factory.mktemp("tasks")
    definitions = Path(lm_eval.__file__).parent / "tasks"
    for name, (definition, maker) in TASKS.items():
        rng = Random(name)
        for split in ("train", "test"):
            lines = [json.dumps(maker(rng)) for _ in range(ITEMS)]
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n")
        files = {split: str(folder / f"{name}.{split}.jsonl") for split in ("train", "test")}
        own = {"include": str(definitions / definition), "task": name, "dataset_path": "json"}
        own |= {"dataset_name": None, "dataset_kwargs": {"data_files": files}, "validation_split": None}
        if name == "local_gsm8k":
            own |= {"num_fewshot": 1, "generation_kwargs": {"until": ["Question:"], "do_sample": False}}
            own["generation_kwargs"] |= {"temperature": 0.0, "max_gen_toks": NEW_TOKENS}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_tasks_only(tmp_path_factory):
    """Reading all the definitions of lm-eval takes seconds. Data sets are cached below the test's folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def own(base, tasks):
    """What lm-eval itself says of the base."""
    return simple_evaluate(
        model="hf",
        model_args={"pretrained": base},
        tasks=list(TASKS),
        batch_size=4,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks)),
    )


@pytest.fixture(scope="module")
def ran(adapter, tasks):
    model, tokenizer = load_adapter(adapter)
    return run_tasks(model, tokenizer, list(TASKS), include_path=tasks, batch_size=4, compare_baseline=True)


def test_the_bases_scores_are_lm_evals_own_to_the_item(own, ran):
    assert set(own["samples"]) == set(TASKS)
    for task in TASKS:
        theirs, ours = own["samples"][task], ran["base"]["samples"][task]
        assert len(theirs) == (2 * ITEMS if task == "local_gsm8k" else ITEMS)  # gsm8k has two filters
        assert ours == theirs  # prompts, answers, log-likelihoods and scores: equal, not close
    assert ran["base"]["results"] == own["results"]


def test_an_adapter_changes_what_lm_eval_sees(ran):
    for task in TASKS:
        base, mine = (ran[part]["samples"][task] for part in ("base", "srde"))
        assert all(one["resps"] != other["resps"] for one, other in zip(base, mine, strict=True)), task
        assert [one["doc_hash"] for one in base] == [one["doc_hash"] for one in mine]


def test_an_adapter_of_nothing_scores_as_its_base(base, tasks, ran, tmp_path):
    model, tokenizer = load_adapter(make_adapter(base, tmp_path / "nothing", std=0.0))
    result = run_tasks(model, tokenizer, list(TASKS), include_path=tasks, batch_size=4)
    assert result["srde"]["samples"] == ran["base"]["samples"]
    assert "base" not in result and result["comparison"] == []


def results_of(values, aggregated, hashes=None):
    """lm-eval's results, as far as `compare` reads them."""
    hashes = hashes or [f"hash {i}" for i in range(len(values))]
    samples = [
        {"doc_id": i, "doc_hash": h, "filter": "none", "acc": value}
        for i, (value, h) in enumerate(zip(values, hashes, strict=True))
    ]
    results = {"t": {"alias": "t", "sample_len": len(values), "acc,none": aggregated, "acc_stderr,none": 0.1}}
    return {"results": results, "samples": {"t": samples}}


def test_differences_are_paired_item_by_item():
    mine, its = results_of([1, 1, 0, 1, 1], 0.8), results_of([0, 1, 0, 0, 1], 0.4)
    its["samples"]["t"].reverse()  # matched by item, not by place
    (line,) = compare(mine, its)
    differences = [1, 0, 0, 1, 0]
    mean = sum(differences) / 5
    stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / 4 / 5)
    assert (line["task"], line["metric"], line["filter"], line["items"]) == ("t", "acc", "none", 5)
    assert (line["srde"], line["base"]) == (0.8, 0.4)
    assert line["difference"] == pytest.approx(0.4) and line["stderr"] == pytest.approx(stderr)
    half = 2.776445 * stderr  # Student's t with 4 degrees of freedom
    assert line["interval"] == pytest.approx([0.4 - half, 0.4 + half])


def test_no_error_is_claimed_where_a_metric_is_no_mean_over_items():
    (line,) = compare(results_of([1, 1, 0, 1], 0.7), results_of([1, 0, 0, 0], 0.25))
    assert line["difference"] == pytest.approx(0.45) and line["stderr"] is line["interval"] is None
    (line,) = compare(results_of([1], 1.0), results_of([0], 0.0))
    assert line["difference"] == 1 and line["stderr"] is None
    perplexity = results_of([(-3.0, 2), (-4.0, 3)], 4.1), results_of([(-3.0, 2), (-4.0, 2)], 4.3)
    assert compare(*perplexity)[0]["interval"] is None
    assert compare(results_of([1, 0], "N/A"), results_of([1, 0], "N/A")) == []


def test_other_items_are_not_compared():
    with pytest.raises(UsageError, match="have not run on the same items"):
        compare(results_of([1, 0], 0.5), results_of([1, 0], 0.5, hashes=["hash 0", "another"]))


def test_the_comparison_is_of_the_very_results(ran):
    assert [(line["task"], line["filter"]) for line in ran["comparison"] if line["metric"] != "acc_norm"] == [
        ("local_arc_easy", "none"), ("local_gsm8k", "strict-match"), ("local_gsm8k", "flexible-extract"),
        ("local_sciq", "none"),
    ]  # fmt: skip
    for line in ran["comparison"]:
        key = f"{line['metric']},{line['filter']}"
        assert line["base"] == ran["base"]["results"][line["task"]][key]
        assert line["srde"] == ran["srde"]["results"][line["task"]][key]
        assert line["items"] == ITEMS and line["interval"][0] <= line["difference"] <= line["interval"][1]


def asked(lm):
    """The log-likelihoods of some continuations, and a generated text."""
    prompts = [("what is 1", " 2"), ("how many are there", " no")]
    scores = lm.loglikelihood([Instance("loglikelihood", {}, prompt, 0) for prompt in prompts], True)
    request = Instance("generate_until", {}, ("what is 3", {"until": ["?"], "max_gen_toks": NEW_TOKENS}), 0)
    return [score for score, _ in scores], lm.generate_until([request], True)


def test_routes_and_experts_are_what_the_model_does(adapter):
    model, tokenizer = load_adapter(adapter)
    as_routed = asked(SrdeLM(model, tokenizer=tokenizer, batch_size=2))
    with model.srde.force_experts(3):
        expert_3 = asked(SrdeLM(model, tokenizer=tokenizer, batch_size=2))
    with model.srde.restrict_experts([0, 1]):
        maths = asked(SrdeLM(model, tokenizer=tokenizer, batch_size=2))
    with model.disable_adapter():
        base = asked(SrdeLM(model, tokenizer=tokenizer, batch_size=2))
    assert len({str(one) for one in (as_routed, expert_3, maths, base)}) == 4
    for settings, expected in [
        ({}, as_routed),
        ({"expert": 3}, expert_3),
        ({"route": 3}, expert_3),
        ({"route": "law"}, expert_3),
        ({"route": "math"}, maths),
        ({"route": "off"}, base),
    ]:
        by_name = SrdeLM.create_from_arg_obj(
            {"adapter": adapter} | settings, {"batch_size": 2, "device": "cpu"}
        )
        assert asked(by_name) == expected, settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"route": "biology"}, "expert='biology': the adapter's experts are numbered 0 to 3, named math, code, law"),
        ({"expert": 4}, "expert=4: the adapter's experts are numbered 0 to 3"),
        ({"expert": 1, "route": "off"}, "they exclude each other"),
        ({"max_len": 8}, "model_args='max_len': the model srde has no such argument. the nearest is max_length"),
        ({"peft": "x"}, "the adapter is named by adapter"),
        ({"device": "toaster"}, "device='toaster': torch knows no such device"),
        ({"adapter": None}, "adapter=None: the model srde needs a folder or hub id"),
    ],
    ids=["no such name", "no such expert", "both", "no such argument", "lm-eval's name", "device", "adapter"],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_refused(adapter, settings, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        SrdeLM(**({"adapter": adapter} | settings))


def test_one_of_several_processes_is_refused(adapter, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE='2': the model srde runs in one process"):
        SrdeLM(adapter)


def test_lm_evals_settings_reach_its_class(adapter):
    lm = SrdeLM(
        adapter, batch_size="auto:2", max_length=77, max_batch_size=5, prefix_token_id=9, dtype="bfloat16"
    )
    assert (lm.batch_size, lm.batch_schedule, lm.max_length, lm.max_batch_size) == ("auto", 2, 77, 5)
    assert lm.prefix_token_id == 9 and lm.get_model_info()["model_dtype"] == torch.bfloat16


def test_names_of_tasks():
    known = ["arc_challenge", "arc_easy", "gsm8k", "mmlu_anatomy", "mmlu_virology"]
    assert task_names(["gsm8k", "mmlu_*", "gsm8k"], known) == ["gsm8k", "mmlu_anatomy", "mmlu_virology"]
    with pytest.raises(
        ConfigError, match=r"task='arc_eazy': lm-eval has no such task\. the nearest are arc_easy"
    ):
        task_names(["gsm8k", "arc_eazy"], known)
    with pytest.raises(ConfigError, match="at least one is needed"):
        task_names([], known)


def test_what_cannot_run_is_told(adapter, tasks, tmp_path, monkeypatch):
    model, tokenizer = load_adapter(adapter)
    (tmp_path / "more").mkdir()
    definition = yaml.safe_load((tasks / "local_sciq.yaml").read_text())
    for name, own in {
        "runs_code": {"unsafe_code": True},
        "no_files": {"dataset_path": "nobody/nothing", "dataset_kwargs": None},
    }.items():
        (tmp_path / f"more/{name}.yaml").write_text(yaml.safe_dump(definition | own | {"task": name}))
    more = {"include_path": tmp_path / "more", "limit": 2}
    with pytest.raises(ConfigError, match="task='runs_code': it runs code that the model wrote"):
        run_tasks(model, tokenizer, ["runs_code"], **more)
    confirmed = run_tasks(model, tokenizer, ["runs_code"], confirm_run_unsafe_code=True, **more)
    assert confirmed["srde"]["n-samples"]["runs_code"]["effective"] == 2
    with pytest.raises(
        DataError, match=r"tasks=\['no_files'\]: a data set could not be loaded \(.*nobody/nothing"
    ):
        run_tasks(model, tokenizer, ["no_files"], **more)
    with pytest.raises(ConfigError, match="there is no such folder"):
        run_tasks(model, tokenizer, ["x"], include_path=tmp_path / "none")
    plain = tiny(vocab_size=VOCABULARY)
    with pytest.raises(UsageError, match="the model has no adapter to switch off"):
        run_tasks(plain, tiny_tokenizer(), ["x"], compare_baseline=True)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"the package lm_eval, which is not installed. run `pip install srde\[lm_eval\]`"
    ):
        run_tasks(model, tokenizer, ["x"])


def test_a_model_without_experts_and_without_samples(base, tasks, own):
    from srde.data.tokenizers import load_tokenizer
    from srde.tuner.loading import load_base

    result = run_tasks(
        load_base(base), load_tokenizer(base), ["local_sciq"], include_path=tasks, batch_size=4, log_samples=False
    )  # fmt: skip
    assert result["srde"]["results"]["local_sciq"] == own["results"]["local_sciq"]
    assert "samples" not in result["srde"]


@pytest.mark.slow
def test_a_chat_template_is_applied_and_few_shots_become_turns(adapter, tasks):
    model, tokenizer = load_adapter(adapter)
    settings = {"include_path": tasks, "limit": 1, "num_fewshot": 2, "apply_chat_template": True}
    result = run_tasks(model, tokenizer, ["local_sciq"], compare_baseline=True, log_samples=False, **settings)
    assert "samples" not in result["srde"] and len(result["comparison"]) == 2
    assert result["chat_template"] == tokenizer.chat_template
    (sample,) = run_tasks(model, tokenizer, ["local_sciq"], **settings)["srde"]["samples"]["local_sciq"]
    assert sample["arguments"][0][0].count("<|im_start|>user") == 3


def test_files_are_in_lm_evals_format(ran, tmp_path):
    before = copy.deepcopy(ran["comparison"])
    files = save_tasks(ran, tmp_path / "out")
    assert len([file for file in files if file.parent.name == "base"]) == 1 + len(TASKS)
    for part in ("srde", "base"):
        (aggregated,) = (tmp_path / "out" / part).glob("results_*.json")
        saved = json.loads(aggregated.read_text())
        assert saved["results"] == json.loads(json.dumps(ran[part]["results"], default=float))
        assert saved["model_source"] == "srde" and set(saved["task_hashes"]) == set(TASKS)
        for task in TASKS:
            (file,) = (tmp_path / "out" / part).glob(f"samples_{task}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
            assert [row["doc_hash"] for row in rows] == [
                row["doc_hash"] for row in ran[part]["samples"][task]
            ]
            assert "arg_0" in rows[0]["arguments"]["gen_args_0"]
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == before == ran["comparison"]
    assert isinstance(ran["base"]["samples"]["local_sciq"][0]["arguments"], list)  # the result is as it was
    assert save_tasks(ran, tmp_path / "out")  # a second time, in its place
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="files that srde did not write"):
        save_tasks(ran, tmp_path / "out")


def test_what_lm_eval_could_not_write_is_an_error(ran, tmp_path, monkeypatch):
    from lm_eval.loggers import evaluation_tracker

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_tracker, "sanitize_list", full)
    with pytest.raises(ArtifactError, match="lm-eval could not write its results"):
        save_tasks(ran, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table(ran):
    def shown(result):
        console = Console(width=140, record=True, file=io.StringIO())
        console.print(tasks_table(result))
        return console.export_text()

    text = shown(ran)
    line = ran["comparison"][0]
    assert f"{line['difference']:+.4f}" in text and f"to {line['interval'][1]:+.4f}" in text
    alone = shown({"srde": ran["srde"], "comparison": [], "chat_template": None})
    value = ran["srde"]["results"]["local_sciq"]
    assert f"{value['acc,none']:.4f}" in alone and f"{value['acc_stderr,none']:.4f}" in alone


def python(program, **options):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=110, **options
    )


def test_lm_eval_finds_the_model_though_nobody_imports_srde():
    program = f"""
import site, sys
site.addsitedir({str(SOURCE)!r})  # runs the .pth file there, as a start of Python does where srde is installed
from lm_eval.api.registry import get_model, model_registry
import lm_eval.models
assert "srde" in model_registry.keys() and "hf" in model_registry.keys()
assert not {{"srde", "torch"}} & set(sys.modules), "the name alone must cost nothing"
assert not any("srde" in type(finder).__module__ for finder in sys.meta_path), "the hook is gone when it has done its work"
"""
    done = python(program)
    assert done.returncode == 0, done.stderr


def test_the_start_of_python_imports_nothing_more():
    program = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
sys.modules.pop("_srde_lm_eval", None)
before = set(sys.modules)
import _srde_lm_eval
assert set(sys.modules) - before == {{"_srde_lm_eval"}}, set(sys.modules) - before
"""
    done = python(program)
    assert done.returncode == 0, done.stderr


def test_an_lm_eval_without_a_registry_is_left_alone(tmp_path):
    (tmp_path / "lm_eval/models").mkdir(parents=True)
    (tmp_path / "lm_eval/__init__.py").touch()
    (tmp_path / "lm_eval/models/__init__.py").write_text("MODELS = 3\n")
    program = f"import site, sys\nsite.addsitedir({str(SOURCE)!r})\nsys.path.insert(0, {str(tmp_path)!r})\n"
    done = python(program + "import lm_eval.models\nassert lm_eval.models.MODELS == 3")
    assert done.returncode == 0, done.stderr


def test_the_hook_is_part_of_what_pip_installs():
    names = {str(file) for file in importlib.metadata.files("srde")}
    assert {"_srde_lm_eval.pth", "_srde_lm_eval.py"} <= names


BOTH = """
import site, sys
site.addsitedir({source!r})
from lm_eval.__main__ import cli_evaluate
shared = ["--tasks", {names!r}, "--limit", "5", "--batch_size", "4", "--log_samples", "--device", "cpu"]
for model, arguments in (("hf", "pretrained={base}"), ("srde", "adapter={adapter},route=off")):
    sys.argv = ["lm_eval", "--model", model, "--model_args", arguments, *shared, "--output_path", f"{out}/{{model}}/r.json"]
    cli_evaluate()
from srde.eval.harness import run_tasks, save_tasks
from srde.tuner.loading import load_adapter
result = run_tasks(*load_adapter({adapter!r}), {names!r}.split(","), limit=5, batch_size=4, compare_baseline=True)
save_tasks(result, "{out}/ours")
"""


@pytest.mark.slow
def test_real_tasks_from_a_hub_score_alike_by_the_plain_command_and_by_ours(base, adapter, tmp_path):
    with StandInHub() as hub:
        for repo in HUB:
            hub.add(repo, hub_rows.build_files(repo, 8, seed=7))
        program = BOTH.format(
            source=str(SOURCE), base=base, adapter=adapter, out=str(tmp_path), names=",".join(NAMES)
        )
        done = python(program, env=hub.environment(tmp_path / "home", OMP_NUM_THREADS="1"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"srde ({{'adapter': '{adapter}', 'route': 'off'}})" in done.stdout
    for task in NAMES:
        hf, off, our_base, ours = (
            [
                json.loads(line)
                for file in folder.glob(f"samples_{task}_*")
                for line in file.read_text().split("\n")[:-1]
            ]
            for folder in (tmp_path / "hf", tmp_path / "srde", tmp_path / "ours/base", tmp_path / "ours/srde")
        )
        assert len(hf) == (10 if task == "gsm8k" else 5)
        assert hf == off == our_base != ours
