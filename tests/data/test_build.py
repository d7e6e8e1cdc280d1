"""The build as a whole: the same bytes always, whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_sets import result, rows, write_rows
from srde.artifacts import verify
from srde.cli import main
from srde.data.build.build import build, merge
from srde.data.build.settings import BuildSettings
from srde.data.domains import DOMAINS
from srde.data.rows import read_rows
from srde.data.sources import files
from srde.errors import ConfigError, DataError, UsageError
from tiny import tiny_tokenizer

KILLS = 24


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks from few rows."""
    monkeypatch.setattr(files, "CHUNK_ROWS", 40)


@pytest.fixture
def sources(tmp_path, small_chunks):
    made = rows(600, seed=1)
    made += [{**made[3], "id": "again"}, {**made[8], "id": "twice", "prompt": made[8]["prompt"] + " Now."}]
    held_out = rows(40, seed=2)
    made.append({**held_out[5], "id": "leaked", "domain": "math"})
    return {
        "sources": [str(write_rows(tmp_path / "in" / "rows.jsonl", made))],
        "eval_sources": [str(write_rows(tmp_path / "in" / "test.jsonl", held_out))],
    }


def settings(tokenizer_folder, work_dir, given, **changes):
    wanted = {"examples_per_domain": 60, "max_length": 768, "num_proc": 2, "validation_fraction": 0.1}
    return BuildSettings(str(tokenizer_folder), str(work_dir), **(wanted | given | changes))


def test_a_set_is_balanced_and_its_parts_fit_together(tokenizer_folder, sources, tmp_path):
    built = build(settings(tokenizer_folder, tmp_path / "out", sources))
    assert built.fresh and verify(built.folder)
    train = read_rows(tmp_path / "out/data.jsonl")
    held_out = read_rows(tmp_path / "out/validation.jsonl")
    assert Counter(row.domain for row in train) == dict.fromkeys(DOMAINS, 60)
    assert Counter(row.domain for row in held_out) == dict.fromkeys(DOMAINS, 6)
    assert all(row.license and row.source and row.id for row in train)
    assert not {row.id for row in train} & {row.id for row in held_out}
    report = json.loads((built.folder / "report.json").read_text())
    assert report == built.report
    assert report["entries"]["rows"]["read"] == 603 and report["entries"]["rows"]["contaminated"] == 1
    assert sum(counts["exact_duplicates"] for counts in report["sources"].values()) == 1
    assert sum(counts["near_duplicates"] for counts in report["sources"].values()) == 1
    dropped = [json.loads(line) for line in (built.folder / "dropped.jsonl").read_text().splitlines()]
    assert {
        (entry["reason"], entry["id"].split("/")[-1], entry["detail"].split("/")[-1]) for entry in dropped
    } == {
        ("contaminated", "leaked", "2-5"),
        ("exact duplicate", "again", "1-3"),
        ("near duplicate", "twice", "1-8"),
    }


def test_the_packed_rows_are_the_rows(tokenizer_folder, sources, tmp_path):
    datasets = pytest.importorskip("datasets")
    built = build(settings(tokenizer_folder, tmp_path / "out", sources))
    tokenizer = tiny_tokenizer()
    names = json.loads((built.folder / "MANIFEST.json").read_text())["metadata"]
    wanted = {
        (row.prompt[0]["content"], row.response, row.domain, row.source)
        for row in read_rows(tmp_path / "out/data.jsonl")
    }
    found = set()
    for row in datasets.load_from_disk(str(built.folder / "train")):
        assert len(row["input_ids"]) == sum(row["lengths"]) <= 768
        start = 0
        for length, domain, source in zip(row["lengths"], row["domains"], row["sources"], strict=True):
            ids = row["input_ids"][start : start + length]
            labels = row["labels"][start : start + length]
            assert row["position_ids"][start : start + length] == list(range(length))
            assert set(row["domain_ids"][start : start + length]) == {domain}
            trained = [label for label in labels if label != -100]
            assert labels[0] == -100 and trained == ids[len(ids) - len(trained) :]
            prompt = tokenizer.decode(ids[: len(ids) - len(trained)])
            assert prompt.startswith("<|im_start|>user\n") and prompt.endswith(
                "<|im_end|>\n<|im_start|>assistant\n"
            )
            prompt = prompt.removeprefix("<|im_start|>user\n").removesuffix(
                "<|im_end|>\n<|im_start|>assistant\n"
            )
            response = tokenizer.decode(trained).removesuffix("<|im_end|>")
            found.add((prompt, response, names["domains"][domain], names["sources"][source]))
            start += length
    assert found == wanted


def test_the_same_command_gives_the_same_bytes_whatever_the_processes_and_the_place(
    tokenizer_folder, sources, tmp_path
):
    build(settings(tokenizer_folder, tmp_path / "one", sources, num_proc=1))
    build(settings(tokenizer_folder, tmp_path / "deeper/two", sources, num_proc=2))
    assert result(tmp_path / "one") == result(tmp_path / "deeper/two")
    assert not build(settings(tokenizer_folder, tmp_path / "one", sources)).fresh
    build(settings(tokenizer_folder, tmp_path / "three", sources, seed=1))
    assert result(tmp_path / "one") != result(tmp_path / "three")
    # `datasets` caches by this: other data must not have the same.
    states = [
        json.loads((tmp_path / name / "tokenized/train/state.json").read_text()) for name in ("one", "three")
    ]
    assert states[0]["_fingerprint"] != states[1]["_fingerprint"]


def _in_a_process(wanted):
    os.setpgid(0, 0)
    build(wanted)


@pytest.mark.faults
@pytest.mark.parametrize("kills", [3, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_random_points_it_goes_on_to_the_same_bytes(tokenizer_folder, sources, tmp_path, kills):
    fork = multiprocessing.get_context("fork")
    start = time.monotonic()
    whole = fork.Process(
        target=_in_a_process, args=(settings(tokenizer_folder, tmp_path / "whole", sources),)
    )
    whole.start()
    whole.join()
    seconds = time.monotonic() - start
    expected = result(tmp_path / "whole")
    rng = random.Random(0)
    killed = places = 0
    while killed < kills:
        places += 1
        while True:
            process = fork.Process(
                target=_in_a_process, args=(settings(tokenizer_folder, tmp_path / f"cut{places}", sources),)
            )
            process.start()
            process.join(rng.uniform(0, seconds))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            # Now and then the whole group, as a batch system does; else the builder alone, and its workers must notice.
            if rng.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):  # it has not founded its group yet
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            killed += 1
        assert result(tmp_path / f"cut{places}") == expected
        assert {path.name for path in (tmp_path / f"cut{places}/.build").iterdir()} == {"lock", "plan.json"}


@pytest.mark.parametrize("count", [2, 3])
def test_parts_merge_to_the_same_bytes(tokenizer_folder, sources, tmp_path, count):
    build(settings(tokenizer_folder, tmp_path / "whole", sources))
    parts = [tmp_path / f"part{index}" for index in range(count)]
    chunks = []
    for index, part in enumerate(parts):
        built = build(settings(tokenizer_folder, part, sources, shard_index=index, num_shards=count))
        assert built.folder is None and not (part / "tokenized").exists()
        chunks.append({path.name for path in (part / ".build/rows/rows/all").iterdir()})
    assert set.union(*chunks) == {f"{number:06d}" for number in range(16)}
    assert sum(map(len, chunks)) == 16
    merge(parts, tmp_path / "merged")
    assert result(tmp_path / "merged") == result(tmp_path / "whole")
    merge(parts, parts[0])  # one of the parts may take the result
    assert result(parts[0]) == result(tmp_path / "whole")


def test_a_merge_reads_on_where_a_domain_is_short(tokenizer_folder, tmp_path, small_chunks):
    """The first estimate needs only a few chunks of the file; nearly all of their rows turn out to be duplicates."""
    made = rows(900, seed=5)
    for place, row in enumerate(made):
        row["domain"] = "math"
        if place % 9:
            row |= {
                "prompt": made[place - place % 9]["prompt"],
                "response": made[place - place % 9]["response"],
            }
    path = write_rows(tmp_path / "in.jsonl", made)
    yaml = tmp_path / "my.yaml"
    yaml.write_text(f"sources:\n  mine:\n    path: {path}\n    domain: math\n")
    wanted = {"sources": [str(yaml)], "examples_per_domain": 30, "validation_fraction": 0.0}
    built = build(settings(tokenizer_folder, tmp_path / "whole", {}, **wanted))
    assert built.report["domains"]["math"]["train"] == 30
    assert 160 < built.report["entries"]["mine"]["read"] <= 900
    parts = [tmp_path / "a", tmp_path / "b"]
    for index, part in enumerate(parts):
        build(settings(tokenizer_folder, part, {}, **wanted, shard_index=index, num_shards=2))
    merge(parts, tmp_path / "merged", num_proc=1)
    assert result(tmp_path / "merged") == result(tmp_path / "whole")


def test_wrong_parts_are_refused(tokenizer_folder, sources, tmp_path):
    parts = [tmp_path / "0", tmp_path / "1"]
    build(settings(tokenizer_folder, parts[0], sources, shard_index=0, num_shards=2))
    with pytest.raises(UsageError, match=r"parts.*holds no finished part of a build"):
        merge(parts, tmp_path / "out")
    build(settings(tokenizer_folder, parts[1], sources, shard_index=1, num_shards=2, seed=7))
    with pytest.raises(UsageError, match=r"the build has 2 parts.*add the part with --shard_index 1"):
        merge(parts[:1], tmp_path / "out")
    with pytest.raises(UsageError, match=r"part of another build: settings.seed is 7, and 42 in"):
        merge(parts, tmp_path / "out")


def test_another_command_in_the_same_folder_is_refused(tokenizer_folder, sources, tmp_path):
    build(settings(tokenizer_folder, tmp_path / "out", sources))
    before = result(tmp_path / "out")
    with pytest.raises(UsageError, match=r"another settings.max_length: 768 there, 128 now"):
        build(settings(tokenizer_folder, tmp_path / "out", sources, max_length=128))
    write_rows(Path(sources["sources"][0]), rows(10))
    with pytest.raises(UsageError, match=r"another train.rows.files_read.*bytes"):
        build(settings(tokenizer_folder, tmp_path / "out", sources))
    assert result(tmp_path / "out") == before


@pytest.mark.faults
def test_a_damaged_result_is_made_again(tokenizer_folder, sources, tmp_path):
    build(settings(tokenizer_folder, tmp_path / "out", sources))
    before = result(tmp_path / "out")
    for name in ("data.jsonl", "tokenized/train/data-00000-of-00001.arrow"):
        content = bytearray(before[name])
        content[len(content) // 2] ^= 1
        (tmp_path / "out" / name).write_bytes(content)
        assert build(settings(tokenizer_folder, tmp_path / "out", sources)).fresh
        assert result(tmp_path / "out") == before


@pytest.mark.faults
def test_a_damaged_chunk_is_made_again(tokenizer_folder, sources, tmp_path):
    part = tmp_path / "part"
    build(settings(tokenizer_folder, part, sources, shard_index=0, num_shards=2))
    build(settings(tokenizer_folder, tmp_path / "b", sources, shard_index=1, num_shards=2))
    build(settings(tokenizer_folder, tmp_path / "whole", sources))
    chunk = next(path for path in sorted((part / ".build/rows").rglob("rows.arrow")))
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(Exception, match=r"rows\.arrow.*sha256"):
        merge([part, tmp_path / "b"], tmp_path / "out")
    build(settings(tokenizer_folder, part, sources, shard_index=0, num_shards=2))
    merge([part, tmp_path / "b"], tmp_path / "out")
    assert result(tmp_path / "out") == result(tmp_path / "whole")


@pytest.mark.faults
def test_two_builds_in_one_folder(tokenizer_folder, sources, tmp_path):
    from srde.data.build import stage

    held = stage.Stage(tmp_path / "out")
    with (
        held.lock(),
        pytest.raises(UsageError, match=rf"another build is at work there \(process {os.getpid()} on "),
    ):
        build(settings(tokenizer_folder, tmp_path / "out", sources))
    assert build(settings(tokenizer_folder, tmp_path / "out", sources)).fresh


def test_domains_licences_and_bad_rows(tokenizer_folder, tmp_path, small_chunks):
    made = rows(120, seed=3)
    path = write_rows(tmp_path / "in.jsonl", made)
    path.write_text(
        path.read_text() + '{"prompt": "a"}\n{broken\n' + json.dumps({**made[0], "prompt": "x" * 9000}) + "\n"
    )
    wanted = {"sources": [str(path)], "num_proc": 1, "max_length": 1024}
    with pytest.raises(DataError, match=r"in\.jsonl:121: response: is missing"):
        build(settings(tokenizer_folder, tmp_path / "out", {}, **wanted))
    built = build(
        settings(
            tokenizer_folder,
            tmp_path / "out2",
            {},
            **wanted,
            on_bad_row="skip",
            domains=["math", "code"],
            licenses=["mit"],
        )
    )
    train = read_rows(tmp_path / "out2/data.jsonl")
    assert {row.domain for row in train} == {"math"} and {row.license for row in train} == {"MIT"}
    entry = built.report["entries"]["in"]
    assert entry["bad row"] == 2 and entry["too long"] == 1 and entry["other domain"] == 80
    reasons = [json.loads(line) for line in (built.folder / "dropped.jsonl").read_text().splitlines()]
    assert any(
        one["detail"].startswith("in.jsonl:122: row: is not JSON")
        for one in reasons
        if one["reason"] == "bad row"
    )


def test_a_test_set_given_to_train_on_is_refused(tokenizer_folder, sources, tmp_path):
    both = {"sources": sources["sources"] + sources["eval_sources"], "eval_sources": sources["eval_sources"]}
    with pytest.raises(
        DataError, match=r"test\.jsonl: file: is given to train on and, as test, to evaluate on"
    ):
        build(settings(tokenizer_folder, tmp_path / "out", both))


def test_questions_on_one_document_stay_on_one_side(tokenizer_folder, tmp_path, small_chunks):
    made = []
    for document in range(60):
        passage = rows(1, seed=100 + document, low=60, high=80)[0]["prompt"]
        for number, row in enumerate(rows(5, seed=1000 + document)):
            made.append({**row, "domain": "logic", "id": f"{document}-{number}", "document": passage})
            made[-1]["prompt"] = f"{passage}\n\n{row['prompt']}"
    path = write_rows(tmp_path / "in.jsonl", made)
    built = build(
        settings(
            tokenizer_folder,
            tmp_path / "out",
            {},
            sources=[str(path)],
            max_length=2048,
            validation_fraction=0.2,
            examples_per_domain=200,
        )
    )
    # The shared passage makes them alike by far more than the threshold; they are different questions all the same.
    assert built.report["domains"]["logic"]["near_duplicates"] == 0
    sides = [
        {row.id.split("/")[-1].split("-")[0] for row in read_rows(tmp_path / "out" / name)}
        for name in ("data.jsonl", "validation.jsonl")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_the_command_line(tokenizer_folder, sources, tmp_path, capfd):
    flags = [
        "--model_name",
        str(tokenizer_folder),
        "--work_dir",
        str(tmp_path / "out"),
        "--max_length",
        "768",
    ]
    flags += ["--sources", *sources["sources"], "--eval_sources", *sources["eval_sources"]]
    flags += ["--examples_per_domain", "20", "--domains", "math,logic", "--seed", "3"]
    assert main(["data", "build", *flags]) == 0
    out = capfd.readouterr().out
    assert "math" in out and "near duplicate" in out and "% full" in out.replace("\n", " ")
    assert {row.domain for row in read_rows(tmp_path / "out/data.jsonl")} == {"math", "logic"}
    assert main(["data", "build", *flags]) == 0 and "complete already" in capfd.readouterr().out
    for index in (0, 1):
        own = [*flags, "--shard_index", str(index), "--num_shards", "2"]
        own[3] = str(tmp_path / f"part{index}")
        assert main(["data", "build", *own]) == 0
    assert "srde data merge" in capfd.readouterr().out
    parts = [str(tmp_path / f"part{index}") for index in (0, 1)]
    assert main(["data", "merge", "--parts", *parts, "--work_dir", str(tmp_path / "merged")]) == 0
    assert result(tmp_path / "merged") == result(tmp_path / "out")
    assert main(["data", "build", "--exampels_per_domain", "3", "--model_name", "m", "--work_dir", "w"]) == 1
    assert "the nearest is --examples_per_domain" in capfd.readouterr().err
    assert main(["data", "bild"]) == 2 and "Did you mean 'build'?" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples_per_domain": 0}, "examples_per_domain=0: a domain needs at least 1 row"),
        ({"shard_index": 2, "num_shards": 2}, "shard_index=2: it must be below num_shards=2"),
        ({"validation_fraction": 0.5}, "validation_fraction=0.5: it must be from 0 to below 0.5"),
        ({"near_duplicate_threshold": 0.0}, "near_duplicate_threshold=0.0: it must be above 0"),
        ({"num_proc": 0}, "num_proc=0: it must be at least 1"),
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore': it must be error or skip"),
    ],
)
def test_settings_that_break_a_rule(changes, message):
    with pytest.raises(ConfigError, match=message):
        BuildSettings("m", "w", **changes)


def test_many_shards_of_packed_rows(tokenizer_folder, sources, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    build(settings(tokenizer_folder, tmp_path / "one", sources))
    monkeypatch.setattr("srde.data.build.write.SHARD_ROWS", 7)
    build(settings(tokenizer_folder, tmp_path / "many", sources))
    one, many = (
        datasets.load_from_disk(str(tmp_path / name / "tokenized/train")) for name in ("one", "many")
    )
    assert len(list((tmp_path / "many/tokenized/train").glob("*.arrow"))) > 3
    for name in one.column_names:
        assert one[name][:] == many[name][:]
    assert np.mean([len(ids) for ids in one["input_ids"]]) / 768 > 0.85
