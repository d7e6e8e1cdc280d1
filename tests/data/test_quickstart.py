from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from srde.data.domains import DOMAINS
from srde.data.quickstart import build_quickstart
from srde.data.rows import Row, read_rows
from srde.errors import ConfigError
from srde.eval.scoring import is_scorable, score

reasoning_gym = pytest.importorskip("reasoning_gym")
periodictable = pytest.importorskip("periodictable")

SIZES = {"train_per_domain": 60, "test_per_domain": 20}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return build_quickstart(tmp_path_factory.mktemp("quickstart"), **SIZES, seed=3)


@pytest.fixture(scope="module")
def rows(paths) -> list[Row]:
    return read_rows(paths.train) + read_rows(paths.test)


def of(rows: list[Row], source: str) -> list[Row]:
    found = [row for row in rows if row.source == source]
    assert len(found) >= 20
    return found


def question(row: Row) -> str:
    return row.prompt[0]["content"]


def test_files_hold_what_was_asked_for(paths):
    for path, count in zip(paths, SIZES.values(), strict=True):
        rows = read_rows(path)
        assert Counter(row.domain for row in rows) == dict.fromkeys(DOMAINS, count)
        assert tuple(row.domain for row in rows[:6]) == DOMAINS  # in turn
        for row in rows:
            assert row.response == row.answer
            assert row.license == "Apache-2.0"
            assert is_scorable(row.kind)
            assert row.source and row.id


def test_no_prompt_and_no_id_twice(rows):
    assert len({question(row) for row in rows}) == len({row.id for row in rows}) == len(rows)


def test_the_right_answer_scores_and_another_one_does_not(rows):
    for row in rows:
        assert score(row.kind, row.response, row.answer, row.metadata) == 1.0, row
        assert score(row.kind, "I do not know", row.answer, row.metadata) == 0.0, row


def test_the_seed_decides_and_nothing_else(paths, tmp_path):
    builds = [
        f"build_quickstart({str(tmp_path / name)!r}, **{SIZES}, seed={seed})"
        for name, seed in (("same", 3), ("other", 4))
    ]
    # Another process with another hash seed: the order of no set may matter.
    subprocess.run(
        [sys.executable, "-c", "; ".join(["from srde.data.quickstart import build_quickstart", *builds])],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1234"},
        capture_output=True,
    )
    for path in paths:
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    ours = {question(row) for row in read_rows(paths.train)}
    others = {question(row) for row in read_rows(tmp_path / "other" / "train.jsonl")}
    assert len(ours & others) < len(ours) / 4  # small tasks repeat some questions


def test_the_test_questions_do_not_depend_on_the_training_size(paths, tmp_path):
    larger = build_quickstart(tmp_path, train_per_domain=61, test_per_domain=20, seed=3)
    assert larger.test.read_bytes() == paths.test.read_bytes()


def test_more_items_than_a_task_has_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train_per_domain=.*has only \d+ different items"):
        build_quickstart(tmp_path, train_per_domain=100_000, test_per_domain=1, seed=0)


# A second computation of the answers, each by another way than the generator's.


def test_sums(rows):
    for row in of(rows, "reasoning_gym.chain_sum"):
        left, right = re.match(r"What is (\d+) \+ (\d+)\? ", question(row)).groups()
        assert int(row.answer) == int(left) + int(right)


def test_syllogisms_hold_in_all_worlds_or_not(rows):
    # A world says which of the 8 kinds of thing (is it a, is it b, is it c?) exist; of each term, there is something.
    kinds = list(itertools.product((False, True), repeat=3))
    worlds = [
        world
        for n in range(1, 9)
        for world in itertools.combinations(kinds, n)
        if all(map(any, zip(*world, strict=True)))
    ]

    def holds(world, quantifier, a, negation, b):
        among = [thing[b] != bool(negation) for thing in world if thing[a]]
        return {"All": all, "No": lambda them: not any(them), "Some": any}[quantifier](among)

    answers = Counter()
    for row in of(rows, "reasoning_gym.syllogism"):
        statements = re.findall(
            r"^(?:\d\. )?(All|No|Some) (\w+) are (not )?(\w+)\??$", question(row), re.MULTILINE
        )
        terms = sorted({term for statement in statements for term in (statement[1], statement[3])})
        assert (len(statements), len(terms)) == (3, 3)
        *premises, conclusion = [
            (q, terms.index(a), negation, terms.index(b)) for q, a, negation, b in statements
        ]
        possible = [world for world in worlds if all(holds(world, *premise) for premise in premises)]
        assert row.answer == ("Yes" if all(holds(world, *conclusion) for world in possible) else "No"), row
        answers[row.answer] += 1
    assert min(answers.values()) > 0.3 * answers.total()  # neither answer is a safe guess


def test_siblings(rows):
    for row in of(rows, "reasoning_gym.aiw"):
        name, _, sisters, other = re.match(
            r"(\w+) has (\d+) brothers and she also has (\d+) sisters\. How many sisters does (\w+)'s brother have\?",
            question(row),
        ).groups()
        assert name == other
        assert len([name, *range(int(sisters))]) == int(row.answer)


@pytest.mark.parametrize("source", ["srde.list_program", "srde.string_program"])
def test_programs_print_their_answers(rows, source):
    for row in of(rows, source):
        program = question(row).split("\n", 1)[1]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, {})  # our own text, one print each
        assert printed.getvalue() == row.answer + "\n", program


def test_salts_are_neutral_and_in_lowest_terms(rows):
    for row in of(rows, "srde.salt_formula"):
        atoms = periodictable.formula(row.answer).atoms
        charges = {
            periodictable.elements.symbol(symbol): charge
            for symbol, charge in row.metadata["charges"].items()
        }
        assert set(atoms) == set(charges)
        assert all(charge in element.ions for element, charge in charges.items())
        assert sum(count * charges[element] for element, count in atoms.items()) == 0
        assert math.gcd(*(int(count) for count in atoms.values())) == 1
        for element, charge in charges.items():
            written = f"{element.symbol}{'' if abs(charge) == 1 else abs(charge)}{'+' if charge > 0 else '-'}"
            assert re.search(rf"(?<!\w){re.escape(written)}(?= and |\?)", question(row)), question(row)


def test_every_cation_and_anion_has_its_charge_in_the_table():
    from srde.data.science import _ANIONS, _CATIONS

    for ions, sign in ((_CATIONS, 1), (_ANIONS, -1)):
        for symbol, charge in ions.items():
            assert sign * charge in periodictable.elements.symbol(symbol).ions


def test_atoms_are_counted(rows):
    for row in of(rows, "srde.atom_count"):
        name, formula = re.match(r"How many (\w+) atoms are in one unit of (\w+)\?", question(row)).groups()
        assert periodictable.formula(formula).atoms[periodictable.elements.name(name)] == int(row.answer)


def test_one_order_meets_all_conditions(rows):
    for row in of(rows, "srde.order"):
        told = re.findall(r"(\w+) comes (before|after) (\w+)\.", question(row))
        pairs = [(a.lower(), b) if word == "before" else (b, a.lower()) for a, word, b in told]
        possible = [
            order
            for order in itertools.permutations(sorted({step for pair in pairs for step in pair}))
            if all(order.index(before) < order.index(after) for before, after in pairs)
        ]
        assert [", ".join(order) for order in possible] == [row.answer]


def test_weekdays(rows):
    week = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for row in of(rows, "reasoning_gym.calendar_arithmetic"):
        text = question(row)
        start = re.search(rf"({'|'.join(week)}), \w+ \d+, \d+", text).group(1)
        days = int(re.search(r"(?<!\w)(\d)(?: days|-day)", text).group(1))
        back = re.search(r"ago|before|backward", text) is not None
        assert row.answer == week[(week.index(start) + (-days if back else days)) % 7], text


def test_reversals(rows):
    for row in of(rows, "reasoning_gym.word_sequence_reversal"):
        words = question(row).split("\n")[0].removeprefix("Reverse this list of words: ").split(", ")
        assert row.answer.split(", ") == words[::-1]
