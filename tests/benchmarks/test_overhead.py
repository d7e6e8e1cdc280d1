"""The benchmark runs, and its report holds what a reader needs; what it measures here means nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_whole_run_on_a_tiny_model(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    flags = [
        "--dtype",
        "float32",
        "--repeats",
        "3",
        "--warmup",
        "0",
        "--prompt_length",
        "16",
        "--max_length",
        "16",
    ]
    flags += ["--sparsity", "0.1", "--decode_batch_size", "1", "--output_dir", str(tmp_path / "out")]
    command = [
        sys.executable,
        str(BENCHMARKS / "overhead.py"),
        "--model_name_or_path",
        str(tmp_path / "model"),
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "overhead-model-float32-cpu.json").read_text())
    names = ["base", "srde masked 10%", "srde grouped 10%", "srde auto 10%", "LoRA 10%"]
    assert list(results["variants"]) == names
    assert {job: list(times) for job, times in results["seconds"].items()} == {
        "prefill 1x16": names, "decode 1x1 at 16": names, "step 1x16": names[1:],
    }  # fmt: skip
    assert list(results["memory"]) == ["prefill 1x16", "step 1x16"]
    assert min(min(sizes.values()) for sizes in results["memory"].values()) > 1e8
    text = (tmp_path / "out" / "overhead-model-float32-cpu.md").read_text()
    assert (
        f"--output_dir {tmp_path}/out" in text
        and "| srde auto 10% |" in text
        and results["machine"]["cpu"] in text
    )


def test_a_ratio_is_taken_within_each_round(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from tables import compare

    slow_down = [1.0, 1.0, 5.0, 5.0, 5.0]
    figures = compare([1.5 * t for t in slow_down], slow_down)
    assert figures == {"median": 7.5, "ratio": 1.5, "ratio_low": 1.5, "ratio_high": 1.5}
