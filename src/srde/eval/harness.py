"""Tasks of lm-evaluation-harness on an adapter and on its base: the same items, lm-eval's own scores, paired differences.

lm-eval loads the tasks, builds the prompts and scores the answers; nothing of that is done here. It is an extra,
`pip install srde[lm_eval]`. Its data sets come from the Hugging Face hub, or from the cache where there is no network.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srde.artifacts.folder import atomic_folder
from srde.errors import ArtifactError, ConfigError, UsageError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEVEL = 0.95  # of the intervals
PARTS = ("srde", "base")
KIND = "lm-eval results"
COMPARISON = "comparison.json"
Results = dict[str, Any]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 8,
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
    compare_baseline: bool = False,
    log_samples: bool = True,
) -> Results:
    """Runs lm-eval's tasks on a loaded model, and if asked on its base, which is the same model inside `disable_adapter()`.

    Args:
        model: A causal language model, as a rule with an srde adapter. Routing that is forced around the call holds for ``srde``.
        tokenizer: Its tokenizer.
        tasks: Names of lm-eval's tasks, groups or tags, with wildcards if wanted ("mmlu_*"); `lm_eval ls tasks` has them.
        include_path: A folder with more task definitions (YAML).
        num_fewshot: Examples before each question; None keeps each task's own number.
        limit: Only the first items of each task: a number, or a share below 1.
        batch_size: Sequences per forward: a number, "auto" or "auto:N".
        apply_chat_template: Whether prompts are wrapped in the tokenizer's chat template; examples become turns of it.
        confirm_run_unsafe_code: Whether tasks may run code that the model wrote. **lm-eval runs it in plain child processes,
            contained by nothing.**
        compare_baseline: Whether the base is measured as well.
        log_samples: Whether the result holds every item's prompt, answer and scores.

    Returns:
        ``srde`` and, if asked, ``base``: what `lm_eval.simple_evaluate` returned, unchanged. ``comparison``: what `compare` says
        of the two; empty without the base. ``chat_template``: the one applied, or None.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or runs code and that was not confirmed.
        DataError: A task's data set cannot be loaded.
        UsageError: The base is asked for and the model has no adapter.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError.of(
            "tasks", list(tasks), rule="they need the package lm_eval, which is not installed",
            fix="run `pip install srde[lm_eval]`",
        )  # fmt: skip
    if compare_baseline and not hasattr(model, "disable_adapter"):
        raise UsageError.of(
            "compare_baseline", True, rule="the model has no adapter to switch off", fix="run it without"
        )
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError.of(
            "include_path",
            str(include_path),
            rule="there is no such folder",
            fix="name a folder of YAML files",
        )
    from lm_eval import simple_evaluate

    from srde.eval.lm_eval_model import SrdeLM, SrdeTasks
    from srde.infer.route import OFF

    manager = SrdeTasks(include_path and str(include_path), confirm_run_unsafe_code)
    names = task_names(tasks, manager.all_tasks)
    template = tokenizer.chat_template if apply_chat_template else None
    result: Results = {"comparison": [], "chat_template": template}
    for part, route in zip(PARTS, (None, OFF), strict=True):
        if part == "base" and not compare_baseline:
            continue
        result[part] = simple_evaluate(
            model=SrdeLM(model, route=route, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(names),
            task_manager=manager,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit,
            log_samples=log_samples or compare_baseline,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
    if compare_baseline:
        result["comparison"] = compare(result["srde"], result["base"])
    if not log_samples:
        for part in PARTS:
            result.get(part, {}).pop("samples", None)
    return result


def task_names(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """The tasks that names and wildcards mean, each once.

    Raises:
        ConfigError: A name means none, or none was given.
    """
    found: dict[str, None] = {}
    for name in wanted:
        matched = [name] if name in known else sorted(fnmatch.filter(known, name))
        if not matched:
            close = difflib.get_close_matches(name, known, n=3)
            raise ConfigError.of(
                "task", name, rule="lm-eval has no such task",
                fix=f"the nearest are {', '.join(close)}" if close else "`lm_eval ls tasks` lists them",
            )  # fmt: skip
        found |= dict.fromkeys(matched)
    if not found:
        raise ConfigError.of("tasks", list(wanted), rule="at least one is needed", fix="name a task")
    return list(found)


def compare(srde: Results, base: Results) -> list[dict[str, Any]]:
    """Each task's metrics on both, and their difference over the same items.

    Args:
        srde: lm-eval's results with samples.
        base: Those of the base on the same items.

    Returns:
        Per task, metric and filter: ``base``, ``srde``, ``difference``, ``items``; and ``stderr`` of the difference with a 95 %
        ``interval`` (Student's t), from the differences item by item. These two are None where the metric is no mean over items
        (perplexity, F1 of a corpus, a group of tasks) or there are fewer than two items.

    Raises:
        UsageError: The two have not run on the same items.
    """
    lines = []
    for task, metrics in srde["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            other = base["results"].get(task, {}).get(key)
            if not comma or metric.endswith("_stderr") or not _is_number(value) or not _is_number(other):
                continue
            pairs = list(_paired(task, metric, kind, srde, base))
            line = {"task": task, "metric": metric, "filter": kind, "items": len(pairs)}
            line |= {
                "base": other,
                "srde": value,
                "difference": value - other,
                "stderr": None,
                "interval": None,
            }
            if len(pairs) > 1 and _are_means(pairs, value, other):
                line |= _spread([mine - its for mine, its in pairs])
            lines.append(line)
    return lines


def _paired(task: str, metric: str, kind: str, srde: Results, base: Results) -> Iterator[tuple[Any, Any]]:
    """The values of srde and base for each item; none for a group, which has no items of its own."""
    mine, its = (
        {
            (sample["doc_id"], sample["doc_hash"]): sample[metric]
            for sample in results["samples"].get(task, ())
            if sample["filter"] == kind and metric in sample
        }
        for results in (srde, base)
    )
    if mine.keys() != its.keys():
        raise UsageError.of(
            "task",
            task,
            rule="srde and base have not run on the same items",
            fix="run both with the same settings",
        )
    return ((value, its[item]) for item, value in mine.items())


def _are_means(pairs: list[tuple[Any, Any]], srde: float, base: float) -> bool:
    """Whether the task's value is the mean of the items', for both: then, and only then, do paired differences say its error."""
    return all(
        all(_is_number(value) for value in values)
        and math.isclose(statistics.fmean(values), whole, abs_tol=1e-9)
        for values, whole in zip(zip(*pairs, strict=True), (srde, base), strict=True)
    )


def _spread(differences: list[float]) -> dict[str, Any]:
    from scipy.stats import t

    count, mean = len(differences), statistics.fmean(differences)
    stderr = statistics.stdev(differences) / math.sqrt(count)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * stderr
    return {"stderr": stderr, "interval": [mean - half, mean + half]}


def _is_number(value: object) -> bool:
    """Also for booleans and numpy's; lm-eval writes "N/A" where it has none."""
    return isinstance(value, int | float) or (hasattr(value, "dtype") and getattr(value, "shape", None) == ())


def save_tasks(result: Results, folder: str | Path) -> list[Path]:
    """Writes what `run_tasks` gave: `srde/` and `base/` in lm-eval's own format (`results_*.json`, and `samples_*.jsonl` if
    samples were kept), and `comparison.json`. A folder that this wrote before is replaced whole.

    Returns:
        The files.

    Raises:
        UsageError: The folder holds something else.
        ArtifactError: lm-eval could not write, or the disk is full.
    """
    with atomic_folder(folder, {"kind": KIND}) as temporary:
        for part in PARTS:
            if part in result:
                _save_part(result[part], result["chat_template"], temporary / part)
        if result["comparison"]:
            text = json.dumps(result["comparison"], indent=2)
            (temporary / COMPARISON).write_text(text + "\n", encoding="utf-8")
    return sorted(path for path in Path(folder).rglob("*.json*") if path.name != "MANIFEST.json")


def _save_part(results: Results, chat_template: str | None, folder: Path) -> None:
    """Lets lm-eval write one of the two, and looks whether it did: it only logs what goes wrong."""
    from lm_eval.loggers import EvaluationTracker

    results = dict(results)  # lm-eval writes into what it saves
    samples = {task: [dict(sample) for sample in rows] for task, rows in results.pop("samples", {}).items()}
    tracker = EvaluationTracker(
        output_path=str(folder / "results.json")
    )  # so that it adds no folder of its own
    tracker.general_config_tracker.log_experiment_args(
        model_source="srde",
        model_args={"model": results["config"]["model"]},
        system_instruction=None,
        chat_template=chat_template,
        fewshot_as_multiturn=chat_template is not None,
    )
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    lines = {
        path.name: path.read_text(encoding="utf-8").count("\n") for path in folder.glob("samples_*.jsonl")
    }
    written = sorted(lines.values()) == sorted(len(rows) for rows in samples.values())
    if not written or not _is_whole(next(iter(folder.glob("results_*.json")), None)):
        raise ArtifactError.of(
            "folder", str(folder.parent), rule="lm-eval could not write its results",
            fix="see its log: it says why with LMEVAL_LOG_LEVEL=INFO",
        )  # fmt: skip


def _is_whole(path: Path | None) -> bool:
    return path is not None and path.read_text(encoding="utf-8").rstrip().endswith("}")


def tasks_table(result: Results) -> Table:
    """The table that `srde eval --tasks` prints: a line per task and metric."""
    from rich.table import Table

    pairs = "base" in result
    table = Table(title="lm-eval tasks: base and srde" if pairs else "lm-eval tasks")
    for name in ("task", "metric", "filter"):
        table.add_column(name)
    for name in (
        "items",
        *(("base", "srde", "difference", "95 % interval") if pairs else ("srde", "stderr")),
    ):
        table.add_column(name, justify="right", style="bold" if name == "srde" else None)
    if pairs:
        for line in result["comparison"]:
            low_high = line["interval"]
            table.add_row(
                line["task"], line["metric"], line["filter"], str(line["items"] or "-"),
                f"{line['base']:.4f}", f"{line['srde']:.4f}", f"{line['difference']:+.4f}",
                f"{low_high[0]:+.4f} to {low_high[1]:+.4f}" if low_high else "-",
            )  # fmt: skip
        return table
    counts = result["srde"]["n-samples"]
    for task, metrics in result["srde"]["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and _is_number(value):
                error = metrics.get(f"{metric}_stderr,{kind}")
                items = str(counts[task]["effective"]) if task in counts else "-"
                spread = f"{error:.4f}" if _is_number(error) else "-"
                table.add_row(task, metric, kind, items, f"{value:.4f}", spread)
    return table
