"""Times variants by turns in one process, and measures the peak memory of one variant in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jobs import Job
from variants import Variant

Say = Callable[[str], None]


def time_by_turns(
    job: Job, variants: list[Variant], repeats: int, warmup: int, say: Say
) -> dict[str, list[float]]:
    """Runs all variants once, then all of them again, and so on: what disturbs the machine disturbs all alike.

    Returns:
        Variant -> seconds per unit of the job, one for each round.
    """
    runs = {variant.name: job.prepare(variant) for variant in variants}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    for round_ in range(warmup + repeats):
        say(f"{job.name}: round {round_ + 1} of {warmup + repeats}")
        for name, run in runs.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if round_ >= warmup:
                seconds[name].append((time.perf_counter() - start) / job.tokens)
        gc.collect()
    gc.enable()
    return seconds


def peak_memory(job: Job, variant: Variant, device: str) -> int:
    """Bytes at the peak of a job in this process, weights included; call it in a process that holds this variant alone.

    CUDA: allocated tensors. CPU: the process's resident memory, Python and its libraries (about 0.6 GB) included, so
    differences between variants say more than ratios.
    """
    run = job.prepare(variant)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far: proc(5)
    for _ in range(2):
        run()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
