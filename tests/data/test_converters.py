"""Converters on rows laid out as the public data sets are, and on rows that are not."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from data_sets import write_rows
from hub_rows import REPOSITORIES, drawn_rows
from srde.data.build.tasks import Chunk, Dropped, records
from srde.data.rows import Row
from srde.data.sources.converters import (
    ASK_LETTER,
    CONVERTERS,
    LETTERS,
    Converted,
    MissingColumn,
    UnusableValue,
    choice,
    column,
    text,
)
from srde.data.sources.files import open_file
from srde.data.sources.registry import Source, registered
from srde.errors import DataError

NAMES = sorted(registered())
COUNT = 25


def hub_rows(name: str, hidden: bool = False) -> list[dict]:
    """Rows of a source's splits, or of those whose answers are hidden."""
    source = registered()[name]
    drawn = drawn_rows(source.hub, COUNT, seed=1)
    found = []
    for file in REPOSITORIES[source.hub].files:
        if source.config not in (None, file.config) or bool(file.hidden) is not hidden:
            continue
        named = not source.files or any(file.path.split("!")[-1] in place for place in source.files.values())
        if hidden or (named and file.split in {*source.train, *source.evaluation}):
            found += drawn[file.path]
    return found


def convert(name: str, row: dict) -> Converted | None:
    source = registered()[name]
    return CONVERTERS[source.converter](row, source.fields)


def first(name: str, **changes: object) -> Converted | None:
    return convert(name, {**hub_rows(name)[0], **changes})


# --- every data set --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_row_becomes_a_row_of_ours(tmp_path, name):
    source = registered()[name]
    path = write_rows(tmp_path / "rows.jsonl", hub_rows(name))
    (span,) = open_file(path, "rows.jsonl", tmp_path).spans
    made = [row for _, row in records(Chunk(replace(source, hub=None, path=str(path)), span, ""), seed=0)]
    assert len(made) >= COUNT // 2
    for row in made:
        assert isinstance(row, Row) and row.response.strip(), row
        assert row.prompt[-1]["role"] == "user" and len(row.prompt[-1]["content"]) > 20
        assert (row.domain, row.license, row.source) == (source.domain, source.license, name)
        assert row.id.startswith(f"{name}/")
        if source.kind:
            assert row.kind == source.kind and row.answer not in (None, "")
    assert len({row.id for row in made}) == len(made)
    assert len({row.prompt[-1]["content"] for row in made}) > len(made) / 2


TRUTHS = {
    "aqua_rat": lambda row: row["options"][LETTERS.index(row["correct"])].split(")", 1)[1],
    "arc_challenge": lambda row: row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])],
    "bigbench_logical_deduction": lambda row: row["targets"][0],
    "commonsense_qa": lambda row: row["choices"]["text"]["ABCDE".index(row["answerKey"])],
    "hellaswag": lambda row: row["endings"][int(row["label"])],
    "logiqa": lambda row: row["options"][row["correct_option"]],
    "mmlu": lambda row: row["choices"][row["answer"]],
    "piqa": lambda row: (row["sol1"], row["sol2"])[row["label"]],
    "reclor": lambda row: row["answers"][row["label"]],
    "sciq": lambda row: row["correct_answer"],
    "scrolls_quality": lambda row: row["options"][row["answer"]],
    "winogrande": lambda row: row[f"option{row['answer']}"],
}
TRUTHS["arc_easy"] = TRUTHS["arc_challenge"]


@pytest.mark.parametrize("name", sorted(TRUTHS))
def test_the_letter_is_that_of_the_right_option(name):
    letters = Counter()
    for row in hub_rows(name):
        made, again = convert(name, row), convert(name, row)
        assert made == again
        head, _, listed = made.prompt.partition("\n\nOptions:\n")
        assert head and listed.endswith(f"\n\n{ASK_LETTER}")
        options = dict(line.split(") ", 1) for line in listed.removesuffix(f"\n\n{ASK_LETTER}").split("\n"))
        assert list(options) == list(LETTERS[: len(options)]) and len(options) >= 2
        assert options[made.answer] == str(TRUTHS[name](row)).strip()
        assert made.response.splitlines()[-1] == f"The answer is {made.answer}) {options[made.answer]}"
        assert made.kind == "choice"
        letters[made.answer] += 1
    # Also where the data set's right option is always the first.
    assert len(letters) >= 2 and max(letters.values()) < 0.8 * letters.total()


def test_every_entry_with_letters_is_checked_above():
    assert {name for name in NAMES if registered()[name].converter in ("choice", "winogrande")} < set(TRUTHS)


@pytest.mark.parametrize("name", ["commonsense_qa", "hellaswag", "piqa", "winogrande", "scrolls_qasper"])
def test_rows_whose_answers_are_hidden_are_left_out(name):
    rows = hub_rows(name, hidden=True)
    assert rows and all(convert(name, row) is None for row in rows)


NEEDED = {
    "gsm8k": "question answer", "metamathqa": "query response original_question", "orca_math": "question answer",
    "logiqa": "context query options correct_option", "reclor": "context question answers label id_string",
    "hellaswag": "ctx endings label", "bigbench_logical_deduction": "inputs multiple_choice_targets multiple_choice_scores",
    "bigbench_word_sorting": "inputs targets multiple_choice_targets multiple_choice_scores",
    "commonsense_qa": "question choices answerKey id", "code_alpaca": "instruction output", "code_feedback": "messages id",
    "mbpp": "text code test_list task_id", "humaneval": "prompt canonical_solution test entry_point task_id",
    "sciq": "question correct_answer distractor1 distractor2 distractor3 support", "arc_easy": "question choices answerKey id",
    "arc_challenge": "question choices answerKey id", "scibench": "problem_text answer_number problemid",
    "mmlu": "question choices answer", "aqua_rat": "question options correct rationale", "boardgame_qa": "example label",
    "hotpotqa": "question answer context supporting_facts id", "scrolls_qasper": "input output id",
    "scrolls_quality": "article question options answer", "piqa": "goal sol1 sol2 label",
    "winogrande": "sentence option1 option2 answer",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_column_is_named_with_those_that_are_there(name):
    row = hub_rows(name)[0]
    for missing in NEEDED[name].split():
        less = {key: value for key, value in row.items() if key != missing}
        with pytest.raises(MissingColumn) as caught:
            convert(name, less)
        assert caught.value.column.split(".")[0] == missing
        assert caught.value.found == list(less)


# --- what is theirs alone --------------------------------------------------------------------------------------------------


def test_gsm8k_loses_its_marks():
    for row in hub_rows("gsm8k"):
        made = convert("gsm8k", row)
        assert "<<" not in made.response and "####" not in made.response
        assert made.answer == row["answer"].rsplit("#### ", 1)[1]
        assert made.response.endswith(f"\nThe answer is {made.answer}")
        assert made.response.splitlines()[:-1] == re.sub("<<.*?>>", "", row["answer"]).splitlines()[:-1]
    made = first("gsm8k", answer="5*200=<<5*200=1000>>1000 eggs\n#### 1,000")
    assert (made.response, made.answer) == ("5*200=1000 eggs\nThe answer is 1000", "1000")


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_a_program_passes_its_tests_and_a_wrong_one_does_not(name):
    for row in hub_rows(name)[:10]:
        made = convert(name, row)
        assert made.kind == "code" and "\r" not in made.answer
        assert made.response.removeprefix("```python\n").removesuffix("```").strip() == made.answer.strip()
        exec(made.answer + "\n" + made.metadata["tests"], {})
        wrong = re.sub(r"return .*", "return object()", made.answer)
        with pytest.raises(AssertionError):
            exec(wrong + "\n" + made.metadata["tests"], {})


def test_mbpp_shows_one_test_and_keeps_the_set_up():
    made = first("mbpp", test_setup_code="import math", test_list=["assert f(1) == 2", "assert f(2) == 3"])
    assert made.prompt.endswith("\nYour code should satisfy this test:\nassert f(1) == 2")
    assert made.metadata == {"tests": "import math\nassert f(1) == 2\nassert f(2) == 3"}


def test_humaneval_shows_the_head_without_the_body():
    row = hub_rows("humaneval")[0]
    made = convert("humaneval", row)
    assert row["prompt"].strip() in made.prompt and row["canonical_solution"].strip() not in made.prompt
    assert made.metadata["entry_point"] == row["entry_point"]


def test_hotpotqa_keeps_the_paragraphs_of_its_facts():
    for row in hub_rows("hotpotqa"):
        made = convert("hotpotqa", row)
        passage = made.prompt.removesuffix(f"\n\n{row['question']}")
        assert passage == made.document
        titles = [paragraph.split(":")[0] for paragraph in passage.split("\n\n")]
        facts = row["supporting_facts"]["title"]
        assert titles == [title for title in row["context"]["title"] if title in facts]
        assert made.answer in passage and made.response == f"The answer is {made.answer}"


def test_scrolls_puts_the_document_before_the_question():
    row = hub_rows("scrolls_qasper")[0]
    question, _, document = row["input"].partition("\n\n")
    made = convert("scrolls_qasper", row)
    assert made.prompt == f"{document}\n\n{question}" and made.document == document
    assert made.answer == row["output"]


def test_scibench_takes_the_textbooks_minus_and_tells_the_unit():
    made = first("scibench", answer_number=" \u22124.5", unit=" $J$ ")
    assert made.answer == "-4.5" and made.prompt.endswith(" The unit is $J$.")
    assert "unit" not in first("scibench", unit="").prompt.lower().rsplit("\n", 1)[1]


def test_word_sorting_may_be_answered_by_any_target():
    made = first("bigbench_word_sorting", targets=["a b", "a  b"])
    assert (made.kind, made.answer, made.response) == ("one_of", ["a b", "a  b"], "The answer is a b")


def test_conversations_end_with_the_last_answer():
    roles = ["user", "assistant", "user", "assistant", "user"]
    turns = [{"role": role, "content": f"{role[0]}{place}"} for place, role in enumerate(roles)]
    made = CONVERTERS["messages"]({"messages": turns}, {})
    assert made.prompt == turns[:3] and made.response == "a3"
    assert CONVERTERS["messages"]({"messages": turns[:1]}, {}) is None
    assert CONVERTERS["messages"]({"messages": []}, {}) is None


def test_alpaca_joins_what_there_is():
    made = CONVERTERS["alpaca"]({"instruction": "Add.", "input": " 1 2 ", "output": "3\n"}, {})
    assert (made.prompt, made.response) == ("Add.\n\n1 2", "3")
    for nothing in ({}, {"input": ""}, {"input": None}):
        assert CONVERTERS["alpaca"]({"instruction": "Add.", "output": "3", **nothing}, {}).prompt == "Add."


# --- the ways an answer can be given -----------------------------------------------------------------------------------------

TEXTS = ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("answer", "letter", "options", "fields"),
    [
        (1, "B", TEXTS, {}), ("1", "B", TEXTS, {}), ("B", "B", TEXTS, {}), (" blue ", "C", TEXTS, {}), (0, "A", TEXTS, {}),
        (1, "A", TEXTS, {"first": 1}), ("3", "C", TEXTS, {"first": 1}),
        ("3", "C", {"text": TEXTS, "label": ["1", "2", "3"]}, {}), (2, "B", {"text": TEXTS, "label": [1, 2, 3]}, {}),
        ("green", "B", {"text": TEXTS, "label": ["x", "y", "z"]}, {}), ("z", "C", {"text": TEXTS, "label": ["x", "y", "z"]}, {}),
        ("A", "B", {"text": TEXTS, "label": ["C", "A", "B"]}, {}),  # a label goes before a place
        ("20", "B", ["10", "20", "30"], {}), (30, "C", ["10", "20", "30"], {}),  # no place, so it is the text
        (2, "C", ["1", "2", "3"], {}),  # a place goes before a text
        ("b", "B", ["a) red", "b) b"], {"prefix": r"^[a-z]\) "}),
        (None, None, TEXTS, {}), ("", None, TEXTS, {}), (" ", None, TEXTS, {}), (-1, None, TEXTS, {}), ("-1", None, TEXTS, {}),
    ],
)  # fmt: skip
def test_each_way_to_say_which_is_right(answer, letter, options, fields):
    made = choice({"question": "Which?", "options": options, "answer": answer}, fields)
    assert (made and made.answer) == letter


def test_the_parts_of_a_question():
    record = {
        "p": "A story.",
        "q": "Who?",
        "r": "Really?",
        "yes": "he",
        "no": "she",
        "why": "He did.",
        "n": 7,
    }
    fields = {"context": "p", "question": ["q", "r"], "options": ["yes", "no"], "answer": "yes"}
    fields |= {"rationale": "why", "id": "n"}
    made = choice(record, fields | {"ask": "Choose."})
    assert made.prompt == f"A story.\n\nWho?\nReally?\n\nChoose.\n\nOptions:\nA) he\nB) she\n\n{ASK_LETTER}"
    assert (made.response, made.document, made.id) == ("He did.\nThe answer is A) he", "A story.", "7")
    assert choice({**record, "p": None, "why": None}, fields).document is None


def test_a_shuffle_depends_on_the_question_alone():
    fields = {"question": "q", "options": ["right", "wrong", "worse"], "answer": "right", "shuffle": True}
    texts = {"right": "yes", "wrong": "no", "worse": "never"}
    made = [choice({"q": f"Which {n}?", **texts}, fields) for n in range(300)]
    assert all(40 <= count <= 160 for count in Counter(one.answer for one in made).values())
    assert {one.response.split(") ")[1] for one in made} == {"yes"}
    texts = {"right": "ja", "wrong": "nein", "worse": "nie"}
    other = [choice({"q": f"Which {n}?", **texts}, fields) for n in range(300)]
    assert [one.answer for one in made] == [one.answer for one in other]


def test_columns_may_be_nested_and_numbers_are_texts():
    record = {"a": {"b": {"c": 3}}, "t": " x "}
    assert (text(record, "a.b.c"), text(record, "t"), column(record, "a.b")) == ("3", "x", {"c": 3})
    for name in ("a.x", "t.b", "z"):
        with pytest.raises(MissingColumn):
            column(record, name)


MC = {"question": "Which?", "options": TEXTS, "answer": 0}
HOP = {"id": "1", "question": "a", "answer": "b", "supporting_facts": {"title": ["t"]}}
HOP["context"] = {"title": ["t"], "sentences": [["s"]]}


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("columns", {"prompt": None, "response": "a"}),
        ("columns", {"prompt": ["a"], "response": "a"}),
        ("columns", {"prompt": {"a": 1}, "response": "a"}),
        ("gsm8k", {"question": "a", "answer": "no mark"}),
        ("gsm8k", {"question": "a", "answer": "no number ####"}),
        ("choice", MC | {"answer": 3}),
        ("choice", MC | {"answer": -2}),
        ("choice", MC | {"answer": "D"}),
        ("choice", MC | {"answer": "pink"}),
        ("choice", MC | {"answer": "²"}),  # a digit to Python, and no number
        ("choice", MC | {"options": "red"}),
        ("choice", MC | {"options": None}),
        ("choice", MC | {"options": []}),
        ("choice", MC | {"options": [f"o{n}" for n in range(30)], "answer": 29}),  # more than there are letters
        ("choice", MC | {"options": [f"o{n}" for n in range(30)], "answer": 2}),
        ("choice", MC | {"options": {"text": None, "label": ["a"]}}),
        ("choice", MC | {"options": {"text": ["x"], "label": None}}),
        ("choice", MC | {"options": {"text": ["x"], "label": ["a", "b"]}, "answer": "b"}),
        ("choice", MC | {"question": None}),
        ("boardgame", {"example": "a", "label": "maybe", "proof": ""}),
        ("messages", {"messages": None}),
        ("messages", {"messages": "hello"}),
        ("messages", {"messages": ["a", "b"]}),
        ("messages", {"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}),
        ("messages", {"messages": [{"content": "a"}, {"role": "assistant", "content": "a"}]}),
        ("bigbench", {"inputs": "a", "targets": None, "multiple_choice_targets": [], "multiple_choice_scores": []}),
        ("bigbench", {"inputs": "a", "targets": [], "multiple_choice_targets": ["a", "b"], "multiple_choice_scores": [None, 1]}),
        ("hotpotqa", HOP | {"supporting_facts": {"title": None}}),
        ("hotpotqa", HOP | {"context": {"title": ["t"], "sentences": []}}),
        ("hotpotqa", HOP | {"context": {"title": ["t"], "sentences": [None]}}),
        ("mbpp", {"text": "a", "code": "b", "task_id": 1, "test_list": []}),
        ("mbpp", {"text": "a", "code": "b", "task_id": 1, "test_list": None}),
        ("scrolls", {"id": "1", "input": None, "output": "a"}),
        ("winogrande", {"sentence": "a", "option1": "b", "option2": "c", "answer": "3"}),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused(name, record):
    with pytest.raises(UnusableValue) as caught:
        CONVERTERS[name](record, {})
    assert re.split(r"[.\[]", caught.value.column)[0] in record and caught.value.rule


def test_the_column_that_is_named_is_the_files_own():
    fields = {"question": "q", "options": "o", "answer": "gold"}
    with pytest.raises(UnusableValue) as caught:
        choice({"q": "Which?", "o": TEXTS, "gold": "pink"}, fields)
    assert caught.value.column == "gold"


# --- through the build -------------------------------------------------------------------------------------------------------


def read(tmp_path, content: list[object], **source: object) -> list[tuple[int, Row | DataError | Dropped]]:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in content))
    (span,) = open_file(path, "in.jsonl", tmp_path).spans
    mine = Source("mine", **{"path": str(path), "train": ("all",), "domain": "math"} | source)
    return list(records(Chunk(mine, span, ""), 0))


def test_a_missing_column_ends_the_build_and_names_source_and_place(tmp_path):
    content = [{"question": "a", "choices": ["b", "c"]}]
    with pytest.raises(DataError) as caught:
        read(tmp_path, content, converter="choice", fields={"options": "choices"})
    assert str(caught.value).startswith("source mine: answer: there is no such column in ")
    assert "it has question, choices. " in str(caught.value) and "other `fields`" in str(caught.value)


def test_a_value_that_cannot_be_used_is_named_with_file_and_line(tmp_path):
    rows = [MC, MC | {"answer": 9}, "text", MC | {"answer": None}, MC | {"question": ""}]
    found = read(tmp_path, rows, converter="choice")
    assert [line for line, _ in found] == [1, 2, 3, 4, 5]
    assert isinstance(found[0][1], Row) and found[0][1].answer == "A" and found[0][1].id == "mine/in.jsonl:1"
    assert isinstance(found[1][1], DataError)
    assert str(found[1][1]) == "in.jsonl:2: answer: '9' names none of the 3 options"
    assert str(found[2][1]).startswith("in.jsonl:3: row: must be a JSON object, not a string")
    assert isinstance(found[3][1], Dropped) and str(found[3][1]) == "no answer"


def test_rows_in_our_own_layouts_keep_what_they_say(tmp_path):
    plain = {"prompt": "a", "response": "b"}
    own = {"domain": "logic", "source": "theirs", "license": "MIT", "kind": "exact"}
    content = [plain | own | {"id": "7", "x": 1}, plain, {"prompt": "a"}]
    (_, one), (_, two), (_, three) = read(tmp_path, content, license="CC0-1.0", kind="number")
    assert {name: getattr(one, name) for name in own} == own
    assert (one.id, one.metadata) == ("theirs/7", {"x": 1})
    assert (two.domain, two.source, two.license, two.kind) == ("math", "mine", "CC0-1.0", "number")
    assert two.id == "mine/in.jsonl:2"
    assert isinstance(three, DataError) and str(three).startswith("in.jsonl:3: response: is missing")


def test_a_row_without_any_domain_is_refused(tmp_path):
    ((_, error),) = read(tmp_path, [{"prompt": "a", "response": "b"}], domain=None)
    assert isinstance(error, DataError)
    assert str(error).startswith("in.jsonl:1: domain: is missing, and source mine names none")
