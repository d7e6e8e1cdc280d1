"""Files in chunks: every record once, under its own line number, whatever the chunks' size."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srde.data.sources import files
from srde.data.sources.files import data_files, open_file, read_span
from srde.data.sources.gym import gym_spans, read_gym
from srde.errors import ConfigError, DataError


@pytest.fixture(
    params=[(1, 16 * 2**20, 1 << 22), (3, 64, 7), (2048, 100, 1), (2048, 16 * 2**20, 50), (2, 1, 1 << 22)]
)
def limits(request, monkeypatch):
    """Rows and bytes of a chunk, and how much is read at once."""
    for name, value in zip(("CHUNK_ROWS", "CHUNK_BYTES", "_BLOCK"), request.param, strict=True):
        monkeypatch.setattr(files, name, value)
    return request.param


def opened(path: Path):
    return open_file(path, f"named/{path.name}", path.parent / "scratch")


def everything(path: Path) -> list[tuple[int, dict | str]]:
    """What all spans give, in order; errors as texts."""
    found = [pair for span in opened(path).spans for pair in read_span(span)]
    return [(line, str(one) if isinstance(one, DataError) else one) for line, one in found]


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def lines(seed: int, count: int = 40) -> list[bytes]:
    """Objects on lines of very different lengths, with characters that some readers take for line ends; and blank lines."""
    rng = Random(seed)
    found = []
    for number in range(count):
        filler = rng.choice(["", "x" * 30, "é\u2028\u0085 " * 9, "y" * 700])
        line = json.dumps({"n": number, "t": filler}, ensure_ascii=False).encode()
        found += [line, *([rng.choice([b"", b"   ", b"\t"])] if rng.random() < 0.3 else [])]
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_every_line_is_read_once_under_its_number(tmp_path, limits, seed, end, last):
    made = lines(seed)
    path = put(tmp_path / "a.jsonl", end.join(made) + (end if last else b""))
    assert everything(path) == [
        (number, json.loads(line)) for number, line in enumerate(made, 1) if line.strip()
    ]


def test_spans_follow_each_other_and_end_at_line_ends(tmp_path, limits):
    path = put(tmp_path / "a.jsonl", b"\n".join(lines(2)))
    content = path.read_bytes()
    file = opened(path)
    rows, size, _ = limits
    assert [span.start for span in file.spans] == [0, *(span.end for span in file.spans[:-1])]
    assert file.spans[-1].end == len(content)
    for span in file.spans:
        own = content[span.start : span.end]
        assert own.endswith(b"\n") or span is file.spans[-1]
        assert span.line == content[: span.start].count(b"\n") + 1
        assert (span.file, span.path) == ("named/a.jsonl", str(path))
        count = len(own.splitlines(keepends=True))
        assert own.count(b"\n") <= rows
        assert len(own) < size or len(own.rstrip(b"\n").rsplit(b"\n", 1)[0]) < size or own.count(b"\n") <= 1
        assert count


@pytest.mark.parametrize(
    ("rows", "size", "counts"),
    [(3, 10**6, [3, 3, 1]), (100, 20, [2, 2, 2, 1]), (100, 10**6, [7]), (7, 70, [7])],
)
def test_a_chunk_ends_at_the_first_of_both_limits(tmp_path, monkeypatch, rows, size, counts):
    monkeypatch.setattr(files, "CHUNK_ROWS", rows)
    monkeypatch.setattr(files, "CHUNK_BYTES", size)
    path = put(tmp_path / "a.jsonl", b'{"a": 12}\n' * 7)  # of 10 bytes each
    assert [len(list(read_span(span))) for span in opened(path).spans] == counts


def test_a_broken_line_is_an_error_in_its_place(tmp_path, limits):
    path = put(tmp_path / "a.jsonl", b'{"a": 1}\n\nnonsense\n[1]\n{"a": "\xff"}\n{"a": 2}')
    found = everything(path)
    assert [line for line, _ in found] == [1, 3, 4, 5, 6]
    assert (found[0][1], found[-1][1]) == ({"a": 1}, {"a": 2})
    assert found[1][1].startswith("named/a.jsonl:3: row: is not JSON")
    assert found[2][1].startswith("named/a.jsonl:4: row: must be a JSON object, not a list")
    assert found[3][1].startswith("named/a.jsonl:5: row: is not UTF-8")


def test_the_hash_is_that_of_the_file(tmp_path, limits):
    content = b"\n".join(lines(3))
    table = pa.table({"a": [1, 2, 3]})
    pq.write_table(table, tmp_path / "b.parquet")
    put(tmp_path / "a.jsonl", content)
    put(tmp_path / "c.jsonl.gz", gzip.compress(content, mtime=0))
    put(tmp_path / "d.json", b'[{"a": 1}]')
    for path in sorted(tmp_path.glob("?.*")):
        file = opened(path)
        assert file.identity() == {
            "file": f"named/{path.name}",
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }


@pytest.mark.parametrize("group", [1, 4, 7, 100])
@pytest.mark.parametrize("rows", [1, 3, 5, 2048])
def test_parquet_of_several_row_groups(tmp_path, monkeypatch, group, rows):
    monkeypatch.setattr(files, "CHUNK_ROWS", rows)
    content = [{"n": number, "t": [f"x{number}"], "s": {"a": None}} for number in range(23)]
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "a.parquet", row_group_size=group)
    assert everything(tmp_path / "a.parquet") == list(enumerate(content, start=1))
    spans = opened(tmp_path / "a.parquet").spans
    assert [span.line for span in spans] == list(range(1, 24, rows))
    assert dict(read_span(spans[-1])) == {
        number + 1: content[number] for number in range(spans[-1].start, 23)
    }


@pytest.mark.parametrize("key", [None, "data", "rows"])
def test_arrays_of_json(tmp_path, limits, key):
    content = [{"n": number, "t": "é\u2028\n"} for number in range(9)]
    whole = content if key is None else {"version": "1.0", key: content}
    path = put(tmp_path / "a.json", json.dumps(whole, indent=2, ensure_ascii=False).encode())
    assert everything(path) == list(enumerate(content, start=1))


def test_compressed_lines(tmp_path, limits):
    made = lines(4)
    path = put(tmp_path / "a.jsonl.gz", gzip.compress(b"\n".join(made), mtime=0))
    assert everything(path) == [
        (number, json.loads(line)) for number, line in enumerate(made, 1) if line.strip()
    ]
    assert everything(path) == everything(
        put(tmp_path / "b.jsonl", b"\n".join(made))
    )  # and again from what is unpacked


def test_an_array_may_hold_what_is_no_row(tmp_path):
    found = everything(put(tmp_path / "a.json", b'[{"a": 1}, 2, [3], null]'))
    assert found[0] == (1, {"a": 1})
    assert [message.split(": ")[0] for _, message in found[1:]] == [
        f"named/a.json:{line}" for line in (2, 3, 4)
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n\r\n"),
        ("a.json", b"[]"),
        ("a.json", b'{"data": []}'),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_an_empty_file_is_refused(tmp_path, name, content):
    with pytest.raises(DataError, match=rf"{name}: file: is empty; it must hold at least one row"):
        opened(put(tmp_path / name, content))


def test_an_empty_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: file: is empty; it must hold at least one row"):
        opened(tmp_path / "a.parquet")


NESTED = b"[" * 100_000
WHOLE = gzip.compress(b"".join(b'{"n": %d, "t": "%d"}\n' % (n, n * n) for n in range(500)), mtime=0)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.jsonl.gz", b'{"a": 1}\n', "cannot be read"),
        ("a.jsonl.gz", WHOLE[: len(WHOLE) // 2], "cannot be read"),
        ("a.jsonl.gz", WHOLE[:-8] + b"\0" * 8, "cannot be read"),  # another checksum
        ("a.jsonl.gz", WHOLE[:10] + b"\xff" + WHOLE[11:], "cannot be read"),  # a block of no known type
        ("a.json", b'[{"a": 1}', "cannot be read"),
        ("a.json", b"", "cannot be read"),
        ("a.json", b'[{"a": "\xff"}]', "cannot be read"),
        ("a.json", NESTED, "cannot be read"),
        (
            "a.json",
            b'[{"a": ' + b"1" * 5000 + b"}]",
            "cannot be read",
        ),  # Python reads no number of so many digits
        ("a.json", b"3", "must hold a list of objects, or one key with such a list"),
        ("a.json", b'{"a": 1}', "must hold a list of objects, or one key with such a list"),
        ("a.json", b'{"a": [], "b": []}', "must hold a list of objects, or one key with such a list"),
        ("a.parquet", b"", "is not a parquet file that can be read"),
        ("a.parquet", b"PAR1 nothing PAR1", "is not a parquet file that can be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, rule):
    path = put(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        opened(path)
    assert str(caught.value).startswith(f"{path}: file: {rule}")
    assert not list(
        tmp_path.glob("scratch/*.jsonl")
    )  # nothing half unpacked that a second try would take for whole


@pytest.mark.faults
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_damage_within_parquet_is_named(tmp_path, compression):
    table = pa.table({"t": [f"{n} {n * n} {n**3}" for n in range(3000)]})
    pq.write_table(table, tmp_path / "a.parquet", compression=compression, use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    broken = put(tmp_path / "b.parquet", bytes(content[:4] + b"\xff" * 60 + content[64:]))
    with pytest.raises(DataError, match=r"^named/b\.parquet:1: file: is a damaged parquet file \("):
        everything(broken)


@pytest.mark.faults
def test_parquet_text_that_is_not_utf8_is_named(tmp_path):
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"t": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^named/a\.parquet:1: "):
        everything(tmp_path / "a.parquet")


# --- folders ---------------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_data_files_sorted(tmp_path):
    names = [
        "b.jsonl",
        "a/z.parquet",
        "a/b/c.json",
        "c.jsonl.gz",
        ".hidden.jsonl",
        ".git/x.jsonl",
        "notes.txt",
        "a/.b/y.json",
        "x.jsonl/in.json",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in data_files(tmp_path)]
    assert found == ["a/b/c.json", "a/z.parquet", "b.jsonl", "c.jsonl.gz", "x.jsonl/in.json"]
    assert data_files(str(tmp_path / "b.jsonl")) == [tmp_path / "b.jsonl"]


def test_a_hidden_folder_above_hides_nothing(tmp_path):
    (tmp_path / ".cache").mkdir()
    path = put(tmp_path / ".cache/a.jsonl", b"")
    assert data_files(tmp_path / ".cache") == [path]


@pytest.mark.security
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    outside, folder = put(tmp_path / "secret.jsonl", b'{"a": 1}'), tmp_path / "in"
    folder.mkdir()
    put(folder / "a.jsonl", b"{}")
    os.symlink("a.jsonl", folder / "within.jsonl")
    assert [path.name for path in data_files(folder)] == ["a.jsonl", "within.jsonl"]
    for target in (str(outside), "../secret.jsonl"):
        os.symlink(target, folder / "b.jsonl")
        with pytest.raises(
            DataError, match=r"in/b\.jsonl: file: is a link that leads out of the folder; name its target"
        ):
            data_files(folder)
        (folder / "b.jsonl").unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", r"empty: file: is a folder without data files \(\.jsonl, "),
        ("absent", "absent: file: does not exist"),
        ("notes.txt", r"notes\.txt: file: must end in \.jsonl, "),
    ],
)
def test_a_place_without_data_files_is_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.hidden.jsonl").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=message):
        data_files(tmp_path / name)


# --- tasks -----------------------------------------------------------------------------------------------------------------

TERMS = {"min_terms": 2, "max_terms": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(4, marks=pytest.mark.slow),
        7,
        pytest.param(2048, marks=pytest.mark.slow),
    ],
)
def test_a_tasks_rows_do_not_depend_on_the_chunks(monkeypatch, rows):
    whole = [pair for span in gym_spans("chain_sum", 20) for pair in read_gym(span, 3, 20, TERMS)]
    monkeypatch.setattr(files, "CHUNK_ROWS", rows)
    spans = gym_spans("chain_sum", 20)
    assert len(spans) == -(-20 // rows) and all(span.file == "reasoning-gym:chain_sum" for span in spans)
    parts = [pair for span in reversed(spans) for pair in read_gym(span, 3, 20, TERMS)]
    assert sorted(parts, key=lambda pair: pair[0]) == whole
    assert [line for line, _ in whole] == list(range(1, 21))
    assert [record["id"] for _, record in whole] == [f"chain_sum/3/{number}" for number in range(20)]
    assert len({record["question"] for _, record in whole}) > 15


@pytest.mark.slow
def test_a_tasks_rows_depend_on_the_seed_and_the_settings():
    (span,) = gym_spans("chain_sum", 10)

    def asked(seed: int, **settings: int) -> list[str]:
        return [record["question"] for _, record in read_gym(span, seed, 10, settings)]

    assert asked(1, **TERMS) == asked(1, **TERMS) != asked(2, **TERMS)
    assert all(
        question.count("+") + question.count("-") >= 6 for question in asked(1, min_terms=7, max_terms=7)
    )


def test_a_larger_task_begins_with_the_smaller():
    (small,), (large,) = gym_spans("chain_sum", 5), gym_spans("chain_sum", 9)
    assert list(read_gym(small, 1, 5, TERMS)) == list(read_gym(large, 1, 9, TERMS))[:5]


@pytest.mark.parametrize(
    ("task", "settings"),
    [("no_such_task", {}), ("chain_sum", {"colour": 1}), ("chain_sum", {"min_terms": -1})],
)
def test_a_task_that_is_refused_is_named(task, settings):
    (span,) = gym_spans(task, 3)
    with pytest.raises(
        ConfigError, match=rf"gym='{task}': reasoning-gym refuses the task or its settings \("
    ):
        list(read_gym(span, 1, 3, settings))
