"""What a build must not trip over: the user's own files, sorted files, dates, hash seeds, long rows, large row groups."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from data_sets import result, rows, write_rows
from srde.cli import main
from srde.data.build import finish, plan, workers
from srde.data.build.build import build, merge
from srde.data.build.fingerprint import NGrams, hash_words
from srde.data.loader import PackedDataset, RowOrder
from srde.data.rows import read_rows
from srde.data.sources import files
from srde.errors import ConfigError, UsageError
from tiny import CHAT_TEMPLATE, tiny_tokenizer


@pytest.mark.parametrize("name", ["data.jsonl", "README.md", "tokenized"])
def test_the_users_own_files_are_not_replaced(make, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).mkdir() if name == "tokenized" else (tmp_path / "mine" / name).write_text(
        "mine"
    )
    with pytest.raises(UsageError, match=rf"it holds {name}, which no build of ours has put there"):
        build(make("mine"))
    assert name == "tokenized" or (tmp_path / "mine" / name).read_text() == "mine"


def test_an_edited_card_stays(make, tmp_path):
    build(make("out"))
    card = tmp_path / "out/README.md"
    card.write_text(card.read_text() + "more")
    assert not build(make("out")).fresh and card.read_text().endswith("more")


@pytest.mark.slow
def test_a_file_sorted_by_domain(make, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_ROWS", 20)
    made = rows(600, seed=4)
    for place, row in enumerate(made):
        row["domain"] = ("math", "logic", "law")[place % 3 if place < 60 else 0]
    made.sort(key=lambda row: row["domain"])
    path = write_rows(tmp_path / "sorted.jsonl", made)
    built = build(make("out", sources=[str(path)], examples_per_domain=15, validation_fraction=0.0))
    assert {name: counts["train"] for name, counts in built.report["domains"].items()} == {
        "math": 15,
        "logic": 15,
        "law": 15,
    }
    built = build(
        make("law", sources=[str(path)], examples_per_domain=15, domains=["law"], validation_fraction=0.0)
    )
    assert built.report["domains"]["law"]["train"] == 15
    monkeypatch.setattr(files, "CHUNK_ROWS", 1024)
    parts = [tmp_path / "a", tmp_path / "b"]
    for index, part in enumerate(parts):
        build(make(part, sources=[str(path)], shard_index=index, num_shards=2))
    before = os.getcwd()
    os.chdir(tmp_path / "a")
    try:  # from another folder, too
        assert merge(parts, tmp_path / "merged").report["domains"]["law"]["train"] > 0
    finally:
        os.chdir(before)


def test_a_part_that_took_the_result_says_so_again(make, tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    for index, part in enumerate(parts):
        build(make(part, shard_index=index, num_shards=2))
    assert merge(parts, parts[0]).fresh
    assert not merge(parts, parts[0]).fresh


@pytest.mark.slow
def test_a_template_that_asks_for_the_day(make, tmp_path, monkeypatch):
    dated = "{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE
    folder = tmp_path / "dated"
    tiny_tokenizer(dated).save_pretrained(folder)

    def day(work_dir, today, **changes):
        class Day(plan.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(today)

        monkeypatch.setattr(plan, "date", Day)
        settings = make(work_dir, **changes)
        settings.model_name = str(folder)
        return build(settings)

    day("one", "2026-01-31", shard_index=0, num_shards=2)
    day("two", "2026-01-31", shard_index=1, num_shards=2)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    ids = PackedDataset(tmp_path / "merged")[0].input_ids
    assert tiny_tokenizer().decode(ids).startswith("31 Jan 2026")
    day("late", "2026-02-01", shard_index=1, num_shards=2)
    with pytest.raises(UsageError, match="part of another build: date is '2026-02-01', and '2026-01-31' in"):
        merge([tmp_path / "one", tmp_path / "late"], tmp_path / "not")
    day("pinned", "2026-02-01", template_date="2026-01-31")
    assert result(tmp_path / "pinned") == result(tmp_path / "merged")
    # A build goes on with the day that it began.
    monkeypatch.setattr(finish, "write_split", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        day("resumed", "2026-01-31")
    monkeypatch.undo()
    day("resumed", "2026-03-03")
    assert result(tmp_path / "resumed") == result(tmp_path / "merged")
    with pytest.raises(ConfigError, match="template_date='tomorrow': it must be a date"):
        make("x", template_date="tomorrow")


@pytest.mark.slow
def test_generated_rows_do_not_depend_on_the_hash_seed(tmp_path):
    """Both tasks give other rows in another process if nothing is done about it."""
    program = """
import sys
from srde.data.sources.gym import gym_spans, read_gym
for task in ("ransom_note", "list_functions"):
    for span in gym_spans(task, 40):
        print(list(read_gym(span, 3, 40, {})))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].returncode == 0 and runs[0].stdout == runs[1].stdout and len(runs[0].stdout) > 5000


def test_long_rows_take_no_more_memory_than_they_must():
    texts = [f"{place} " + "the quick brown fox jumps over lazy dogs " * 3000 for place in range(100)]
    tracemalloc.start()
    batch = hash_words(texts)
    NGrams(batch).windows(13)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * sum(map(len, texts))


def test_parquet_in_one_large_row_group(make, tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    monkeypatch.setattr(files, "CHUNK_ROWS", 16)
    made = rows(120, seed=1)
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet", row_group_size=10_000)
    opened = files.open_file(tmp_path / "rows.parquet", "rows.parquet", tmp_path / "scratch")
    assert pq.ParquetFile(opened.spans[0].path).num_row_groups == 8 and set(opened.domains) == {
        row["domain"] for row in made
    }
    found = [record for span in opened.spans for _, record in files.read_span(span)]
    assert found == made
    write_rows(tmp_path / "same/rows.jsonl", made)
    build(make("parquet", sources=[str(tmp_path / "rows.parquet")]))
    build(make("jsonl", sources=[str(tmp_path / "same/rows.jsonl")]))
    assert (tmp_path / "parquet/data.jsonl").read_bytes() == (tmp_path / "jsonl/data.jsonl").read_bytes()


@pytest.mark.faults
def test_a_process_that_is_killed_is_explained(make, monkeypatch):
    monkeypatch.setattr(finish, "write_rows", _die)
    with pytest.raises(UsageError, match=r"one of the build's processes died; .* finished chunks are kept"):
        build(make("out"))
    monkeypatch.setattr(workers, "make_rows", _die)
    with pytest.raises(UsageError, match=r"one of the build's processes died"):
        build(make("other"))


def _die(*_):
    os.kill(os.getpid(), 9)


def test_names_that_look_like_markup(make, tmp_path, capfd, tokenizer_folder):
    made = [{**row, "domain": "[/b]", "source": "[red]x"} for row in rows(40, seed=3)]
    path = write_rows(tmp_path / "rows.jsonl", made)
    flags = [
        "--model_name",
        str(tokenizer_folder),
        "--sources",
        str(path),
        "--max_length",
        "768",
        "--examples_per_domain",
        "9",
    ]
    assert main(["data", "build", *flags, "--work_dir", str(tmp_path / "o[/v2]")]) == 0
    assert "[/b]" in capfd.readouterr().out


def test_test_sets_under_other_names(make, tmp_path):
    hidden = tmp_path / "my.yaml"
    hidden.write_text(
        "sources:\n  mine:\n    hub: openai/openai_humaneval\n    train: [test]\n    domain: code\n    license: MIT\n"
    )
    with pytest.raises(ConfigError, match=r"mine\.train='test': this is a test set \(humaneval\)"):
        build(make("out", sources=[str(hidden)]))
    with pytest.raises(
        ConfigError, match=r"eval_sources='metamathqa': this source has no rows for evaluation"
    ):
        build(make("out", eval_sources=["metamathqa"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{promt: q}", "fields.promt='q': the converter columns has no such setting. the nearest is prompt"),
        ("{prompt: [a, b]}", "fields.prompt=['a', 'b']: it must be str"),
        ("{shuffle: true}", "fields.shuffle=True: the converter columns has no such setting"),
    ],
)
def test_settings_of_converters_are_checked(make, tmp_path, fields, message):
    yaml = tmp_path / "my.yaml"
    yaml.write_text(f"sources:\n  mine:\n    path: a.jsonl\n    converter: columns\n    fields: {fields}\n")
    with pytest.raises(ConfigError) as caught:
        build(make("out", sources=[str(yaml)]))
    assert message in str(caught.value)


def test_a_folder_that_holds_the_work_folder(make, tmp_path):
    folder = tmp_path / "in"
    build(make(folder / "out", sources=[str(folder)]))
    assert not build(make(folder / "out", sources=[str(folder)])).fresh


def test_indentation_and_line_ends(make, tmp_path):
    passage = (
        "One line.\r\nAnother line with many words to be alike by far more than anything else is.\r\n" * 4
    )
    made = [
        {
            "domain": "code",
            "document": passage,
            "prompt": f"{passage}\nWhat is {place}?",
            "response": f"\n\n    return {word}  \n",
        }
        for place, word in enumerate(("apple", "stone", "river"))
    ]
    path = write_rows(tmp_path / "rows.jsonl", made)
    built = build(make("out", sources=[str(path)], max_length=4096, validation_fraction=0.0))
    assert built.report["domains"]["code"]["near_duplicates"] == 0
    found = {row.response for row in read_rows(tmp_path / "out/data.jsonl")}
    assert found == {f"    return {word}" for word in ("apple", "stone", "river")}


def test_other_ids_for_the_same_vocabulary_are_another_tokenizer(make, tokenizer_folder, tmp_path):
    build(make("out", shard_index=0, num_shards=2))
    other = tiny_tokenizer()
    other.eos_token = "<|endoftext|>"
    other.save_pretrained(tmp_path / "other")
    settings = make("out", shard_index=0, num_shards=2)
    settings.model_name = str(tmp_path / "other")
    with pytest.raises(UsageError, match=r"another (model|tokenizer\.steps)"):
        build(settings)


@pytest.mark.parametrize("order", ["curriculum", "balanced"])
def test_single_examples_keep_the_sets_order(make, tmp_path, order):
    build(make("out"))
    packed = PackedDataset(tmp_path / "out", order=order)
    single = packed.examples()
    in_rows = [ids for row in packed for ids in _split(row)]
    assert [tuple(single[place].input_ids) for place in range(len(single))] == in_rows
    assert list(RowOrder(single)) == (
        list(range(len(single))) if order == "curriculum" else list(single.epoch(0))
    )


def _split(row):
    starts = [place for place, position in enumerate(row.position_ids) if position == 0] + [
        len(row.input_ids)
    ]
    return [tuple(row.input_ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]


def test_options_that_would_be_ignored_are_refused(make, capfd):
    with pytest.raises(ConfigError, match="upload_repo='me/x': a part is not uploaded"):
        make("out", upload_repo="me/x", num_shards=2)
    flags = [
        "train",
        "--model_name_or_path",
        "m",
        "--train_file",
        "a.jsonl",
        "--output_dir",
        "o",
        "--data_order",
        "balanced",
    ]
    assert main(flags) == 1
    assert "data_order='balanced': only packed sets have an order of their own" in capfd.readouterr().err


def test_half_a_character_outside_the_texts(make, tmp_path, capfd):
    path = tmp_path / "in" / "bad.jsonl"
    good = rows(3, seed=9)
    lines = [
        json.dumps({**good[0], "note": {"a": ["\ud800"]}}),
        json.dumps({**good[1], "answer": "\udfff"}),
        json.dumps(good[2]),
    ]
    path.write_text("\n".join(lines))
    assert main(["data", "check", str(path)]) == 1
    out = capfd.readouterr().out
    assert (
        f"{path}:1: note: holds the lone surrogate \\ud800" in out
        and f"{path}:2: answer: holds the lone" in out
    )
    built = build(make("out", sources=[str(path)], on_bad_row="skip"))
    assert built.report["entries"]["bad"]["bad row"] == 2


def test_a_commit_and_the_network_are_needed_once(make, tmp_path, monkeypatch):
    """What a build that goes on has recorded is not asked for again."""
    asked = []
    monkeypatch.setattr(plan, "resolve_revision", lambda source: asked.append(source.name) or "c" * 40)
    monkeypatch.setattr(workers, "stream", lambda *_: iter([_table(rows(30, seed=6))]))
    yaml = tmp_path / "my.yaml"
    yaml.write_text(
        "sources:\n  mine:\n    hub: me/mine\n    domain: math\n    converter: columns\n    fields: {id: id}\n"
    )
    wanted = {"sources": [str(yaml)], "eval_sources": [], "shard_index": 0, "num_shards": 2}
    build(make("out", **wanted))
    assert asked == ["mine"]
    monkeypatch.setattr(plan, "resolve_revision", lambda source: 1 / 0)
    monkeypatch.setattr(workers, "stream", lambda *_: 1 / 0)
    build(make("out", **wanted))
    assert Path(tmp_path / "out/.build/shard.json").is_file()


def _table(made):
    import pyarrow as pa

    return pa.Table.from_pylist(
        [{"prompt": row["prompt"], "response": row["response"], "id": row["id"]} for row in made]
    )
