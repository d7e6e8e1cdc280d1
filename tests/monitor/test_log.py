"""The files of a run's folder: whole lines or none, torn tails, truncation, replacement."""

from __future__ import annotations

import errno
import json
import os
import threading

import pytest

from srde.errors import ArtifactError
from srde.monitor import log
from srde.monitor.log import LineReader, MetricsLog, read_json, read_jsonl, replace_json

# What a killed or disturbed writer can leave at the end of a file.
TAILS = {
    "half a line": b'{"kind": "train", "st',
    "a whole object without its line break": b'{"kind": "train", "step": 4}',
    "half a character": b'{"text": "\xe2\x82',
    "bad UTF-8 with a line break": b'{"text": "\xff\xfe"}\n',
    "no JSON with a line break": b"\x00\x00\x00\n",
    "no object": b"[1, 2]\n",
    "zeros of a lost block": b"\x00" * 300,
    "nested too deep": b"[" * 100_000 + b"\n",
}


def filled(path, steps=3):
    lines = MetricsLog(path)
    for step in range(1, steps + 1):
        lines.append({"kind": "train", "step": step, "loss": 1 / step})
    return path


def steps(path):
    return [record["step"] for record in read_jsonl(path)]


def test_each_record_is_one_line_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsLog(path)
    for step in (1, 2):
        writer.append({"step": step, "text": "line\nbreak \u2028 é", "nested": {"loads": [[0.5, 0.25]]}})
        assert len(path.read_bytes().splitlines()) == step and path.read_bytes().endswith(b"\n")
    assert read_jsonl(path)[1] == {
        "step": 2,
        "text": "line\nbreak \u2028 é",
        "nested": {"loads": [[0.5, 0.25]]},
    }


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = {"loss": float("nan"), "loads": [[float("inf"), 1.0], (float("-inf"),)], "fine": 2.5}
    MetricsLog(path).append(record)
    replace_json(tmp_path / "one.json", record)
    expected = {"loss": None, "loads": [[None, 1.0], [None]], "fine": 2.5}

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == expected == read_json(tmp_path / "one.json")


def test_a_value_that_is_not_json_leaves_the_file_as_it_was(tmp_path):
    path = filled(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError):
        MetricsLog(path).append({"step": object()})
    assert steps(path) == [1, 2, 3]


def test_nobody_has_written_yet(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == [] and MetricsLog(path).truncate_after(5) == 0 and not path.exists()


@pytest.mark.faults
@pytest.mark.parametrize("tail", list(TAILS))
def test_a_torn_tail_is_left_out_cut_and_dropped(tail, tmp_path):
    path = filled(tmp_path / "metrics.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + TAILS[tail])
    assert steps(path) == [1, 2, 3]
    MetricsLog(path).append({"step": 4})
    assert steps(path) == [1, 2, 3, 4]

    path.write_bytes(whole + TAILS[tail])
    assert MetricsLog(path).truncate_after(3) == 1
    assert path.read_bytes() == whole


@pytest.mark.faults
@pytest.mark.parametrize("size", [1, 2, log._BLOCK - 1, log._BLOCK, log._BLOCK + 1, 3 * log._BLOCK])
def test_the_last_line_is_found_whatever_its_length(size, tmp_path):
    path = filled(tmp_path / "metrics.jsonl")
    with open(path, "ab") as stream:
        stream.write(b"x" * size)
    MetricsLog(path).append({"step": 4})
    assert steps(path) == [1, 2, 3, 4]
    path.write_bytes(b"x" * size)
    MetricsLog(path).append({"step": 1})
    assert steps(path) == [1]


@pytest.mark.faults
@pytest.mark.parametrize(
    "broken", [b"{half\n", b"\xff\n", b"3\n", b"\n"], ids=["half", "utf8", "number", "empty"]
)
def test_a_broken_line_that_others_follow_is_an_error_with_its_place(broken, tmp_path):
    path = filled(tmp_path / "metrics.jsonl")
    path.write_bytes(path.read_bytes() + broken + b'{"step": 5}\n')
    before = path.read_bytes()
    for call in (lambda: read_jsonl(path), lambda: MetricsLog(path).truncate_after(9)):
        with pytest.raises(ArtifactError, match=r"metrics\.jsonl:4'.*not a JSON object"):
            call()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncating_keeps_what_the_restored_step_knew(tmp_path):
    path = filled(tmp_path / "metrics.jsonl", 6)
    writer = MetricsLog(path)
    writer.append({"kind": "eval", "step": 4})
    writer.append({"text": "no step"})
    assert writer.truncate_after(4) == 2
    assert [record.get("step") for record in read_jsonl(path)] == [1, 2, 3, 4, 4, None]
    assert writer.truncate_after(4) == 0
    writer.append({"step": 5})
    assert [record.get("step") for record in read_jsonl(path)][-1] == 5
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.faults
def test_a_kill_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
    path = filled(tmp_path / "metrics.jsonl")

    def killed(*_):
        raise KeyboardInterrupt

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, killed)
            with pytest.raises(KeyboardInterrupt):
                MetricsLog(path).truncate_after(1)
        assert steps(path) == [1, 2, 3]
    (tmp_path / ".tmp-metrics.jsonl").write_bytes(b"left by a killed process")
    assert MetricsLog(path).truncate_after(1) == 2 and os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.faults
def test_a_disk_that_fills_up_in_a_line_takes_nothing(tmp_path, monkeypatch):
    path = filled(tmp_path / "metrics.jsonl")
    write = os.write

    def short_then_full(descriptor, data):
        if len(data) < 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:10])

    monkeypatch.setattr(os, "write", short_then_full)
    with pytest.raises(ArtifactError, match="too full"):
        MetricsLog(path).append({"kind": "train", "step": 4})
    assert path.read_bytes().endswith(b"}\n") and steps(path) == [1, 2, 3]


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "heartbeat.json"
    replace_json(path, {"step": 0, "pad": "x" * 5000})
    done = threading.Event()
    seen = []

    def read():
        while not done.is_set():
            seen.append(read_json(path)["step"])

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 60):
        replace_json(path, {"step": step, "pad": "x" * 5000})
    done.set()
    reader.join()
    assert seen == sorted(seen) and read_json(path)["step"] == 59
    assert os.listdir(tmp_path) == ["heartbeat.json"]


@pytest.mark.faults
def test_a_json_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.json.*no such file"):
        read_json(tmp_path / "none.json")
    for content in (b"{", b'"\xff"', b"[]"):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"run\.json.*must"):
            read_json(tmp_path / "run.json")


def test_a_reader_takes_only_what_is_new(tmp_path, monkeypatch):
    path = filled(tmp_path / "metrics.jsonl")
    lines = []
    reader = LineReader(path, lines)
    reader.poll()
    parsed = []
    monkeypatch.setattr(log, "_parse", lambda raw, parse=log._parse: parsed.append(raw) or parse(raw))
    reader.poll()
    assert len(lines) == 3 and parsed == []
    MetricsLog(path).append({"step": 4})
    parsed.clear()
    reader.poll()
    assert [record["step"] for record in lines] == [1, 2, 3, 4] and len(parsed) == 1


def test_a_line_that_is_being_written_comes_once_it_is_whole(tmp_path):
    path = filled(tmp_path / "metrics.jsonl")
    lines = []
    reader = LineReader(path, lines)
    line = b'{"step": 4, "text": "\xe2\x82\xac"}\n'
    for end in range(len(line)):
        with open(path, "ab") as stream:
            stream.write(line[end : end + 1])
        reader.poll()
        assert len(lines) == (4 if end == len(line) - 1 else 3)


@pytest.mark.parametrize("more", [0, 1, 9], ids=["shorter", "as long", "longer"])
def test_a_reader_starts_anew_when_a_resumed_run_has_truncated(more, tmp_path):
    path = filled(tmp_path / "metrics.jsonl", 5)
    lines = []
    reader = LineReader(path, lines)
    reader.poll()
    writer = MetricsLog(path)
    writer.truncate_after(4)
    for step in range(more):
        writer.append({"kind": "train", "step": 5 + step, "loss": 0.3})
    reader.poll()
    assert lines == read_jsonl(path) and len(lines) == 4 + more
    path.unlink()
    reader.poll()
    assert lines == []
