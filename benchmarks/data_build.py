"""Speed and memory of `srde data build`, against a bare `datasets.map` tokenisation of the same texts.

    python benchmarks/data_build.py                      # speed: 100,000 rows, 3 repeats
    python benchmarks/data_build.py --memory             # peak memory: 1,000,000 rows

Claims: the whole build (reading, converting, cleaning, templates, tokenising, duplicates, decontamination, balance, packing,
writing) handles at least 0.7 times the tokens per second of the bare tokenisation, and stays below 1.5 GB.

Both are whole commands in processes of their own, with the same tokenizer and number of processes, one after the other in
turn; the ratio is that of the medians. The bare one reads texts that are rendered already and writes nothing but ids. Memory is
that of all processes together, what they share counted once (PSS), sampled every 0.1 s.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from srde.data.domains import DOMAINS
from srde.quickstart.default_model import default_model

BARE = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
model, file, cache, processes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
rows = load_dataset("json", data_files=file, split="train", cache_dir=cache)
out = rows.map(
    lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]},
    batched=True, num_proc=int(processes), remove_columns=rows.column_names, load_from_cache_file=False,
)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--rows", type=int, help="rows of the file (default: 100,000; with --memory 1,000,000)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of speed")
    parser.add_argument("--model_name", default=None, help="default: the quickstart's model")
    parser.add_argument(
        "--output", default="benchmarks/results/data_build.jsonl", help="one line is added per run"
    )
    args = parser.parse_args()
    args.rows = args.rows or (1_000_000 if args.memory else 100_000)
    args.model_name = args.model_name or str(default_model())
    with tempfile.TemporaryDirectory() as scratch:
        measured = (memory if args.memory else speed)(Path(scratch), args)
    measured = {"rows": args.rows, "num_proc": args.num_proc, "cpu_count": os.cpu_count(), **measured}
    print(json.dumps(measured, indent=2))
    with open(args.output, "a", encoding="utf-8") as log:
        log.write(json.dumps(measured) + "\n")


def speed(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both, in turn, and the tokens that each has handled."""
    rows, tests, texts = scratch / "rows.jsonl", scratch / "tests.jsonl", scratch / "texts.jsonl"
    make_rows(rows, args.rows, args.model_name, seed=0)
    make_rows(tests, 2000, args.model_name, seed=1)
    tokens = render(rows, texts, args.model_name)
    builds, bares = [], []
    for repeat in range(args.repeats):
        work = scratch / "work"
        builds.append(timed(build_command(args, rows, tests, work)))
        report = json.loads((work / "tokenized/report.json").read_text())
        shutil.rmtree(work)
        cache = scratch / "cache"
        bares.append(
            timed([sys.executable, "-c", BARE, args.model_name, str(texts), str(cache), str(args.num_proc)])
        )
        shutil.rmtree(cache)
        print(f"{repeat + 1}/{args.repeats}: build {builds[-1]:.1f} s, bare {bares[-1]:.1f} s", flush=True)
    ratio = statistics.median(bares) / statistics.median(builds)
    train = report["splits"]["train"]
    return {
        "measured": "speed", "tokens": tokens, "used": train["examples"], "filled": train["filled"], "build_seconds": builds,
        "bare_seconds": bares, "tokens_per_second": tokens / statistics.median(builds), "ratio": ratio,
    }  # fmt: skip


def memory(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The most memory that the build and its processes have at any moment."""
    rows, tests = scratch / "rows.jsonl", scratch / "tests.jsonl"
    make_rows(rows, args.rows, args.model_name, seed=0)
    make_rows(tests, 2000, args.model_name, seed=1)
    start = time.monotonic()
    process = subprocess.Popen(build_command(args, rows, tests, scratch / "work"))
    peak_shared, peak_each = 0, 0
    while process.poll() is None:
        together = 0
        with contextlib.suppress(psutil.Error):
            for one in [(whole := psutil.Process(process.pid)), *whole.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    info = one.memory_full_info()
                    together += info.pss
                    peak_each = max(peak_each, info.rss)
        peak_shared = max(peak_shared, together)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit("the build failed")
    return {
        "measured": "memory", "file_mb": rows.stat().st_size / 1e6, "seconds": time.monotonic() - start,
        "peak_mb_all_processes": peak_shared / 1e6, "peak_mb_one_process": peak_each / 1e6,
    }  # fmt: skip


def build_command(args: argparse.Namespace, rows: Path, tests: Path, work: Path) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "srde",
        "data",
        "build",
        "--sources",
        str(rows),
        "--eval_sources",
        str(tests),
    ]
    command += ["--model_name", args.model_name, "--work_dir", str(work), "--num_proc", str(args.num_proc)]
    return [*command, "--examples_per_domain", str(args.rows)]


def timed(command: list[str]) -> float:
    """Seconds of a whole command."""
    start = time.monotonic()
    subprocess.run(
        command,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    return time.monotonic() - start


def make_rows(file: Path, count: int, model: str, seed: int) -> None:
    """Rows of words as frequent as in real text (Zipf), 20 to 250 to a row: about 170 tokens each."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    words = [
        token[1:]
        for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])
        if token[0] == "Ġ" and token[1:].isalpha()
    ]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    sums = list(itertools.accumulate(weights))
    rng = random.Random(seed)
    with file.open("w", encoding="utf-8") as sink:
        for number in range(count):
            drawn = rng.choices(words, cum_weights=sums, k=rng.randrange(20, 250))
            cut = len(drawn) * 2 // 3
            row = {"domain": DOMAINS[number % 6], "source": f"made_{number % 9}", "id": f"{seed}-{number}"}
            row |= {"prompt": _sentences(drawn[:cut]), "response": _sentences(drawn[cut:])}
            sink.write(json.dumps(row) + "\n")


def render(rows: Path, texts: Path, model: str) -> int:
    """The rows as the template renders them; returns their tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = 0
    with rows.open(encoding="utf-8") as source, texts.open("w", encoding="utf-8") as sink:
        for line in source:
            row = json.loads(line)
            turns = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            tokens += len(tokenizer(text)["input_ids"])
            sink.write(json.dumps({"text": text}) + "\n")
    return tokens


def _sentences(words: list[str]) -> str:
    return " ".join(f"{' '.join(words[at : at + 12])}." for at in range(0, len(words), 12))


if __name__ == "__main__":
    main()
