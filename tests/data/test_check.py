"""`srde data check`: every defect is found, none is invented, and nothing ends in a traceback."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srde.artifacts import write_manifest
from srde.cli import main
from srde.data.build.build import build
from srde.data.build.settings import BuildSettings
from srde.data.view.check import check_rows, check_set
from srde.data.view.reading import evaluation_index
from srde.data.view.shards import PER_TOKEN

GOOD = {"prompt": "how many are there", "response": "the answer is 7", "domain": "math", "id": "a"}
QUESTION = "what is the answer to the question of how many there are in the system now"


def line(**fields: object) -> str:
    return json.dumps(GOOD | fields)


@pytest.fixture(scope="module")
def made(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("made")
    rows = [
        {"prompt": f"what is {i} and {7 * i}", "response": f"{8 * i} yes", "domain": ("math", "logic")[i % 2], "answer": i}
        for i in range(90)
    ]  # fmt: skip
    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = BuildSettings(
        str(tokenizer_folder),
        str(work / "out"),
        sources=[str(work / "rows.jsonl")],
        max_length=96,
        num_proc=1,
        validation_fraction=0.1,
    )
    build(settings)
    return work / "out"


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of the built set that may be damaged."""
    return Path(shutil.copytree(made, tmp_path / "work"))


def rewrite(work: Path, change, split: str = "train") -> None:
    """Changes the lists of a shard's columns and signs the folder anew, as a build with a fault would have."""
    file = next((work / "tokenized" / split).glob("*.arrow"))
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    columns = {name: table[name].to_pylist() for name in table.column_names}
    change(columns)
    arrays = [pa.array(columns[field.name], field.type) for field in table.schema]
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=table.schema), max_chunksize=3)
    sign(work)


def sign(work: Path, **metadata: object) -> None:
    folder = work / "tokenized"
    old = json.loads((folder / "MANIFEST.json").read_text())["metadata"]
    (folder / "MANIFEST.json").unlink()
    write_manifest(folder, old | metadata)


def test_good_rows_have_no_defect(jsonl, chat_tokenizer):
    path = jsonl(line(), "", line(id="b", response="no"), line(id="a", source="other", response="yes"))
    assert list(check_rows(path, chat_tokenizer, 100)) == []


def test_every_defect_of_a_file_is_found_in_order(jsonl, chat_tokenizer):
    path = jsonl(
        line(),
        "{not json",
        line(id="b", response=""),
        line(response="no"),
        line(id="c", prompt=" how  many are there"),
        line(id="d", prompt="0 1 2", domain=None),
        line(id="e", response="9 " * 50),
        b'{"text": "\xff"}',
    )
    found = [defect.removeprefix(f"{path}:") for defect in check_rows(path, chat_tokenizer, 60)]
    assert [defect[: defect.index(": ", 3)] for defect in found] == [
        "2: row", "3: response", "4: id", "5: row", "6: domain", "7: row", "8: row"
    ]  # fmt: skip
    assert f"'a' is that of {path}:1 already" in found[2]
    assert f"repeats {path}:1;" in found[3]
    assert "tokens, more than max_length=60" in found[5]
    assert "not UTF-8" in found[6]


def test_what_the_template_refuses_is_a_defect(jsonl, make_tokenizer):
    refusing = make_tokenizer("{{ raise_exception('no such role') }}")
    (defect,) = check_rows(jsonl(line()), refusing)
    assert defect.endswith(":1: messages: the model's chat template refuses them: no such role")


def test_repeats_are_found_over_several_files(tmp_path, jsonl):
    one, other = jsonl(line()), tmp_path / "other.jsonl"
    other.write_text(line())
    assert [defect.split(": ")[:2] for defect in check_rows([one, other])] == [
        [f"{other}:1", "id"],
        [f"{other}:1", "row"],
    ]


def test_a_row_with_an_evaluation_question_is_a_defect(tmp_path, jsonl):
    questions = tmp_path / "test.jsonl"
    questions.write_text(line() + "\n" + line(prompt=QUESTION, response="3"))
    path = jsonl(line(prompt="are 8 less than 9"), line(id="b", prompt=f"Say: {QUESTION}"))
    found = list(check_rows(path, evaluation=evaluation_index([questions])))
    assert found == [f"{path}:2: row: holds the evaluation question at {questions}:2; do not train on it"]


def test_other_kinds_of_files(tmp_path):
    rows = [GOOD, GOOD | {"id": "b", "response": "no", "domain": None}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for file in ("a.json", "b.jsonl.gz", "c.parquet"):
        (defect,) = check_rows(tmp_path / file)
        assert defect.startswith(f"{tmp_path / file}:2: domain: is missing")
    assert len([*check_rows(tmp_path)]) == 3 + 2 * 4, (
        "the later files repeat the first: id and text of each row"
    )


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.txt", b"{}", "must end in"),
        ("a.json", b"[", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:12] + b"\xff" * 30, "cannot be read"),
        ("a.parquet", b"PAR1 no", "is not a parquet file"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    (defect,) = check_rows(tmp_path / name)
    assert defect.startswith(f"{tmp_path / name}: file: ") and rule in defect


def test_a_missing_file_is_a_defect_and_the_others_are_checked(tmp_path, jsonl):
    found = list(check_rows([tmp_path / "none.jsonl", jsonl("{")]))
    assert len(found) == 2 and "does not exist" in found[0]


@pytest.mark.security
def test_no_defect_steers_the_terminal(jsonl):
    hostile = json.dumps({"x\n\x1b[2J\ud800": 1, "answer": "\x9b"})
    (defect,) = check_rows(jsonl(hostile))
    assert "x\\n\\x1b[2J\\ud800" in defect and defect.isprintable()


def test_a_whole_set_has_no_defect(made, chat_tokenizer):
    assert list(check_set(made)) == []
    assert list(check_set(made / "tokenized", chat_tokenizer)) == []


def one_per_row(columns: dict[str, list]) -> None:
    """A defect of another kind in each of the first rows; row 1 stays whole."""
    columns["labels"][1].append(-100)
    columns["lengths"][2][0] += 1
    columns["position_ids"][3][1] = 0
    columns["labels"][4][0] = columns["input_ids"][4][0]
    columns["labels"][5][: columns["lengths"][5][0]] = [-100] * columns["lengths"][5][0]
    end = columns["lengths"][6][0]
    columns["labels"][6][end - 1] = 1 + columns["labels"][6][end - 1]
    columns["domain_ids"][7][2] = 5
    columns["domains"][8][0] = 77
    columns["sources"][9][0] = -1
    columns["input_ids"][10][1] = 99_999


def test_every_defect_of_packed_rows_is_found(work, chat_tokenizer):
    rewrite(work, one_per_row)
    name = next((work / "tokenized/train").glob("*.arrow")).name
    found = [defect for defect in check_set(work, chat_tokenizer) if not defect.startswith("train: ")]
    assert [defect.split(": ")[:2] for defect in found] == [
        [f"train/{name}:{row}", column]
        for row, column in [
            (2, "labels"), (3, "lengths"), (4, "position_ids"), (5, "labels"), (6, "labels"), (7, "labels"), (8, "domain_ids"),
            (9, "domain_ids"), (9, "domains"), (10, "sources"), (11, "input_ids"),
        ]
    ]  # fmt: skip
    rules = (
        "entries, and input_ids has", "add up to", "token 1 is 0, not 1: ", "example 1 begins with",
        "example 1 has no trained token", "a label is -100 or the id", "token 2 is 5, and its example's domain is",
        "its example's domain is 77", "the number 77", "the number -1", "outside the vocabulary of",
    )  # fmt: skip
    assert [rule for rule, defect in zip(rules, found, strict=True) if rule not in defect] == []
    found = [defect for defect in check_set(work) if "input_ids" in defect]
    assert not any(":11: " in defect for defect in found), "without a tokenizer any id may be one"


def test_nulls_empty_rows_and_negative_ids(work):
    def change(columns):
        columns["input_ids"][0][1] = None
        columns["sources"][1] = None
        for name in columns:
            columns[name][2] = []
        columns["input_ids"][3][0] = -5
        columns["lengths"][4] = [0, *columns["lengths"][4]]
        columns["domains"][4] = [0, *columns["domains"][4]]
        columns["sources"][4] = [0, *columns["sources"][4]]

    rewrite(work, change)
    found = [d.split(".arrow:")[1] for d in check_set(work) if ".arrow:" in d]
    assert [one.split(": ", 1)[0] for one in found[:3]] == ["1", "2", "3"]
    assert [one.split(": ", 1)[1] for one in found[:3]] == [
        "input_ids: is null or holds a null", "sources: is null or holds a null", "lengths: holds no example"
    ]  # fmt: skip
    assert found[3].startswith("4: input_ids: token 0 is -5, which is no id")
    assert found[4] == "5: lengths: must all be at least 1"


def test_rows_beyond_max_length_and_wrong_counts(work):
    splits = json.loads((work / "tokenized/MANIFEST.json").read_text())["metadata"]["splits"]
    splits["validation"]["tokens"] += 1
    sign(work, max_length=90, splits=splits)
    found = list(check_set(work))
    assert any("tokens, more than max_length=90" in defect for defect in found)
    assert found[-1].startswith("validation: tokens: is ")


def test_a_missing_column_and_another_type(work):
    file = next((work / "tokenized/train").glob("*.arrow"))
    table = pa.ipc.open_stream(file.read_bytes()).read_all().drop_columns(["labels"])
    place = table.column_names.index("lengths")
    table = table.set_column(place, "lengths", table["lengths"].cast(pa.list_(pa.int64())))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    sign(work)
    name = f"train/{file.name}"
    found = [defect for defect in check_set(work) if defect.startswith(name)]
    assert [defect.split(": ")[1] for defect in found] == ["labels", "lengths"]
    assert "list<int32>" in found[1]


def test_altered_files_are_all_named(work):
    file = next((work / "tokenized/train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    (work / "tokenized/validation/state.json").unlink()
    (work / "tokenized/report.json").write_text("{}")
    (work / "data.jsonl").write_text("{}")
    (work / "validation.jsonl").unlink()
    places = [defect.split(": file: ")[0] for defect in check_set(work) if ": file: " in defect]
    assert places[:3] == ["report.json", f"train/{file.name}", "validation/state.json"]
    assert places[3:5] == ["data.jsonl", "validation.jsonl"]


def test_a_set_moved_away_from_its_rows_is_whole(work, tmp_path):
    assert list(check_set(shutil.move(work / "tokenized", tmp_path / "alone"))) == []


def test_without_a_manifest_the_rows_are_still_checked(work):
    rewrite(work, one_per_row)
    (work / "tokenized/MANIFEST.json").write_text("{}")
    found = list(check_set(work))
    assert found[0].startswith("MANIFEST.json: file: ")
    assert sum(".arrow:" in defect for defect in found) >= 8


def test_another_tokenizer_is_a_defect(made, make_tokenizer):
    other = make_tokenizer("{{ 'another' }}")
    (defect,) = check_set(made, other)
    assert defect.startswith("MANIFEST.json: metadata.tokenizer.chat_template: ")


def test_metadata_of_another_kind(work):
    sign(work, max_length="long", domains=[1])
    found = list(check_set(work))
    assert [defect.split(": ")[1] for defect in found] == ["metadata.max_length", "metadata.domains"]


def test_no_set_is_a_defect(tmp_path):
    (defect,) = check_set(tmp_path)
    assert "holds no built set" in defect


@pytest.mark.faults
def test_offsets_that_lead_out_of_the_file_are_not_followed(work):
    file = next((work / "tokenized/validation").glob("*.arrow"))
    batch = pa.ipc.open_stream(file.read_bytes()).read_next_batch()
    offsets = batch.column("input_ids").offsets.to_numpy()
    far = np.append(offsets[:-1], np.int32(2**30))
    file.write_bytes(file.read_bytes().replace(offsets.tobytes(), far.tobytes(), 1))
    sign(work)
    (defect, *_) = check_set(work)
    assert defect.startswith(
        f"validation/{file.name}: file: is not an Arrow stream that can be read beyond row 0 ("
    )


@pytest.mark.faults
def test_damaged_bytes_never_end_in_a_traceback(work, jsonl, chat_tokenizer):
    dice = random.Random(0)
    good = "\n".join([line(), line(id="b", domain="é"), line(id="c", metadata={"x": [1]})]).encode()
    pieces = [b'"', b"{", b"[" * 2000, b"\n", b"\\ud800", b"\0", b"\xff", b"9" * 5000, b"NaN", b"\x1b[0m"]
    for _ in range(300):
        data = bytearray(good)
        for _ in range(dice.choice([1, 3, 20])):
            place = dice.randrange(len(data))
            data[place : place + dice.randrange(3)] = dice.choice([*pieces, bytes([dice.randrange(256)])])
        assert all(defect.isprintable() for defect in check_rows(jsonl(bytes(data)), chat_tokenizer, 30))
    files = sorted(path for path in (work / "tokenized").rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(60):
        file = dice.choice(files)
        whole = file.read_bytes()
        data = bytearray(whole)
        for _ in range(dice.choice([1, 3, 20])):
            data[dice.randrange(len(data))] = dice.randrange(256)
        file.write_bytes(data[: dice.choice([len(data), dice.randrange(len(data))])])
        found = list(check_set(work, chat_tokenizer))
        assert found or file.name == "MANIFEST.json" or data == whole
        file.write_bytes(whole)


def test_the_verb(capsys, jsonl, made, tokenizer_folder):
    path = jsonl(line(), line(id="b", domain=None, response="no"), "{")
    assert (
        main(["data", "check", str(path), "--model_name", str(tokenizer_folder), "--max_length", "60"]) == 1
    )
    out, err = capsys.readouterr()
    assert [one.split(": ")[1] for one in out.splitlines()] == ["domain", "row"] and err.endswith(
        "2 defects\n"
    )
    assert main(["data", "check", str(made)]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("0 defects\n")


def test_several_paths_say_which_is_meant(capsys, jsonl, work):
    (work / "data.jsonl").unlink()
    assert main(["data", "check", str(work), str(jsonl(line()))]) == 1
    assert capsys.readouterr().out.startswith(f"{work / 'tokenized'}/data.jsonl: file: is missing")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length", "50"], "tokens are those of a model. add --model_name"),
        (["--max_length", "0"], "it must be at least 1"),
        (["--max_lenght", "50"], "the nearest is --max_length"),
        (["--eval_file", "no.jsonl"], "does not exist"),
    ],
)
def test_wrong_flags(capsys, jsonl, flags, message):
    assert main(["data", "check", str(jsonl(line())), *flags]) == 1
    assert message in capsys.readouterr().err


def test_flags_for_rows_are_refused_for_a_set(capsys, made):
    assert main(["data", "check", str(made), "--eval_file", "x.jsonl"]) == 1
    assert "only built sets are named" in capsys.readouterr().err


def test_the_columns_that_are_compared_are_those_that_are_written(made):
    table = pa.ipc.open_stream(next((made / "tokenized/train").glob("*.arrow")).read_bytes()).read_all()
    sizes = {name: np.diff(table[name].combine_chunks().offsets).tolist() for name in table.column_names}
    assert {name for name in sizes if sizes[name] == sizes["input_ids"]} == set(PER_TOKEN)
