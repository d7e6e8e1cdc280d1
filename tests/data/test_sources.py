"""The registry: our entries, and what is said about wrong ones of a user's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hub_rows import REPOSITORIES
from srde.data.domains import DOMAINS
from srde.data.sources.converters import CONVERTERS
from srde.data.sources.registry import Source, as_evaluation, choose_sources, read_sources, registered
from srde.errors import ConfigError

NAMED = {  # data set -> its entries
    "GSM8K": {"gsm8k"}, "MetaMathQA": {"metamathqa"}, "Orca-Math": {"orca_math"}, "LogiQA": {"logiqa"}, "ReClor": {"reclor"},
    "HellaSwag": {"hellaswag"}, "BIG-bench": {"bigbench_logical_deduction", "bigbench_word_sorting"},
    "CommonsenseQA": {"commonsense_qa"}, "CodeAlpaca": {"code_alpaca"}, "Code-Feedback": {"code_feedback"}, "MBPP": {"mbpp"},
    "HumanEval": {"humaneval"}, "SciQ": {"sciq"}, "ARC": {"arc_challenge", "arc_easy"}, "SciBench": {"scibench"},
    "MMLU": {"mmlu"},    "AQuA-RAT": {"aqua_rat"}, "BoardgameQA": {"boardgame_qa"}, "HotpotQA": {"hotpotqa"},
    "SCROLLS": {"scrolls_qasper", "scrolls_quality"}, "PIQA": {"piqa"}, "WinoGrande": {"winogrande"},
}  # fmt: skip
UNSCORED = {"metamathqa", "orca_math", "code_alpaca", "code_feedback"}  # free text, nothing to compare with
KINDS = {"number", "number_tol5pct", "choice", "exact", "short_text", "code"}


# --- ours ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_set", NAMED)
def test_a_data_set_that_is_named_is_there_whole(data_set):
    for name in NAMED[data_set]:
        source = registered()[name]
        assert source.name == name
        assert source.hub in REPOSITORIES
        assert source.license and source.domain in DOMAINS and source.converter in CONVERTERS
        # BIG-bench's converter says of each row whether it is scored by choice or by text.
        unscored = name in UNSCORED or source.converter == "bigbench"
        assert source.kind is None if unscored else source.kind in KINDS
        assert source.train or source.evaluation
        assert not set(source.train) & set(source.evaluation)
        assert bool(source.train) == bool(source.rows)


def test_no_entry_is_left_over_and_each_domain_has_something_to_train_on_and_to_be_tested_by():
    assert set(registered()) == set().union(*NAMED.values())
    assert {source.domain for source in registered().values() if source.train} == set(DOMAINS)
    assert {source.domain for source in registered().values() if source.evaluation} == set(DOMAINS)


@pytest.mark.parametrize(
    "name", ["humaneval", "mmlu", "bigbench_logical_deduction", "bigbench_word_sorting", "scibench"]
)
def test_benchmarks_are_never_trained_on(name):
    source = registered()[name]
    assert source.train == () and source.evaluation


def test_test_splits_are_only_for_evaluation():
    for source in registered().values():
        assert "test" not in source.train
        if "train" in source.train and source.name not in UNSCORED:
            assert source.evaluation, source.name


@pytest.mark.parametrize("name", sorted(set().union(*NAMED.values())))
def test_configurations_and_splits_are_those_of_the_hub(name):
    source = registered()[name]
    files = REPOSITORIES[source.hub].files
    if source.files:
        assert set(source.files) == {*source.train, *source.evaluation}
        at = {
            f"zip://{file.path.split('!')[1]}::hf://datasets/{source.hub}/{file.path.split('!')[0]}"
            for file in files
        }
        assert set(source.files.values()) <= at
        return
    own = [file for file in files if source.config in (None, file.config)]
    assert {*source.train, *source.evaluation} <= {file.split for file in own}
    assert len({file.config for file in own}) == 1  # else the entry must say which
    if REPOSITORIES[source.hub].revision != "main":
        assert source.revision == REPOSITORIES[source.hub].revision
    # Splits whose answers are hidden serve nobody.
    assert not {file.split for file in own if file.hidden} & {*source.train, *source.evaluation}


# --- the user's ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path):
    def from_text(content: str | bytes) -> dict[str, Source]:
        path = tmp_path / "my.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_sources(path)

    return from_text


def one(**keys: str) -> str:
    return "sources:\n  mine: {" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}\n"


def test_a_good_entry(read, tmp_path):
    found = read("""
sources:
  my-questions.v1:
    path: in/questions.jsonl
    domain: math
    license: MIT
    converter: choice
    fields: {question: q, options: choices, answer: gold}
    near_duplicates: false
  other: {hub: me/other, config: all, revision: v2, rows: 100}
  tasks: {gym: chain_sum, rows: 50, settings: {min_terms: 2}}
  held_out: {path: /data/test.jsonl, evaluation: true}
  both: {hub: me/both, train: train, evaluation: [test, dev]}
  neither: {path: a.jsonl, train: false, evaluation: false}
""")
    mine = found["my-questions.v1"]
    assert mine == Source(
        "my-questions.v1", path=str(tmp_path / "in/questions.jsonl"), domain="math", license="MIT", converter="choice",
        fields={"question": "q", "options": "choices", "answer": "gold"}, near_duplicates=False, train=("all",),
    )  # fmt: skip
    assert found["other"] == Source(
        "other", hub="me/other", config="all", revision="v2", rows=100, train=("train",)
    )
    assert found["tasks"] == Source(
        "tasks", gym="chain_sum", rows=50, settings={"min_terms": 2}, train=("all",)
    )
    assert found["held_out"] == Source("held_out", path="/data/test.jsonl", evaluation=("all",))
    assert found["both"].train == ("train",) and found["both"].evaluation == ("test", "dev")
    assert found["neither"].train == found["neither"].evaluation == ()
    assert [source.place for source in found.values()][1:3] == ["me/other (all)", "reasoning-gym's chain_sum"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (one(path="a.jsonl", domian="math"), "mine.domian='math': there is no such key. the nearest is domain."),
        (one(path="a.jsonl", name="b"), "mine.name='b': there is no such key"),
        (one(path="a.jsonl", zzzz="1"), "mine.zzzz=1: there is no such key. leave it out."),
        (one(path="a.jsonl", **{"3": "1"}), "mine.3=1: there is no such key"),
        (one(path="a.jsonl", hub="a/b"), "exactly one of hub, path and gym says where the rows are"),
        (one(gym="chain_sum", hub="a/b", rows="3"), "exactly one of hub, path and gym says where the rows are"),
        (one(domain="math"), "mine.path=None: exactly one of hub, path and gym says where the rows are. give one."),
        (one(path='""'), "exactly one of hub, path and gym"),
        (one(path="a.jsonl", converter="chioce"), "mine.converter='chioce': it must be one of alpaca, bigbench, "),
        (one(gym="chain_sum"), "mine.rows=None: a gym task makes as many rows as it is told to. say how many."),
        (one(gym="chain_sum", rows="0"), "mine.rows=0: a gym task makes as many rows as it is told to"),
        (one(gym="chain_sum", rows="many"), "mine.rows='many': it must be int"),
        (one(gym="chain_sum", rows="2.5"), "mine.rows=2.5: it must be int"),
        (one(gym="chain_sum", rows="true"), "mine.rows=True: it must be int"),
        (one(gym="chain_sum", rows="-5"), "mine.rows=-5: "),
        (one(path="3"), "mine.path=3: it must be str"),
        (one(path="a.jsonl", domain="[math]"), "mine.domain=['math']: it must be str"),
        (one(path="a.jsonl", license="1"), "mine.license=1: it must be str"),
        (one(path="a.jsonl", domain=""), "mine.domain=None: it must be str"),
        (one(path="a.jsonl", converter="3"), "mine.converter=3: it must be str"),
        (one(path="a.jsonl", fields="question"), "mine.fields='question': it must be a mapping"),
        (one(path="a.jsonl", settings="[1]"), "mine.settings=[1]: it must be a mapping"),
        (one(hub="a/b", files="x.jsonl"), "mine.files='x.jsonl': it must be a mapping"),
        (one(path="a.jsonl", near_duplicates="sometimes"), "mine.near_duplicates='sometimes': it must be bool"),
        (one(path="a.jsonl", near_duplicates="1"), "mine.near_duplicates=1: it must be bool"),
        (one(hub="a/b", train="3"), "mine.train=3: it must be true, false, or a list of splits"),
        (one(hub="a/b", train="[train, 3]"), "mine.train=['train', 3]: it must be true, false, or a list of splits"),
        (one(hub="a/b", evaluation="{a: b}"), "mine.evaluation={'a': 'b'}: it must be true, false, or a list of splits"),
        (one(hub="a/b", train="[../../etc]"), "mine.train='../../etc': a split is named by letters, digits"),
        (one(hub="a/b", evaluation="/etc"), "mine.evaluation='/etc': a split is named by letters, digits"),
        (one(hub="a/b", train="[..]"), "mine.train='..': a split is named by letters, digits"),
        (one(hub="a/b", train='[""]'), "mine.train='': a split is named by letters, digits"),
        ("sources:\n  mine: a.jsonl\n", "mine='a.jsonl': an entry must be a mapping. give its keys."),
        ("sources:\n  mine:\n", "mine=None: an entry must be a mapping"),
        ("sources: [a, b]\n", 'it must have the key "sources" with one entry per data set'),
        ("sources: {}\n", 'it must have the key "sources" with one entry per data set'),
        ("mine: {path: a.jsonl}\n", 'it must have the key "sources" with one entry per data set'),
        ("- sources\n", 'it must have the key "sources" with one entry per data set'),
        ("", 'it must have the key "sources" with one entry per data set'),
        ("sources: {mine: {path: a}\n", "it must be a YAML file ("),
        ("\tsources:\n", "it must be a YAML file ("),
        (b"\xff\xfe\xfd", "it must be a YAML file ("),
        ("sources:\n  ? [a]\n  : b\n", "it must be a YAML file ("),
        ("sources: " + "[" * 5000, "it must be a YAML file ("),
        ("sources:\n  mine: {path: a.jsonl}\n  mine: {path: b.jsonl}\n", "mine"),
    ],
)  # fmt: skip
def test_each_wrong_thing_is_named(read, tmp_path, content, message):
    with pytest.raises(ConfigError) as caught:
        read(content)
    assert message in str(caught.value)
    assert str(tmp_path / "my.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.security
@pytest.mark.parametrize(
    "name", ["../x", "/abs", ".hidden", "a/b", "..", "-x", "a b", "é", "x" * 81, '""', "'a\\b'", '"a\\nb"']
)
def test_a_name_that_would_lead_elsewhere_is_refused(read, name):
    rule = (
        "a name has letters, digits, '_', '.' and '-', begins with a letter or digit and is at most 80 long"
    )
    with pytest.raises(ConfigError, match=re.escape(rule)):
        read(f"sources:\n  {name}: {{path: a.jsonl}}\n")


@pytest.mark.security
@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_yaml_executes_nothing(read, tmp_path, tag):
    trap = tmp_path / "trap"
    with pytest.raises(ConfigError, match="it must be a YAML file"):
        read(f"sources: {tag} [{trap}]\n")
    assert not trap.exists()


def test_a_missing_file_and_a_folder_are_no_yaml_file(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="it must be a YAML file"):
            read_sources(path)


# --- what --sources takes ----------------------------------------------------------------------------------------------------


def test_names_and_commas_give_registered_sources_in_the_order_asked_for():
    chosen = choose_sources(["winogrande,gsm8k", "mmlu", "gsm8k"])
    assert [source.name for source in chosen] == ["winogrande", "gsm8k", "mmlu"]
    assert chosen[1] is registered()["gsm8k"]
    assert choose_sources([]) == choose_sources([","]) == []


def test_yaml_files_data_files_and_folders(tmp_path):
    (tmp_path / "my.yaml").write_text(one(path="rows.jsonl", domain="math"))
    (tmp_path / "more.yml").write_text("sources:\n  third: {hub: a/b}\n")
    names = ["a.jsonl", "b.v1.jsonl.gz", "c.json", "d.parquet"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    given = [str(tmp_path / name) for name in ["my.yaml", "more.yml", *names, "folder"]]
    chosen = choose_sources([*given[:2], ",".join(given[2:4]), *given[4:], "gsm8k"])
    assert [source.name for source in chosen] == ["mine", "third", "a", "b.v1", "c", "d", "folder", "gsm8k"]
    assert chosen[0].path == str(tmp_path / "rows.jsonl")
    assert chosen[2] == Source("a", path=str(tmp_path / "a.jsonl"), train=("all",))
    assert chosen[6] == Source("folder", path=str(tmp_path / "folder"), train=("all",))


def test_a_folder_below_home_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    assert choose_sources(["~/rows.jsonl"])[0].path == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("gsm8", "did you mean 'gsm8k'? `srde data sources` lists all"),
        ("winogrand", "did you mean 'winogrande'?"),
        ("qqqqqq", "`srde data sources` lists the registered ones"),
        ("absent.jsonl", "`srde data sources` lists the registered ones"),
        ("notes.txt", "`srde data sources` lists the registered ones"),
    ],
)
def test_an_unknown_name_gets_the_nearest(tmp_path, monkeypatch, name, fix):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").touch()
    with pytest.raises(ConfigError) as caught:
        choose_sources(["mmlu", name])
    assert str(caught.value).startswith(
        f"sources={name!r}: it must be a registered source, a YAML file, a data file (.jsonl, "
    )
    assert fix in str(caught.value)


@pytest.mark.security
@pytest.mark.parametrize("name", [".hidden.jsonl", "a b.jsonl", ".jsonl"])
def test_a_file_whose_name_cannot_name_a_source_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"a name has letters, digits, .* rename it"):
        choose_sources([str(tmp_path / name)])


def test_two_sources_of_one_name_are_refused(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "rows.jsonl").touch()
    (tmp_path / "my.yaml").write_text("sources:\n  gsm8k: {path: rows.jsonl}\n")
    for names in (["one/rows.jsonl", "two/rows.jsonl"], ["my.yaml", "gsm8k"], ["gsm8k", "my.yaml"]):
        with pytest.raises(ConfigError, match=r"two different sources have this name\. rename one"):
            choose_sources([name if name in registered() else str(tmp_path / name) for name in names])
    same = str(tmp_path / "one/rows.jsonl")
    assert len(choose_sources([same, same])) == 1


def test_sources_for_evaluation_give_all_their_rows(tmp_path):
    file, task = (
        Source("file", path="a.jsonl", train=("all",)),
        Source("task", gym="aiw", rows=3, train=("all",)),
    )
    named = Source("named", path="b.jsonl", evaluation=("all",))
    hub = Source("hub", hub="a/b", train=("train",), evaluation=("test",))
    found = as_evaluation([file, task, named, hub])
    assert [(source.train, source.evaluation) for source in found[:3]] == [((), ("all",))] * 3
    assert found[3] == hub  # its evaluation splits alone count; the others are not read
