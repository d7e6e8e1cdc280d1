"""Builds from the hub, with the real clients against a stand-in on the loopback address."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

import hub_rows
from data_sets import result
from srde.cli import main
from srde.data.domains import DOMAINS
from srde.data.rows import read_rows
from srde.data.sources.registry import registered
from standin_hub import StandInHub

TOKEN = "hf_" + "n0taT0ken" * 4
SOME = "gsm8k,sciq,logiqa,scrolls_qasper,humaneval"  # plain, shuffled options, a converted branch, an archive, evaluation only
# The clients wait 23 seconds in all before they give a connection up; tests need not.
HASTY = "import time; sleep = time.sleep; time.sleep = lambda seconds: sleep(min(seconds, 0.02))"


@pytest.fixture(scope="module")
def hub():
    with StandInHub(token=None) as hub:
        for repo, repository in hub_rows.REPOSITORIES.items():
            hub.add(repo, hub_rows.build_files(repo, 40, seed=7), revision=repository.revision)
        yield hub


@pytest.fixture(scope="module")
def run(hub, tokenizer_folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")

    def run(work_dir, *flags, hub=hub, **environment):
        argv = [
            "data",
            "build",
            "--model_name",
            str(tokenizer_folder),
            "--work_dir",
            str(work_dir),
            "--examples_per_domain",
            "24",
        ]
        argv += ["--max_length", "4096", "--num_proc", "2", *flags]
        program = f"{HASTY}; import sys; from srde.cli import main; sys.exit(main({argv!r}))"
        return subprocess.run(
            [sys.executable, "-c", program],
            env=hub.environment(home, **environment),
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """What an undisturbed build of `SOME` gives."""
    work_dir = tmp_path_factory.mktemp("whole")
    done = run(work_dir, "--sources", SOME)
    assert done.returncode == 0, done.stderr
    return result(work_dir)


def test_every_registered_source_makes_a_set_of_six_domains_that_is_uploaded(hub, run, tmp_path):
    hub.requests.clear()
    done = run(
        tmp_path / "out",
        "--upload_repo",
        "me/reasoning",
        HF_TOKEN=TOKEN,
        WEBHOOK_URL="https://example.com/s3cret",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path / "out/data.jsonl")
    assert Counter(row.domain for row in rows) == dict.fromkeys(DOMAINS, 24)
    report = json.loads((tmp_path / "out/tokenized/report.json").read_text())
    trained = {name: source for name, source in registered().items() if source.train}
    assert set(report["entries"]) == set(trained) and all(
        counts["read"] >= 20 for counts in report["entries"].values()
    )
    assert {row.source for row in rows} == set(trained)
    assert report["evaluation"] == sorted(name for name, source in registered().items() if source.evaluation)
    assert not {row.source for row in rows} & {
        name for name, source in registered().items() if not source.train
    }
    for row in rows:
        assert (
            row.license == registered()[row.source].license and row.domain == registered()[row.source].domain
        )
        if registered()[row.source].kind == "choice":
            assert (
                f"\n{row.answer}) " in row.prompt[0]["content"]
                and f"The answer is {row.answer}) " in row.response
            )

    uploaded = hub.files("me/reasoning")
    ours = result(tmp_path / "out")
    assert {name: data for name, data in uploaded.items() if name != ".gitattributes"} == ours
    assert f"Bearer {TOKEN}" in hub.authorizations
    outputs = [done.stdout.encode(), done.stderr.encode(), *ours.values()]
    outputs += [path.read_bytes() for path in (tmp_path / "out/.build").iterdir() if path.is_file()]
    for secret in (TOKEN, "s3cret", str(tmp_path)):
        assert not any(secret.encode() in output for output in outputs[2:]), secret
    assert TOKEN not in done.stdout + done.stderr and "s3cret" not in done.stdout + done.stderr

    again = (
        'import datasets; d = datasets.load_dataset("me/reasoning"); print({k: len(v) for k, v in d.items()})'
    )
    loaded = subprocess.run(
        [sys.executable, "-c", again], env=hub.environment(tmp_path / "h"), capture_output=True, text=True
    )
    assert f"'train': {len(rows)}" in loaded.stdout, loaded.stderr


@pytest.mark.faults
@pytest.mark.parametrize(
    "how",
    [
        pytest.param("drop", marks=pytest.mark.slow),
        pytest.param("refuse", marks=pytest.mark.slow),
        pytest.param("503", marks=pytest.mark.slow),
    ],
)
def test_a_network_that_goes_ends_in_an_error_and_loses_nothing(hub, run, whole, tmp_path, how):
    hub.requests.clear()
    hub.fail(after=30, how=how)
    cut = run(tmp_path / "cut", "--sources", SOME)
    assert cut.returncode == 1 and "Traceback" not in cut.stderr, cut.stderr
    assert "srde data: source " in cut.stderr and "could not be read from the hub" in cut.stderr
    assert "What is already there is kept" in cut.stderr
    assert not (tmp_path / "cut/tokenized").exists()
    hub.heal()
    again = run(tmp_path / "cut", "--sources", SOME)
    assert again.returncode == 0, again.stderr
    assert result(tmp_path / "cut") == whole


@pytest.mark.slow
@pytest.mark.faults
def test_once_fetched_a_build_needs_no_network(hub, run, whole, tmp_path):
    part = run(tmp_path / "part", "--sources", SOME, "--shard_index", "0", "--num_shards", "2")
    other = run(tmp_path / "other", "--sources", SOME, "--shard_index", "1", "--num_shards", "2")
    assert part.returncode == other.returncode == 0
    hub.fail(after=0, how="refuse")
    parts = [str(tmp_path / name) for name in ("part", "other")]
    merge = ["data", "merge", "--parts", *parts, "--work_dir", str(tmp_path / "merged")]
    done = subprocess.run(
        [sys.executable, "-m", "srde", *merge],
        env=hub.environment(tmp_path / "h"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "merged") == whole
    hub.heal()


@pytest.mark.slow
@pytest.mark.faults
def test_a_source_that_changed_its_columns_or_is_gone(hub, run, tmp_path):
    with StandInHub() as other:
        files = "".join(f"  - {{split: {split}, path: {split}.jsonl}}\n" for split in ("train", "test"))
        card = f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n".encode()
        lines = b'{"problem": "a", "solution": "b"}\n' * 3
        other.add("openai/gsm8k", {"README.md": card, "train.jsonl": lines, "test.jsonl": lines})
        done = run(tmp_path / "changed", "--sources", "gsm8k", "--eval_sources", "gsm8k", hub=other)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert (
            "source gsm8k: answer: there is no such column in openai/gsm8k (main); it has problem, solution"
            in done.stderr
        )
        done = run(tmp_path / "gone", "--sources", "sciq", "--eval_sources", "gsm8k", hub=other)
        assert (
            done.returncode == 1
            and "source sciq: allenai/sciq: could not be read from the hub" in done.stderr
        )


@pytest.mark.security
@pytest.mark.parametrize("name", ["me", "../me/x", "me/x/y", "me/.."])
def test_names_that_are_none_are_refused_before_the_work(tokenizer_folder, tmp_path, capfd, name):
    flags = [
        "--model_name",
        str(tokenizer_folder),
        "--work_dir",
        str(tmp_path / "out"),
        "--sources",
        "gsm8k",
        "--upload_repo",
        name,
    ]
    assert main(["data", "build", *flags]) == 1
    assert "upload_repo=" in capfd.readouterr().err and not (tmp_path / "out").exists()
