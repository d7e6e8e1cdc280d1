"""The real rows of six domains, where they are beside the repository: a whole build, and training on it."""

from __future__ import annotations

import json

import pytest

from srde.cli import main
from srde.data.domains import DOMAINS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_rows_fill_the_packed_rows_and_train(shared_data, smollm2, tmp_path, capfd):
    flags = [
        "--model_name",
        str(smollm2),
        "--work_dir",
        str(tmp_path / "out"),
        "--examples_per_domain",
        "100000",
    ]
    train, test = (
        sorted(str(path) for path in shared_data.glob(f"*.{split}.jsonl")) for split in ("train", "test")
    )
    assert main(["data", "build", *flags, "--sources", *train, "--eval_sources", *test]) == 0
    report = json.loads((tmp_path / "out/tokenized/report.json").read_text())
    assert (
        set(report["domains"]) == set(DOMAINS)
        and min(one["train"] for one in report["domains"].values()) > 1000
    )
    assert report["splits"]["train"]["filled"] >= 0.97
    assert main(["data", "check", str(tmp_path / "out"), "--model_name", str(smollm2)]) == 0, (
        capfd.readouterr().out
    )
    run = ["--model_name_or_path", str(smollm2), "--pretokenized_dir", str(tmp_path / "out/tokenized")]
    run += [
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "2",
        "--num_experts",
        "6",
        "--dtype",
        "bfloat16",
    ]
    assert (
        main(["train", *run, "--supervised_experts", "--expert_pretrain_steps", "1", "--report_to", "none"])
        == 0
    )
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
