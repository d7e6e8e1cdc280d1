from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from srde.data.rows import to_row
from srde.errors import UsageError
from srde.eval.scoring import is_asked, is_scorable, score, score_row, stated_answer

# (prediction, answer, right?)
NUMBERS = [
    ("153", "153", True),
    ("153.", "153", True),
    ("The answer is 153", "153", True),
    ("The answer is: **153**.", "153", True),
    ("To calculate 60 + 93, we add the numbers, which is 153.", "153", True),
    ("60 + 93 = 153", "153", True),
    ("The answer is 60 + 93 = 153.", "153", True),
    ("153\n\nTo check, add 60 and 93.", "153", True),
    ("First 60, then 93. The final answer is 153. It took 2 steps", "153", True),
    ("The answer is 1,234,567 dollars", "1234567", True),
    ("$1,234.50", "1234.5", True),
    ("The result is -7", "-7", True),
    ("The result is \u22127", "-7", True),
    ("10-3", "3", True),  # a minus between two numbers is no sign
    ("The difference 10 - 3 leaves 7", "7", True),
    ("\\boxed{42}", "42", True),
    ("#### 42", "42", True),
    ("6.0", "6", True),
    ("answer: .5", "0.5", True),
    ("1e3", 1000, True),
    ("Carbon is the answer, with 6 protons", "6", True),
    ("The result of 60 + 93 is 154.", "153", False),
    ("15", "153", False),
    ("1533", "153", False),
    ("-153", "153", False),
    ("153.5", "153", False),
    ("H2O", "2", False),
    ("I cannot calculate this.", "153", False),
    ("", "0", False),
]
TOLERANT = [
    ("The answer is 9.1", "9.30", True),
    ("about 2.9 x 10^8 m/s", "3.0e8", True),
    ("$3.1 \\times 10^{8}$", "300000000", True),
    ("6.6 \u00d7 10^-34", "6.626e-34", True),
    ("The answer is 8.8", "9.30", False),
    ("3.1 x 10^7", "3.0e8", False),
    ("0", "9.30", False),
]
CHOICES = [
    ("B", "B", True),
    ("b", "B", True),
    ("(B)", "B", True),
    ("B)", "B", True),
    ("B) refrigerator", "B", True),
    ("B. refrigerator", "B", True),
    ("**B**", "B", True),
    ("B\n\nBecause it is cold.", "B", True),
    ("The answer is B", "B", True),
    ("The answer is (b) refrigerator.", "B", True),
    ("The correct answer is: **B) refrigerator**", "B", True),
    ("The answer is option B.", "B", True),
    ("The correct option is B", "B", True),
    ("I would choose (B), as (A) is wrong.", "B", True),
    ("A) is wrong, hence the answer is B", "B", True),
    ("We need a place that is cold. C) tree", "C", True),
    ("The answer is refrigerator", "B", False),
    ("A refrigerator keeps food cold.", "A", False),  # the article is no choice
    ("It's a D-shaped thing", "D", False),
    ("(C)", "B", False),
    ("", "A", False),
]
EXACT = [
    ("proved", "proved", True),
    ("disproved", "proved", False),
    ("No. The statements do not follow.", "No", True),
    ("The answer is no", "No", True),
    ("No, it does not follow. Yes would need another premise.", "Yes", False),
    ("I know that yes is right", "Yes", True),
    ("The argument is invalid.", "valid", False),
    ("True", "True", True),
    ("The output is:\n\n```\nFalse\n```", "False", True),
    ("Al2O3", "Al2O3", True),
    ("The formula of the compound is Al2O3.", "Al2O3", True),
    ("**Answer:** `Al2O3`", "Al2O3", True),
    ("AL2O3", "Al2O3", False),
    ("AlO", "Al2O3", False),
    ("[1,2, 3]", "[1, 2, 3]", True),
    ("The program prints [1, 2, 3]", "[1, 2, 3]", True),
    ("The output of this Python program will be:\n\n[1, 2, 3]", "[1, 2, 3]", True),
    ("```python\n[1, 2, 3]\n```\nThis is the list.", "[1, 2, 3]", True),
    ('["a", "b"]', "['a', 'b']", True),
    ("[1, 2]", "[1, 2, 3]", False),
    ("[1, 3, 2]", "[1, 2, 3]", False),
    ("The answer is 'abc'", "'abc'", True),
    ("'abc'", "abc", True),
    ("abc", "'abc'", False),  # the name abc is not the string
    ("b'12:30'", "b'12:30'", True),
    ("these, Project, States", "these, Project, States", True),
    ("The reversed list is: these, Project, States.", "these, Project, States", True),
    ("Here is the list:\n\nthese,Project,States", "these, Project, States", True),
    ("States, Project, these", "these, Project, States", False),
    ("Mother-in-law", "mother-in-law", True),
    ("Sarah is Elizabeth's daughter.", "daughter", False),  # more than the answer
    ("", "a", False),
]
GRIDS = [
    ("1 0\n0 1", "1 0\n0 1", True),
    ("10\n01", "1 0\n0 1", True),
    ("[[1, 0],\n [0, 1]]", "1 0\n0 1", True),
    ("The test output is:\n\n1 0\n0 1\n\nI swapped the colours.", "1 0\n0 1", True),
    ("Input:\n0 1\n1 0\nOutput:\n1 0\n0 1", "1 0\n0 1", True),
    ("1 0\n0 1\n\nInput:\n1 1\n1 1", "1 0\n0 1", True),
    ("1 0\n0 0", "1 0\n0 1", False),
    ("1 0", "1 0\n0 1", False),
    ("1 0\n0 1\n0 0", "1 0\n0 1", False),
    ("", "1 0\n0 1", False),
]


def cases(kind, table):
    return [pytest.param(kind, *case, id=f"{kind}-{case[0][:30]!r}") for case in table]


@pytest.mark.parametrize(
    ("kind", "prediction", "answer", "right"),
    cases("number", NUMBERS)
    + cases("number_tol5pct", TOLERANT)
    + cases("choice", CHOICES)
    + cases("exact", EXACT)
    + cases("grid", GRIDS),
)
def test_right_and_wrong_answers(kind, prediction, answer, right):
    assert score(kind, prediction, answer, {}) == float(right)


def test_a_choice_beyond_the_options_is_none():
    assert score("choice", "(E) as in (B)", "B", {"n_options": 4}) == 0.0
    assert score("choice", "E. is not there; option B", "B", {"n_options": 4}) == 1.0


def test_options_close_the_list_of_answers():
    options = {"options": ["left", "right", "front-left"]}
    assert score("exact", "Turn LEFT, not right", "left", options) == 1.0
    assert score("exact", "The front-left corner", "left", options) == 0.0
    assert score("exact", "leftover", "left", options) == 0.0


def test_one_of_several_answers():
    answers = ["g5", "e5"]
    assert score("one_of", "The answer is e5.", answers, {}) == 1.0
    assert score("one_of", "d5", answers, {}) == 0.0
    assert score("one_of", "g5, e5, d5, c5", answers, {}) == 0.0


def test_short_text_counts_common_words():
    assert score("short_text", "The answer is the Eiffel Tower.", "Eiffel tower", {}) == 1.0
    assert score("short_text", "Tower of London", "Eiffel Tower", {}) == pytest.approx(2 * 1 / (3 + 2))
    assert score("short_text", "Paris", "Eiffel Tower", {}) == 0.0
    assert score("short_text", "", "Eiffel Tower", {}) == 0.0


def test_reasoning_gym_tasks_score_their_own_answers():
    pytest.importorskip("reasoning_gym")
    grid = [["*", "O", "#"], ["O", "O", "O"], ["O", "X", "O"]]
    metadata = {"source_dataset": "shortest_path", "matrix": grid}
    assert score("reasoning_gym", "right right", "right right", metadata) == 1.0
    assert score("reasoning_gym", "The answer is: right right", "right right", metadata) == 1.0
    assert score("reasoning_gym", "down right right up", "right right", metadata) == 0.5  # a longer way
    assert score("reasoning_gym", "left", "right right", metadata) == 0.0
    square = {"source_dataset": "shortest_path", "matrix": [["*", "O"], ["O", "#"]]}
    assert score("reasoning_gym", "down right", "right down", square) == 1.0


SETS = [
    ("The answer is red, green and blue.", ["blue", "red", "green"], True),
    ("red, green, blue", ["red", "green", "blue"], True),
    ("The items are:\n- Red\n- green\n* blue\n\nThese are all.", ["red", "green", "blue"], True),
    ("1. red\n2. blue", ["blue", "red"], True),
    ("Answer: {red; blue; red}", ["red", "blue"], True),
    ("['red', \"blue\"]", ["red", "blue"], True),
    ("salt and pepper, oil", ["oil", "salt and pepper"], True),
    ("red, blue, and green", ["red", "green", "blue"], True),
    ("red", ["red"], True),
    ("red", "red", True),
    ("red, blue", ["red"], False),
    ("red", ["red", "blue"], False),
    ("redblue", ["red", "blue"], False),
    ("", ["red"], False),
]


@pytest.mark.parametrize(("text", "answer", "right"), SETS, ids=[f"{one[0][:30]!r}" for one in SETS])
def test_a_set_is_its_items_in_any_order(text, answer, right):
    assert score("set", text, answer, {}) == float(right)


PLAN = """I have a set of blocks. Here are the actions: pick up, unstack, put down, stack.
As initial conditions I have that, the red block is clear, the hand is empty and the red block is on the table."""


def test_a_plan_is_scored_by_its_back_end_with_the_question(monkeypatch):
    from srde.eval import blocksworld

    seen = []
    monkeypatch.setattr(blocksworld, "score_plan", lambda *given: seen.append(given) or True)
    row = to_row({"prompt": PLAN, "response": "plan", "kind": "plan", "answer": "gold"}, "f", 1)
    assert is_asked(row) and score_row(row, "my plan") == (1.0, "")
    assert seen == [("my plan", PLAN, "gold")]


def test_a_program_is_run_only_with_leave(monkeypatch):
    from srde.eval import contained

    seen = []
    monkeypatch.setattr(
        contained, "score_code", lambda *given, **how: seen.append((given, how)) or (False, "wrong")
    )
    row = to_row({"prompt": "p", "response": "r", "kind": "code", "tests": "assert f()"}, "f", 1)
    assert not is_asked(row) and is_asked(row, confirm_run_unsafe_code=True)
    assert score_row(row, "def f(): 0", confirm_run_unsafe_code=True) == (0.0, "wrong")
    assert seen == [(("def f(): 0", row), {"confirm_run_unsafe_code": True})]


def test_what_is_not_asked():
    assert not is_asked(to_row({"text": "plain", "kind": "number", "answer": 1}, "f", 1))
    assert not is_asked(to_row({"prompt": "p", "response": "r", "kind": "number"}, "f", 1))
    assert not is_asked(to_row({"prompt": "p", "response": "r", "answer": "a"}, "f", 1))
    assert is_asked(to_row({"prompt": "p", "response": "r", "kind": "number", "answer": 1}, "f", 1))


@pytest.mark.parametrize("kind", ["code", "essay"])
def test_a_kind_without_a_scorer_is_said_and_refused(kind):
    assert not is_scorable(kind)
    with pytest.raises(UsageError, match=rf"kind='{kind}': has no scorer .* Ask is_scorable"):
        score(kind, "text", "answer", {})


@pytest.mark.parametrize("answer", ["twelve", "3 or 4", ""])
def test_a_numeric_kind_needs_a_numeric_answer(answer):
    with pytest.raises(UsageError, match=r"answer=.*: must be one number"):
        score("number", "3", answer, {})


def test_the_stated_answer():
    assert stated_answer("So the answer is 4. The answer is **5**.\nBye.") == "5"
    assert stated_answer("Output:\n```\n[1]\n```") == "[1]"
    assert stated_answer("just this.") == "just this"
    assert stated_answer("I have the answer:") == "I have the answer:"  # nothing follows the cue


def test_the_shared_data_scores_its_own_responses_as_right():
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("SRDE_SHARED_DATA", beside))
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        pytest.skip(f"the shared data is not at {folder}; set SRDE_SHARED_DATA")
    scored = 0
    for path in files:
        for line in path.read_bytes().splitlines():
            row = to_row(json.loads(line), path.name, 1)
            if is_asked(row):
                assert score_row(row, row.response)[0] == 1.0, row.id
                scored += 1
    assert scored > 10_000
