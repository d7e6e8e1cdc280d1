"""What a build survives, and what it refuses: full disks, hostile parts, nothing to train on; sources of every kind."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from data_sets import result, rows, write_rows
from srde.cli import main
from srde.data.build import write
from srde.data.build.build import build, merge
from srde.errors import ArtifactError, ConfigError, DataError, SrdeError, UsageError


@pytest.mark.faults
@pytest.mark.parametrize("where", ["_table", "write_text"])
def test_a_disk_that_is_full_at_the_end_leaves_what_was_there(make, tmp_path, monkeypatch, where):
    def full(*_, **__):
        raise OSError(28, os.strerror(28), "data.arrow")

    monkeypatch.setattr(write, "_table", full) if where == "_table" else monkeypatch.setattr(
        write, "flush", full
    )
    with pytest.raises(ArtifactError, match=r"the disk is too full: .* bytes are needed and [\d,]+ are free"):
        build(make("out"))
    assert not (tmp_path / "out/tokenized").exists() and not list(tmp_path.rglob(".tmp-*"))
    monkeypatch.undo()
    build(make("out"))
    build(make("other"))
    assert result(tmp_path / "out") == result(tmp_path / "other")


@pytest.mark.slow
@pytest.mark.faults
def test_a_disk_that_is_really_full(make, tmp_path):
    """F10: small tmpfs, each too small at another moment of the build."""
    build(make("whole"))
    disk = tmp_path / "disk"
    disk.mkdir()
    failed = 0
    for kilobytes in range(64, 2048, 160):
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("no right to mount a tmpfs: F10 on a real full disk is NOT tested")
        try:
            error = None
            try:
                build(make(disk / "out"))
            except SrdeError as caught:
                error = str(caught)
            if error is not None:
                failed += 1
                assert "the disk is too full" in error and str(disk) in error
                assert not (disk / "out/tokenized").exists()
                for chunk in (disk / "out/.build").rglob("rows.arrow"):
                    assert (chunk.parent / "MANIFEST.json").is_file()
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
                build(make(disk / "out"))
            assert result(disk / "out") == result(tmp_path / "whole")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    assert failed >= 3


@pytest.mark.faults
def test_a_folder_that_cannot_be_written_to(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"work_dir=.*it cannot be written to \(Not a directory\)"):
        build(make(tmp_path / "file" / "out"))


@pytest.mark.faults
def test_nothing_to_train_on_is_refused_with_the_reasons(make, tmp_path):
    with pytest.raises(DataError, match=r"none of 120 rows is left to train on \(120 too long\)"):
        build(make("short", max_length=32))
    with pytest.raises(DataError, match=r"none of 120 rows is left to train on \(120 other licence\)"):
        build(make("licence", licenses=["GPL-3.0"]))
    assert not (tmp_path / "short/tokenized").exists()
    with pytest.raises(ConfigError, match=r"none of them has rows to train on"):
        build(make("none", sources=["humaneval"]))


@pytest.mark.faults
def test_a_field_of_free_text_is_no_domain(make, tmp_path):
    made = [{**row, "domain": f"about {place}"} for place, row in enumerate(rows(130, seed=2))]
    path = write_rows(tmp_path / "in" / "free.jsonl", made)
    with pytest.raises(DataError, match="there are 136 different ones, and at most 127 can be told apart"):
        build(make("out", sources=[str(path)]))


@pytest.mark.security
def test_a_part_cannot_name_places_outside(make, tmp_path):
    for index in (0, 1):
        build(make(f"part{index}", shard_index=index, num_shards=2))
    parts = [tmp_path / "part0", tmp_path / "part1"]
    state = parts[0] / ".build/state.json"
    content = json.loads(state.read_text())
    for hostile in ("../../../outside", "/etc", ".hidden"):
        content["train"][0]["source"]["name"] = hostile
        state.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=r"a name has letters, digits"):
            merge(parts, tmp_path / "merged")


@pytest.mark.security
def test_the_result_tells_nothing_of_the_machine(make, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s3cret" * 5)
    monkeypatch.setenv("WEBHOOK_URL", "https://example.com/hook/s3cret")
    build(make("out"))
    for name, content in result(tmp_path / "out").items():
        for secret in (
            b"s3cret",
            str(tmp_path).encode(),
            str(Path.home()).encode(),
            os.uname().nodename.encode(),
        ):
            assert secret not in content, (name, secret)


def test_sources_of_every_kind_together(tokenizer_folder, tmp_path, capfd):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    made = rows(60, seed=8)
    folder = tmp_path / "folder"
    write_rows(folder / "a.jsonl", made[:10])
    (folder / "b.json").write_text(json.dumps(made[10:20]))
    alpaca = [
        {"instruction": row["prompt"], "input": "", "output": row["response"], "domain": "code"}
        for row in made[20:30]
    ]
    turns = [
        {
            "conversations": [
                {"from": "human", "value": row["prompt"]},
                {"from": "gpt", "value": row["response"]},
            ],
            "domain": "logic",
        }
        for row in made[30:40]
    ]
    write_rows(tmp_path / "alpaca.jsonl", alpaca)
    write_rows(tmp_path / "sharegpt.jsonl", turns)
    asked = [
        {"q": row["prompt"], "choices": ["red", "blue", f"green {place}"], "gold": place % 3}
        for place, row in enumerate(made[40:50])
    ]
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "questions.parquet")
    write_rows(tmp_path / "held_out.jsonl", made[:3])
    (tmp_path / "my.yaml").write_text(
        """
sources:
  questions:
    path: questions.parquet
    domain: science
    license: MIT
    converter: choice
    fields: {question: q, options: choices, answer: gold}
  sums:
    gym: chain_sum
    rows: 30
    settings: {max_terms: 3}
    domain: math
    license: Apache-2.0
    near_duplicates: false
  test:
    path: held_out.jsonl
    evaluation: true
"""
    )
    flags = [
        "--model_name",
        str(tokenizer_folder),
        "--work_dir",
        str(tmp_path / "out"),
        "--max_length",
        "1024",
        "--examples_per_domain",
        "50",
    ]
    flags += [
        "--sources",
        str(folder),
        str(tmp_path / "alpaca.jsonl"),
        str(tmp_path / "sharegpt.jsonl"),
        str(tmp_path / "my.yaml"),
    ]
    assert main(["data", "build", *flags, "--validation_fraction", "0"]) == 0, capfd.readouterr().err
    report = json.loads((tmp_path / "out/tokenized/report.json").read_text())
    read = {name: counts["read"] for name, counts in report["entries"].items()}
    assert read == {"folder": 20, "alpaca": 10, "sharegpt": 10, "questions": 10, "sums": 30}
    assert report["evaluation"] == ["test"] and report["entries"]["folder"]["contaminated"] == 3
    used = {name: counts["train"] for name, counts in report["sources"].items()}
    assert used["sums"] == 30 and used["questions"] == used["alpaca"] == used["sharegpt"] == 10
    lines = [json.loads(line) for line in (tmp_path / "out/data.jsonl").read_text().splitlines()]
    sums = [line for line in lines if line["source"] == "sums"]
    assert all(str(eval_sum(line["messages"][0]["content"])) == line["answer"] for line in sums)
    choices = [line for line in lines if line["source"] == "questions"]
    assert {line["answer"] for line in choices} == {"A", "B", "C"} and {
        line["license"] for line in choices
    } == {"MIT"}


def eval_sum(question):
    """The value of the sum or difference in a question of chain_sum."""
    words = question.partition(":")[2].replace("=", " ").split()
    total, sign = 0, 1
    for word in words:
        if word in "+-":
            sign = 1 if word == "+" else -1
        elif word.lstrip("-").isdigit():
            total += sign * int(word)
    return total
