"""Evaluation questions in training rows: found where they are, whatever their dress, and nowhere else."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest

from hub_text import TOPICS, prose
from srde.data.build import contamination as contaminated
from srde.data.build.contamination import EvaluationIndex, hash_rows, merge_passages, passages
from srde.data.build.fingerprint import words
from srde.data.rows import Row


def row(prompt: str | None, response: str = "No") -> Row:
    return Row([] if prompt is None else [{"role": "user", "content": prompt}], response, "f.jsonl", 1)


def index_of(rows: Sequence[Row], width: int = 13) -> EvaluationIndex:
    return EvaluationIndex.of([f"test: {place}" for place in range(len(rows))], passages(rows, width))


def found(index: EvaluationIndex, rows: Sequence[Row], overlap: float = 0.5) -> list[str | None]:
    """For each row the evaluation question that it holds."""
    return [index.names[one] if one >= 0 else None for one in index.find(*hash_rows(rows), overlap)]


def distinct(count: int, start: int = 0) -> str:
    """Words that no other call with another start has."""
    return " ".join(f"w{place}" for place in range(start, start + count))


QUESTION = (
    "Marta keeps nine hens in the yard behind her mill, and each of them lays five eggs a week. She eats four eggs on "
    "Sundays and takes all others to the fair. How many eggs does Marta take to the fair in three weeks?"
)
OPTIONS = "Options:\nA) 123\nB) 135\nC) 96\nD) 131\n\nAnswer with the letter of the correct option."
ANSWER = (
    "Nine hens lay forty five eggs in every single week, of which Marta eats four on Sunday, so that forty one are left "
    "and in three weeks she takes one hundred and twenty three."
)
OTHERS = [row(f"{prose(Random(place), 'science', 30, 50)} What is it?", "It is so.") for place in range(6)]
EVALUATION = [*OTHERS[:3], row(f"{QUESTION}\n\n{OPTIONS}", ANSWER), *OTHERS[3:]]


@pytest.fixture(scope="module")
def index():
    return index_of(EVALUATION)


@pytest.mark.parametrize(
    "leak",
    [
        row(f"{QUESTION}\n\n{OPTIONS}", ANSWER),
        row(f"{QUESTION}\n\n{OPTIONS}"),
        row(QUESTION),  # without the options
        row(QUESTION.upper()),
        row(QUESTION.replace(",", " ;").replace(".", "!\n\n")),
        row("\t".join(QUESTION.replace(".", "").split())),
        row(f"{prose(Random(1), 'code', 200, 300)} {QUESTION} {prose(Random(2), 'code', 200, 300)}"),
        row("Write a riddle.", f"Here is one. {QUESTION} I hope that you like it."),
        row("Count the eggs of nine hens.", ANSWER),
        row(None, f"{prose(Random(3), 'shop', 50, 80)} {QUESTION}"),
        row(QUESTION.replace("a week", "a\u00a0week").replace("Marta", "\uff2darta")),
        Row(
            [{"role": role, "content": said} for role, said in
             [("system", "Be short."), ("user", QUESTION), ("assistant", "?"), ("user", "Well?")]], "123", "f", 1,
        ),
    ],
)  # fmt: skip
def test_a_leak_is_found_in_any_dress(index, leak):
    assert found(index, [OTHERS[0], leak, row("something else")])[1] == "test: 3"


def test_rows_of_their_own_are_no_leaks(index):
    rng = Random(11)
    clean = [
        row(prose(rng, topic, 20, 60), prose(rng, topic, 20, 60))
        for topic in sorted(TOPICS)
        for _ in range(20)
    ]
    clean += [row("Which?\n\n" + OPTIONS), row("How many eggs does Marta take to the fair in three weeks?")]
    assert found(index, clean) == [None] * len(clean)


def test_the_question_is_named_that_the_row_holds(index):
    assert found(index, EVALUATION) == index.names
    assert found(index, []) == []


def test_of_two_the_one_that_the_row_holds_more_of_is_named():
    shared = distinct(20)
    index = index_of([row(f"{shared} {distinct(20, 100)}"), row(f"{shared} {distinct(20, 200)}")])
    assert found(index, [row(f"{shared} {distinct(19, 100)}"), row(f"{shared} {distinct(19, 200)}")]) == [
        "test: 0",
        "test: 1",
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_very_short_questions_count_only_as_a_whole_prompt(length):
    index = index_of([row(distinct(length), "Yes"), row(distinct(30, 500))])
    asked = row(distinct(length).upper() + "?!")
    inside = row(f"so {distinct(length)} then")
    assert found(index, [asked, inside, row("w", distinct(length))]) == ["test: 0", None, None]


@pytest.mark.parametrize("length", [5, 6, 12])
def test_short_questions_count_wherever_they_stand_as_a_whole(length):
    index = index_of([row(distinct(length), "Yes"), row(distinct(30, 500))])
    leaks = [
        row(distinct(length)),
        row(f"so {distinct(length)} then"),
        row("Ask me.", f"Well: {distinct(length)}"),
    ]
    assert found(index, leaks) == ["test: 0"] * 3
    assert found(index, [row(f"so {distinct(length - 1)} then"), row(distinct(length - 1, 1))]) == [None] * 2


@pytest.mark.parametrize(("length", "expected"), [(12, None), (13, "test: 0")])
def test_short_answers_do_not_count(length, expected):
    index = index_of([row("What do you say?", distinct(length))])
    assert found(index, [row("Say something.", f"I say {distinct(length)}")]) == [expected]


@pytest.mark.parametrize(("length", "expected"), [(7, None), (8, "test: 0")])
def test_lines_from_eight_words_on_count(length, expected):
    line = distinct(length)
    index = index_of([row(f"{line}\nWhich one?\n{distinct(3, 90)}")])
    assert found(index, [row(f"Well then: {line} again")]) == [expected]


def test_lines_that_are_less_than_a_quarter_do_not_count():
    line = distinct(9)
    rest = distinct(2, 50)
    long, short = row(f"{line}\n{distinct(60, 100)}"), row(f"{line}\n{rest}")
    assert found(index_of([long]), [row(f"once {line} more")]) == [None]
    assert found(index_of([short]), [row(f"once {line} more")]) == ["test: 0"]


@pytest.mark.parametrize(("questions", "leaks"), [(8, True), (9, False)])
def test_what_stands_in_more_than_eight_questions_is_boilerplate(questions, leaks):
    boilerplate = "Choose the one option that follows from all of the statements above by logic alone now"
    rows = [row(f"{distinct(12, 100 * place)}\n{boilerplate}") for place in range(questions)]
    index = index_of(rows)
    assert (found(index, [row(f"Well. {boilerplate}")]) != [None]) is leaks
    asked = [row(f"{distinct(12, 100 * place)} says he") for place in range(questions)]
    assert found(index, asked) == index.names  # their own part still tells


def test_boilerplate_does_not_dilute_what_is_left():
    """Half of a question's own n-grams are enough, however long its preamble is."""
    preamble = distinct(80, 9000)
    rows = [row(f"{preamble} {distinct(25, 100 * place)}") for place in range(9)]
    index = index_of(rows)
    own = 25  # 13-grams that end in one of its own words
    enough = row(distinct(25, 300))  # 13 of them
    assert found(index, [enough, row(distinct(24, 300)), row(preamble)]) == ["test: 3", None, None]
    assert index.sizes[index.questions == 3].tolist().count(own) == 1


@pytest.mark.parametrize(
    ("shared", "overlap", "expected"),
    [(13, 0.5, None), (25, 0.5, None), (31, 0.5, None), (32, 0.5, "test: 0"), (51, 0.5, "test: 0"), (13, 0.02, "test: 0"),
     (50, 1.0, None), (51, 1.0, "test: 0"), (22, 0.26, None), (23, 0.26, "test: 0")],
)  # fmt: skip
def test_a_single_ngram_is_not_enough_but_half_of_them_are(shared, overlap, expected):
    """Of 51 words there are 39 13-grams; `shared` words in a row hold shared - 12 of them."""
    index = index_of([row(distinct(51))])
    leak = row(f"{distinct(30, 700)} {distinct(shared)} {distinct(30, 800)}")
    assert found(index, [leak], overlap) == [expected]


@pytest.mark.parametrize("text", ["0 " * 40, "- - x = " * 20, "a b c d " * 12, "no no no no no no"])
def test_uniform_passages_count_only_as_a_whole_prompt(text):
    index = index_of([row(text, text), row(f"{text}\n{text}\n{text}")])
    assert found(index, [row("This matrix", f"is {text}"), row(text + " x"), row(f"{text} " * 3)]) == [
        None,
        None,
        "test: 1",
    ]
    assert found(index, [row(text)]) == ["test: 0"]


def test_plain_text_is_a_question_as_a_whole():
    index = index_of([row(None, distinct(40))])
    assert found(index, [row(None, f"x {distinct(40)}"), row("a", distinct(40)), row(None, "w1 w2")]) == [
        "test: 0",
        "test: 0",
        None,
    ]


@pytest.mark.parametrize("rows", [[row(None, "?!")], [row("?!", "!?")], [row(None, "0 0 0")]])
def test_evaluation_rows_that_nothing_tells(rows):
    index = index_of(rows)
    assert found(index, [*rows, row("?!"), row("plain")]) == [None] * (len(rows) + 2)
    assert found(index, []) == []


@pytest.mark.parametrize("width", [5, 20, 127, 128, 200, 256])
def test_the_width_is_a_setting(width):
    text = distinct(400)
    index = index_of([row(text, "Yes")], width)
    half = width - 1 + (401 - width + 1) // 2
    leaks = [row(f"a {text} b"), row(f"a {distinct(half)} b"), row(f"a {distinct(half - 1)} b")]
    assert found(index, leaks) == ["test: 0", "test: 0", None]


def test_what_was_saved_gives_the_same_answers(tmp_path, index):
    rng = Random(5)
    rows = [*EVALUATION, *(mixed_row(rng, EVALUATION) for _ in range(100)), row("nothing")]
    index.save(tmp_path)
    loaded = EvaluationIndex.load(tmp_path)
    assert loaded.names == index.names
    assert sorted(loaded.tables) == sorted(index.tables)
    for overlap in (0.1, 0.5, 1.0):
        assert found(loaded, rows, overlap) == found(index, rows, overlap)
    assert set(found(loaded, rows)) > {None, "test: 3"}


def test_merged_parts_are_the_whole():
    """Boilerplate is so by the count over all parts, and the questions' numbers go on from part to part."""
    order = "Choose the one option that follows from the rules of the game alone and nothing else"
    rows = []
    for place in range(60):
        lines = [
            distinct(place % 25 + 2, 100 * place),
            distinct(9, 100 * place + 30),
            order if place % 4 else "",
        ]
        rows.append(row("\n".join(lines), distinct(14, 100 * place + 50)))
    cuts = [0, 1, 2, 9, 17, 40, 60]
    parts = [rows[a:b] for a, b in itertools.pairwise(cuts)]
    merged = merge_passages([passages(part, 13) for part in parts], [len(part) for part in parts])
    one = EvaluationIndex.of([f"test: {place}" for place in range(60)], merged)
    whole = index_of(rows)
    said = [row("x", f"{distinct(9, 100 * place + 30 + place % 2)} x") for place in range(60)]
    asked = [*rows, *said, *(row("x", one.response) for one in rows), row(order), row(order + " x")]
    assert found(one, asked) == found(whole, asked)
    assert found(one, asked[:60]) == found(one, asked[120:180]) == one.names
    assert found(one, asked[-2:]) == [None, None]


# --- against the rule as the module's docstring words it ---------------------------------------------------------------


def questions(rng: Random) -> list[Row]:
    """Questions of all lengths, with repeated lines, shared passages and uniform ones."""
    shared = [prose(rng, "archive", 30, 60) for _ in range(3)]
    orders = [
        "Answer with the letter of the correct option.",
        "Choose the one that follows from the rules of the game alone.",
    ]
    made = []
    for place in range(70):
        parts = [
            prose(rng, rng.choice(sorted(TOPICS)), low, low + 10)
            for low in rng.choice([(2,), (6,), (20,), (9, 9), (30, 5, 8)])
        ]
        if rng.random() < 0.3:
            parts.insert(0, rng.choice(shared))
        if rng.random() < 0.6:
            parts.append(rng.choice(orders))
        if place % 10 == 0:
            parts = [rng.choice(["0 0 0 1 " * 9, "Why?", "Is it so that he went", ", ".join("abcab")])]
        text = rng.choice(["\n", "\n\n", " "]).join(parts)
        made.append(
            row(None, text)
            if place % 9 == 8
            else row(text, prose(rng, "shop", *rng.choice([(2, 4), (13, 30)])))
        )
    return made


def mixed_row(rng: Random, rows: Sequence[Row]) -> Row:
    """A training row with pieces of questions in it, some of them cut short, some of them changed."""
    pieces = [prose(rng, rng.choice(sorted(TOPICS)), 3, 25)]
    for _ in range(rng.randint(0, 2)):
        source = rng.choice(rows)
        taken = rng.choice([contaminated.prompt_text(source) or source.response, source.response]).split(
            rng.choice(["\n", "\r"])
        )
        own = rng.choice(taken).split()
        start = rng.randrange(max(len(own) // 2, 1)) if rng.random() < 0.5 else 0
        end = rng.randint(start, len(own)) if rng.random() < 0.5 else len(own)
        own = [("other" if rng.random() < 0.03 else word) for word in own[start:end]]
        pieces.append((str.upper if rng.random() < 0.2 else str)(" ".join(own)))
    rng.shuffle(pieces)
    if rng.random() < 0.25 and (one := contaminated.prompt_text(rng.choice(rows))):
        return row(one.replace(" ", "  "), pieces[0])
    cut = rng.randint(0, len(pieces))
    return row(" ".join(pieces[:cut]), " ".join(pieces[cut:]))


def ngrams(text: list[bytes], width: int) -> set[tuple[bytes, ...]]:
    return {tuple(text[place : place + width]) for place in range(len(text) - width + 1)}


def slow_index(
    rows: Sequence[Row], width: int
) -> tuple[list[tuple[int, set[tuple[bytes, ...]]]], dict[tuple[bytes, ...], int]]:
    """The passages of every question as sets of n-grams without boilerplate; and the whole prompts."""
    said: list[tuple[int, bool, set[tuple[bytes, ...]]]] = []
    for place, one in enumerate(rows):
        prompt = "\n".join(turn["content"] for turn in one.prompt) or one.response
        candidates = [(prompt, 5, True)]
        if one.prompt:
            candidates.append((one.response, width, True))
        if "\n" in prompt:
            candidates += [(line, 8, 4 * len(line) >= len(prompt)) for line in prompt.split("\n")]
        for text, least, tells in candidates:
            own = words(text)
            if len(own) >= least and len(set(own)) >= 5:
                said.append((place, tells, ngrams(own, width) or {tuple(own)}))
    standing = Counter(
        ngram for place in range(len(rows)) for ngram in set().union(*(s for p, _, s in said if p == place))
    )
    kept = [(place, {ngram for ngram in own if standing[ngram] <= 8}) for place, tells, own in said if tells]
    wholes = {
        tuple(words("\n".join(turn["content"] for turn in one.prompt))): place
        for place, one in enumerate(rows)
        if one.prompt
    }
    wholes.pop((), None)
    return [(place, own) for place, own in kept if own], wholes


@pytest.mark.parametrize(
    ("seed", "width", "overlap"), [(1, 13, 0.5), (2, 13, 0.5), (3, 13, 0.9), (4, 8, 0.3), (5, 20, 0.5)]
)
def test_a_slow_reading_of_the_rule_agrees(seed, width, overlap):
    rng = Random(seed)
    rows = questions(rng)
    asked = [mixed_row(rng, rows) for _ in range(300)] + rows
    index = index_of(rows, width)
    kept, wholes = slow_index(rows, width)
    lengths = {len(next(iter(own))) for _, own in kept}
    results = found(index, asked, overlap)
    for one, result in zip(asked, results, strict=True):
        prompt = words("\n".join(turn["content"] for turn in one.prompt))
        own = set().union(*(ngrams([*prompt, *words(one.response)], length) for length in lengths))
        shares = [(len(own & passage) / len(passage), place) for place, passage in kept]
        whole = [place for text, place in wholes.items() if text == tuple(prompt)]
        best = max([*(share for share, _ in shares), *(1.0 for _ in whole)])
        if best >= overlap:
            assert result in {
                f"test: {place}"
                for share, place in [*shares, *((1.0, place) for place in whole)]
                if share == best
            }
        else:
            assert result is None
    assert 0.2 < np.mean([one is not None for one in results[:300]]) < 0.8
