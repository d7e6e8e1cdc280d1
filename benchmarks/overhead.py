"""What experts cost in time and memory, against the frozen base and against LoRA.

    python benchmarks/overhead.py --model_name_or_path M --dtype bfloat16 --threads 2

One run times every variant by turns and measures the peak memory of each in a process of its own. It writes one JSON
file with all samples and one Markdown file with the medians.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from jobs import Job, decode, prefill, train
from measuring import peak_memory, time_by_turns
from srde.quickstart.default_model import default_model
from srde.tuner.loading import load_base
from tables import machine, markdown, summarize
from variants import build_variants, variant_names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model_name_or_path", help="hub id or folder; without it, the quickstart's SmolLM2-135M-Instruct"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; without it, PyTorch's own choice")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.01, 0.04])
    parser.add_argument(
        "--jobs",
        nargs="+",
        choices=("prefill", "decode", "train", "memory"),
        default=["prefill", "decode", "train", "memory"],
    )
    parser.add_argument(
        "--prompt_length", type=int, default=512, help="tokens of the prefill and of the context in decode"
    )
    parser.add_argument("--decode_batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--decode_tokens", type=int, default=8, help="tokens per sample of decode")
    parser.add_argument("--per_device_train_batch_size", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=512, help="tokens per row of the training step")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory_of", metavar="VARIANT", help=argparse.SUPPRESS)  # how a run calls itself
    return parser.parse_args()


def all_jobs(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Kind of job -> the jobs."""
    return {
        "prefill": [prefill(args.prompt_length)],
        "decode": [decode(batch, args.prompt_length, args.decode_tokens) for batch in args.decode_batch_size],
        "train": [train(args.per_device_train_batch_size, args.max_length)],
    }


def load(args: argparse.Namespace) -> PreTrainedModel:
    return load_base(args.model_name_or_path, args.dtype).to(args.device)


def measure_times(
    args: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]], dict[str, int]]:
    """Summary and samples of all timed jobs, and the trainable parameters of the variants."""
    variants = build_variants(load(args), args.sparsity)
    jobs = [job for kind, some in all_jobs(args).items() if kind in args.jobs for job in some]
    seconds = {}
    for job in jobs:
        chosen = variants if job.against == "base" else variants[1:]
        seconds[job.name] = time_by_turns(job, chosen, args.repeats, args.warmup, say)
    return summarize(jobs, variants, seconds), seconds, {v.name: v.trainable for v in variants}


def measure_memory(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Job -> variant -> bytes at the peak; each variant in a process of its own."""
    memory: dict[str, dict[str, int]] = {}
    for name in variant_names(args.sparsity):
        say(f"memory of {name}")
        command = [sys.executable, *sys.argv, "--memory_of", name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for job, size in json.loads(out.splitlines()[-1]).items():
            memory.setdefault(job, {})[name] = size
    return memory


def memory_of(args: argparse.Namespace) -> dict[str, int]:
    """Job -> bytes at the peak, for the one variant that this process is for."""
    (variant,) = build_variants(load(args), args.sparsity, only=args.memory_of)
    kinds = ("prefill",) if variant.kind == "base" else ("prefill", "train")
    return {
        job.name: peak_memory(job, variant, args.device) for kind in kinds for job in all_jobs(args)[kind]
    }


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    args = arguments()
    args.model_name_or_path = args.model_name_or_path or str(default_model())
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(memory_of(args)))
        return
    facts = machine(args.device)
    summary, seconds, trainable = measure_times(args)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "model": f"{Path(args.model_name_or_path).name}, {args.dtype}, {args.device}",
        "machine": facts,
        "repeats": args.repeats,
        "variants": trainable,
        "units": {job.name: job.unit for some in all_jobs(args).values() for job in some},
        "summary": summary,
        "memory": measure_memory(args) if "memory" in args.jobs else {},
        "seconds": seconds,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stem = f"{args.output_dir}/overhead-{Path(args.model_name_or_path).name}-{args.dtype}-{args.device}"
    text = markdown(results)
    Path(f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{stem}.md").write_text(text)
    print(text)
    say(f"written: {stem}.json and {stem}.md")


if __name__ == "__main__":
    main()
