"""Writes the results: all samples as JSON, medians and ratios as a Markdown table with the command and the machine."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers

import srde
from jobs import Job
from variants import Variant, lora_name


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.+)", cpuinfo)
    flags = set(re.search(r"flags\s*: (.+)", cpuinfo)[1].split()) if "flags" in cpuinfo else set()
    facts = {
        "cpu": name[1] if name else platform.processor(),
        "cpu_bf16": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "srde": srde.__version__,
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def compare(times: list[float], reference: list[float]) -> dict[str, float]:
    """Median time, and median, lower and upper quartile of the ratios to the reference's time in the same round."""
    ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
    quarter = len(ratios) // 4
    return {
        "median": median(times),
        "ratio": median(ratios),
        "ratio_low": ratios[quarter],
        "ratio_high": ratios[-1 - quarter],
    }


def summarize(
    jobs: list[Job], variants: list[Variant], seconds: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    """Job -> variant -> its medians. Prefill and decode are compared with the base, training with the LoRA of that size."""
    summary: dict[str, Any] = {}
    for job in jobs:
        for variant in variants:
            if variant.name in seconds[job.name]:
                other = "base" if job.against == "base" else lora_name(variant.sparsity)
                figures = compare(seconds[job.name][variant.name], seconds[job.name][other])
                summary.setdefault(job.name, {})[variant.name] = figures | {"against": other}
    return summary


def markdown(results: dict[str, Any]) -> str:
    """The report: command, machine, one table of times, one of memory."""
    names = list(results["variants"])
    facts = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    parts = [
        f"# Overhead on {results['model']}\n",
        f"```\n{results['command']}\n```\n",
        f"{results['date']}; {facts}.\n",
        f"Medians over {results['repeats']} rounds; in each round every variant runs once, in the order of the rows. A ratio is "
        "the median of the ratios within a round. E=8, K=2. Auto chooses masked or grouped by itself. A LoRA has the rank that "
        "brings its trainable parameters nearest to those of the srde adapter above it.\n",
    ]
    times = results["summary"]
    if times:
        head = ["", "trainable"]
        for job, figures in times.items():
            against = "base" if any(f["against"] == "base" for f in figures.values()) else "LoRA"
            head += [f"{job}, {results['units'][job]}", f"x {against}"]
        rows = []
        for name in names:
            row = [name, f"{results['variants'][name]:,}" if results["variants"][name] else "-"]
            for figures in times.values():
                f = figures.get(name)
                row += [f"{1e3 * f['median']:.2f}", f"{f['ratio']:.2f}"] if f else ["-", "-"]
            rows.append(row)
        parts.append(_table(head, rows))
    if results["memory"]:
        what = (
            "allocated tensors"
            if "gpu" in results["machine"]
            else "resident memory of a process with that variant alone"
        )
        parts.append(f"Peak memory, MB: {what}, weights included.\n")
        jobs = list(results["memory"])
        rows = [
            [
                name,
                *(
                    f"{results['memory'][job][name] / 1e6:.0f}" if name in results["memory"][job] else "-"
                    for job in jobs
                ),
            ]
            for name in names
        ]
        parts.append(_table(["", *jobs], rows))
    return "\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
