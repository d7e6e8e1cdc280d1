"""Whether lm-evaluation-harness gives the same scores through srde as it gives by itself: item by item, on a real model.

    python benchmarks/lm_eval_parity.py --adapter runs/mine

Claims, each for every item of every task (prompts, answers, log-likelihoods and scores; equal, not close):

- the base of `run_tasks(..., compare_baseline=True)` is what `lm_eval --model hf --model_args pretrained=BASE` says;
- so is `lm_eval --model srde --model_args adapter=A,route=off`;
- `lm_eval --model srde --model_args adapter=A` is the `srde` of `run_tasks`, and differs from the base.

The tasks are lm-eval's own definitions. Their data sets come from a stand-in hub on this machine, under their real names and
in their real columns: real questions where `--data` holds them, else invented ones. So few questions say little about a model;
that the scores are the same is the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

import hub_rows  # noqa: E402
from hub_files import as_parquet  # noqa: E402
from srde.quickstart.default_model import default_model  # noqa: E402
from standin_hub import StandInHub  # noqa: E402

Row = dict[str, Any]
OURS = """
import json, sys
from srde.eval.harness import run_tasks, save_tasks
from srde.tuner.loading import load_adapter
adapter, base, dtype, tasks, limit, batch_size, out = sys.argv[1:]
result = run_tasks(
    *load_adapter(adapter, dtype, base), tasks.split(","), limit=int(limit), batch_size=int(batch_size), compare_baseline=True
)
save_tasks(result, out)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", required=True, help="folder that srde train wrote")
    parser.add_argument("--model_name", default=None, help="its base (default: the quickstart's model)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--limit", type=int, default=40, help="items of each multiple-choice task")
    parser.add_argument("--gsm8k_limit", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/lm_eval_parity.json")
    args = parser.parse_args()
    args.model_name = args.model_name or str(default_model())
    real = args.data.is_dir()
    print(f"questions: {args.data if real else 'invented'}")
    lines = []
    with StandInHub() as hub, tempfile.TemporaryDirectory() as home:
        for repo in SETS:
            hub.add(repo, files_of(repo, args.data if real else None))
        environment = hub.environment(Path(home), TOKENIZERS_PARALLELISM="false")
        for tasks, limit in ((["arc_easy", "piqa", "winogrande"], args.limit), (["gsm8k"], args.gsm8k_limit)):
            lines += compared(args, tasks, limit, Path(home) / tasks[0], environment)
    for line in lines:
        print(json.dumps(line))
    report = {
        "command": f"python benchmarks/lm_eval_parity.py --adapter A --dtype {args.dtype} --limit {args.limit} "
        f"--gsm8k_limit {args.gsm8k_limit} --batch_size {args.batch_size}",
        "model": Path(args.model_name).name,
        "questions": "real" if real else "invented",
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers", "peft", "srde")},
        "tasks": lines,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    if not all(line[claim] for line in lines for claim in CLAIMS):
        sys.exit("a claim does not hold")


CLAIMS = (
    "base: run_tasks equals --model hf",
    "base: --model srde route=off equals --model hf",
    "adapter: --model srde equals run_tasks",
    "adapter: differs from the base",
)


def compared(
    args: argparse.Namespace, tasks: list[str], limit: int, out: Path, environment: dict[str, str]
) -> Iterator[Row]:
    """Runs the tasks four times over, and compares what lm-eval wrote of each item."""
    named = {
        "hf": ["--model", "hf", "--model_args", f"pretrained={args.model_name},dtype={args.dtype}"],
        "off": ["--model", "srde", "--model_args", f"{own_arguments(args)},route=off"],
        "on": ["--model", "srde", "--model_args", own_arguments(args)],
    }
    settings = ["--tasks", ",".join(tasks), "--limit", str(limit), "--batch_size", str(args.batch_size)]
    commands = {
        name: [
            *[sys.executable, "-m", "lm_eval", *model, *settings],
            *["--log_samples", "--output_path", str(out / name / "results.json")],
        ]
        for name, model in named.items()
    }
    ours = [args.adapter, args.model_name, args.dtype, ",".join(tasks), str(limit), str(args.batch_size)]
    commands["ours"] = [sys.executable, "-c", OURS, *ours, str(out / "ours")]
    for name, command in commands.items():
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        print(f"{','.join(tasks)}: {name}: {time.perf_counter() - start:.0f} s")
    scores = {line["task"]: line for line in json.loads((out / "ours/comparison.json").read_text())[::-1]}
    for task in tasks:
        hf, off, on, base, srde = (
            samples(out / folder, task) for folder in ("hf", "off", "on", "ours/base", "ours/srde")
        )
        first = scores[task]
        differing = len(
            {one["doc_id"] for one, other in zip(srde, base, strict=True) if one["resps"] != other["resps"]}
        )
        yield {
            "task": task,
            "items": first["items"],
            CLAIMS[0]: base == hf,
            CLAIMS[1]: off == hf,
            CLAIMS[2]: on == srde,
            CLAIMS[3]: differing > 0,
            "items whose responses differ from the base's": differing,
            **{
                key: first[key]
                for key in ("metric", "filter", "base", "srde", "difference", "stderr", "interval")
            },
        }


def own_arguments(args: argparse.Namespace) -> str:
    return f"adapter={args.adapter},base={args.model_name},dtype={args.dtype}"


def samples(folder: Path, task: str) -> list[Row]:
    (file,) = folder.glob(f"samples_{task}_*.jsonl")
    return json_lines(file)


def json_lines(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:  # `splitlines` would also end lines inside a text
        return [json.loads(line) for line in lines]


def arc_easy(row: Row) -> Row:
    question, options = choices(row)
    labels = [chr(ord("A") + i) for i in range(len(options))]
    text_label = {"text": options, "label": labels}
    return {"id": row["id"], "question": question, "choices": text_label, "answerKey": row["answer"]}


def gsm8k(row: Row) -> Row:
    steps = row["response"].rsplit("\n", 1)[0]
    question = row["prompt"].rsplit("\n\n", 1)[0]
    return {"question": question, "answer": f"{steps}\n#### {row['answer']}"}


def piqa(row: Row) -> Row:
    question, (one, two) = choices(row)
    goal = question.split("\n\n")[0].removeprefix("Goal: ")
    return {"goal": goal, "sol1": one, "sol2": two, "label": "AB".index(row["answer"])}


def winogrande(row: Row) -> Row:
    question, (one, two) = choices(row)
    answer = {"A": "1", "B": "2"}[row["answer"]]
    return {"sentence": question.split("\n\n")[0], "option1": one, "option2": two, "answer": answer}


def choices(row: Row) -> tuple[str, list[str]]:
    """The question and the options of a row, whose prompt holds both."""
    question, rest = row["prompt"].split("\n\nOptions:\n")
    options = rest.split("\n\nAnswer with")[0]
    return question, [line[3:] for line in options.split("\n")]


# Data set -> configuration, lm-eval's split with the questions, source in `--data`, its file's beginning, converter
SETS: dict[str, tuple[str, str, str, str, Callable[[Row], Row]]] = {
    "allenai/ai2_arc": ("ARC-Easy", "test", "arc_easy", "science", arc_easy),
    "baber/piqa": ("default", "validation", "piqa", "abstract", piqa),
    "allenai/winogrande": ("winogrande_xl", "validation", "winogrande", "abstract", winogrande),
    "openai/gsm8k": ("main", "test", "gsm8k", "math", gsm8k),
}


def files_of(repo: str, data: Path | None) -> dict[str, bytes]:
    """The files of a data set's repository: all splits invented, then those that lm-eval asks for with real rows."""
    files = hub_rows.build_files(repo, 100, seed=0)
    if data is None:
        return files
    config, split, source, domain, convert = SETS[repo]
    for file in hub_rows.REPOSITORIES[repo].files:
        part = {split: "test", "train": "train"}.get(file.split)
        if file.config != config or part is None:
            continue
        read = json_lines(data / f"{domain}.{part}.jsonl")
        if rows := [convert(row) for row in read if row["source"] == source]:
            files[file.path] = as_parquet(rows, file.columns)
    return files


if __name__ == "__main__":
    main()
