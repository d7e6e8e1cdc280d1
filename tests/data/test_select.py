"""Duplicates, balance and held-out documents, on chunks as the build makes them."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from data_sets import rows, write_rows
from srde.data.build.chunks import Chunks
from srde.data.build.fingerprint import words
from srde.data.build.select import (
    NEIGHBOURS,
    Selection,
    exact_duplicates,
    fair_shares,
    near_duplicates,
    select,
    shortages,
)
from srde.data.build.tasks import Chunk, Rules, make_rows
from srde.data.domains import DOMAINS
from srde.data.sources import files
from srde.data.sources.files import open_file
from srde.data.sources.registry import Source
from tiny import tiny_tokenizer

RULES = Rules(
    seed=0, max_length=10**6, domains=None, licenses=None, ngram=13, overlap=0.5, skip_bad_rows=False
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def chunked(tmp_path, monkeypatch, tokenizer):
    """Makes chunks of rows, finished in the order of the file or, if `backwards`, the other way round."""
    numbers = itertools.count()

    def make(content: list[dict], size=64, backwards=False, rules=RULES, **source) -> list[Path]:
        folder = tmp_path / f"made-{next(numbers)}"
        monkeypatch.setattr(files, "CHUNK_ROWS", size)
        path = write_rows(folder / "rows.jsonl", content)
        own = Source("own", path=str(path), train=("all",), **({"domain": "math"} | source))
        work = [
            Chunk(own, span, str(folder / f"chunk-{number}"))
            for number, span in enumerate(open_file(path, "rows.jsonl", folder).spans)
        ]
        for chunk in reversed(work) if backwards else work:
            make_rows(chunk, rules, tokenizer, None)
        return [Path(chunk.folder) for chunk in work]

    return make


def chosen(folders: list[Path], **changes) -> tuple[Chunks, Selection]:
    chunks = Chunks(folders)
    wanted = {"per_domain": 10**6, "validation_fraction": 0.0, "threshold": 0.7, "seed": 1} | changes
    return chunks, select(chunks, **wanted)


def ids(chunks: Chunks, numbers: np.ndarray) -> list[str]:
    return [one.removeprefix("own/") for one in chunks.texts("id", numbers)]


# --- shares --------------------------------------------------------------------------------------------------------------


def slow_shares(available: list[int], wanted: int) -> list[int]:
    """One at a time, round and round, from all that have some left."""
    shares = [0] * len(available)
    while wanted and shares != available:
        for place, count in enumerate(available):
            if wanted and shares[place] < count:
                shares[place] += 1
                wanted -= 1
    return shares


def test_fair_shares_equal_those_given_out_one_at_a_time():
    rng = Random(0)
    for _ in range(400):
        available = [rng.choice([0, 0, 1, 2, 5, 30, 200]) for _ in range(rng.randint(1, 8))]
        wanted = rng.choice([0, 1, 3, 7, 40, 41, 500, 10_000])
        shares = fair_shares(available, wanted).tolist()
        assert shares == slow_shares(available, wanted)
        assert sum(shares) == min(wanted, sum(available))


def test_small_sources_give_all_and_large_ones_the_rest_evenly():
    assert fair_shares([5, 1000, 1000], 105).tolist() == [5, 50, 50]
    assert fair_shares([5, 1000, 1000], 106).tolist() == [5, 51, 50]
    assert fair_shares([], 5).tolist() == fair_shares(np.zeros(0, dtype=np.int64), 0).tolist() == []
    large = fair_shares([10**9, 10**9], 10**9 + 1)
    assert large.tolist() == [500_000_001, 500_000_000]


# --- exact duplicates ------------------------------------------------------------------------------------------------------


def test_exact_duplicates_are_later_rows_with_the_first_of_their_kind():
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 40, 200).astype(np.uint64)
    slow, first = {}, {}
    for row, text in enumerate(texts.tolist()):
        if text in first:
            slow[row] = first[text]
        first.setdefault(text, row)
    assert exact_duplicates(texts) == slow
    assert exact_duplicates(np.arange(5)) == exact_duplicates(np.arange(0)) == {}


def test_rows_are_the_same_whatever_their_blanks_but_not_their_case(chunked):
    content = [
        {"prompt": "if x == 1:\n    print(A)", "response": "yes", "answer": "1"},
        {"prompt": "if x == 1: print(A)", "response": " yes", "answer": "2"},  # the answer is no text
        {"prompt": "if x == 1:\n    print(a)", "response": "yes", "answer": "3"},
        {"prompt": "if x != 1:\n    print(A)", "response": "yes", "answer": "4"},
    ]
    chunks, selection = chosen(chunked(content, size=1))
    assert selection.exact == {1: 0}
    assert sorted(selection.train) == [0, 2, 3]
    assert len(chunks) == 4


# --- near duplicates -------------------------------------------------------------------------------------------------------

ADDED = [1, 4, 9, 14, 18, 25, 40]  # words behind 42: similarities from 0.98 to 0.5, some below the threshold


def planted(seed: int) -> list[dict]:
    """Groups of rows: a text, the same with words behind it, and the same with another answer."""
    rng = Random(seed)
    made = []
    for group in range(60):
        base = [f"w{rng.randrange(900)}" for _ in range(38)]
        answer = rng.choice(["4", "5", None])
        for number, count in enumerate([0, *rng.sample(ADDED, rng.randint(0, 2))]):
            tail = [f"t{rng.randrange(10**6)}" for _ in range(count)]
            row = {"id": f"{group}-{number}", "prompt": " ".join(base + tail), "response": "it is so then"}
            made.append(row | ({"answer": answer} if answer else {}))
        if rng.random() < 0.4:
            made.append(made[-1] | {"id": f"{group}-other", "answer": "6", "response": "it is so now"})
    rng.shuffle(made)
    # The plain text of a group comes first, so that no group is a chain of three.
    return sorted(made, key=lambda row: "-0" not in row["id"])


def slow_pairs(content: list[dict], threshold: float) -> set[tuple[int, int]]:
    """All (later, earlier) with similar triples of words and the same answer."""
    sets = []
    for row in content:
        own = words(row["prompt"]) + words(row["response"])
        sets.append({tuple(own[place : place + 3]) for place in range(len(own) - 2)})
    return {
        (later, earlier)
        for later in range(len(content))
        for earlier in range(later)
        if content[later].get("answer") == content[earlier].get("answer")
        and len(sets[later] & sets[earlier]) >= threshold * len(sets[later] | sets[earlier])
    }


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.7), (1, 0.7), (2, 0.8), (3, 0.75)])
def test_near_duplicates_are_those_of_all_pairs(chunked, seed, threshold):
    content = planted(seed)
    chunks = Chunks(chunked(content, size=50))
    near = near_duplicates(chunks, np.ones(len(chunks), dtype=bool), chunks.numbers("answer"), threshold)
    pairs = slow_pairs(content, threshold)
    assert set(near.items()) <= pairs
    assert set(near) == {later for later, _ in pairs}
    assert 10 < len(near) < len(slow_pairs(content, 0.5))  # some are near and not near enough


def test_rows_that_are_out_already_take_nobody_with_them(chunked):
    content = [{"prompt": "a b c d e f g", "response": f"h i j k l {n}"} for n in "xy"]
    chunks = Chunks(chunked(content))
    answers = chunks.numbers("answer")
    assert near_duplicates(chunks, np.array([True, True]), answers, 0.7) == {1: 0}
    assert near_duplicates(chunks, np.array([False, True]), answers, 0.7) == {}


TROPHY = "The trophy does not fit into the brown suitcase because the _ is too"
TWINS = [
    {"prompt": f"{TROPHY} large.", "response": "A", "answer": "A"},
    {"prompt": f"{TROPHY} small.", "response": "B", "answer": "B"},
    {"prompt": f"{TROPHY} large!", "response": "(A)", "answer": " a "},
]


def test_contrasts_stay_and_only_the_same_answer_goes(chunked):
    _, selection = chosen(chunked(TWINS))
    assert selection.near == {2: 0}
    assert sorted(selection.train) == [0, 1]


def test_a_threshold_above_one_keeps_all(chunked):
    _, selection = chosen(chunked(TWINS), threshold=1.5)
    assert selection.near == {} and len(selection.train) == 3


def test_a_source_may_keep_its_near_duplicates(chunked):
    alike, exact = TWINS, [*TWINS, TWINS[0]]
    _, selection = chosen(chunked(exact, near_duplicates=False))
    assert selection.near == {} and selection.exact == {3: 0}
    _, selection = chosen(chunked(alike, near_duplicates=False) + chunked([alike[0], alike[2]]))
    assert selection.exact == {3: 0, 4: 2}
    assert selection.near == {}


def test_questions_on_one_passage_are_compared_without_it(chunked):
    passage = " ".join(f"w{number}" for number in range(200))
    other = passage.replace("w7 ", "w8 ")
    who, when = "Who built the old mill beside the river?", "When did the ferry sink in the bay?"
    content = [
        {"prompt": f"{document}\n\n{question}", "response": "It was so long ago.", "document": document}
        for document, question in (
            (passage, who),
            (passage, when),
            (passage, f"By whom? {who}"),
            (other, who),
        )
    ]
    _, selection = chosen(chunked(content))
    assert selection.near == {2: 0}


class Drawn:
    """Chunks with bands and shingles that a test says."""

    def __init__(self, bands: list[list[int]], sets: list[list[int]]) -> None:
        self.bands, self.sets = np.array(bands, dtype=np.uint64), sets

    def __len__(self) -> int:
        return len(self.sets)

    def numbers(self, name: str) -> np.ndarray:
        return {"bands": self.bands}[name]

    def lists(self, name: str, wanted: np.ndarray) -> list[np.ndarray]:
        return [np.array(self.sets[row], dtype=np.uint32) for row in wanted]


COUNT = 2 * NEIGHBOURS + 4


def in_one_bucket(one: int, other: int, shared: bool = False) -> dict[int, int]:
    """What is found in a bucket of COUNT rows of which two are equal; `shared`: the two share a small bucket, too."""
    sets = [[10 * row, 10 * row + 1] for row in range(COUNT)]
    bands = [[7, 100 + row] for row in range(COUNT)]
    sets[other], bands[other][1] = sets[one], bands[one if shared else other][1]
    every, answers = np.ones(COUNT, dtype=bool), np.zeros(COUNT, dtype=np.uint64)
    return near_duplicates(Drawn(bands, sets), every, answers, 0.7)


def test_in_a_large_bucket_each_is_compared_with_the_first_and_its_neighbours():
    for one, other in itertools.combinations(range(COUNT), 2):
        near = one == 0 or other - one <= NEIGHBOURS
        assert in_one_bucket(one, other) == ({other: one} if near else {})


def test_a_pair_too_far_apart_in_a_large_bucket_is_compared_in_a_small_one():
    for one, other in itertools.combinations(range(COUNT), 2):
        assert in_one_bucket(one, other, shared=True) == {other: one}


# --- selection ---------------------------------------------------------------------------------------------------------------


def test_domains_and_their_sources_are_balanced(chunked):
    content = rows(600, seed=3)  # of each domain 100 rows, of three sources
    for place, row in enumerate(content):
        row["source"] = f"made_{place % 6}_{place // 6 % 3}"
    content = [row for row in content if row["source"] != "made_1_1" or row["id"].endswith("7")]
    chunks, selection = chosen(chunked(content), per_domain=40)
    assert selection.domain_names == list(DOMAINS)
    by_domain = Counter(selection.domains[selection.train].tolist())
    by_source = Counter(selection.source_names[one] for one in selection.sources[selection.train])
    of_source = Counter(row["source"] for row in content)
    assert by_domain == dict.fromkeys(range(6), 40)
    for place, name in enumerate(DOMAINS):
        names = sorted(source for source in of_source if source.startswith(f"made_{place}"))
        shares = fair_shares([of_source[source] for source in names], 40)
        assert [by_source[source] for source in names] == shares.tolist()
        assert selection.available[name] == {source: of_source[source] for source in names}
    assert 0 < of_source["made_1_1"] < 13 == by_source["made_0_1"]
    assert len(set(selection.train)) == len(selection.train)
    assert shortages(selection, 40, []) == {} and shortages(selection, 41, []) == dict.fromkeys(DOMAINS, 1)
    assert shortages(selection, 40, [*DOMAINS, "law"]) == {"law": 40}
    first = selection.domains[selection.train[:60]]
    assert len(set(first.tolist())) == 6  # shuffled, not domain after domain
    assert len(chunks) == len(content)


def test_domains_of_other_names_follow_the_six(chunked):
    content = rows(60, seed=3)
    for row in content[::6]:
        row["domain"] = "zoology"
    for row in content[1::12]:
        row["domain"] = "botany"
    _, selection = chosen(chunked(content), per_domain=4)
    assert selection.domain_names == [*DOMAINS, "botany", "zoology"]
    assert Counter(selection.domains[selection.train].tolist()) == dict.fromkeys(range(1, 8), 4)
    assert "math" not in selection.available


def of_documents(count: int) -> list[dict]:
    rng = Random(9)
    made = rows(count, seed=9)
    for row in made:
        document = f"passage {rng.randrange(count // 4)}"
        row |= {"document": document, "prompt": f"{document} {row['prompt']}"}
    return made


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whole_documents_are_held_out(chunked, seed):
    content = of_documents(800)
    chunks, selection = chosen(chunked(content), validation_fraction=0.2, seed=seed)
    documents = chunks.numbers("document")
    train, held_out = (set(documents[part].tolist()) for part in (selection.train, selection.validation))
    assert train and held_out and not train & held_out
    assert len(train | held_out) == len({row["document"] for row in content})
    assert abs(len(held_out) / len(train | held_out) - 0.2) < 0.12


def test_rows_of_one_prompt_stay_on_one_side(chunked):
    content = [row | {"response": f"{n}, {row['response']}"} for row in rows(100, seed=4) for n in (1, 2, 3)]
    chunks, selection = chosen(chunked(content, near_duplicates=False), validation_fraction=0.3)
    train, held_out = (set(ids(chunks, part)) for part in (selection.train, selection.validation))
    assert train and held_out and not train & held_out


@pytest.mark.parametrize("prompt", [None, "!?"])
def test_rows_without_a_word_before_the_response_are_held_out_one_by_one(chunked, prompt):
    """They share no document: a fraction of them is held out, not all or none."""
    said = [row["response"] for row in rows(200, seed=5)]
    content = [{"prompt": prompt, "response": one} if prompt else {"text": one} for one in said]
    for seed in range(2):
        _, selection = chosen(chunked(content), validation_fraction=0.3, seed=seed)
        assert 20 <= len(selection.validation) <= 100
        assert 100 <= len(selection.train) <= 180


def test_the_held_out_part_has_its_share_of_every_domain(chunked):
    _, selection = chosen(chunked(rows(900, seed=6)), per_domain=50, validation_fraction=0.1)
    assert Counter(selection.domains[selection.validation].tolist()) == dict.fromkeys(range(6), 5)
    assert Counter(selection.domains[selection.train].tolist()) == dict.fromkeys(range(6), 50)


def test_the_selection_is_the_same_whatever_was_finished_first_and_however_it_was_cut(chunked):
    content = rows(240, seed=7) + planted(7)
    content += content[10:14]
    wanted = {"per_domain": 25, "validation_fraction": 0.15}
    results = []
    for size, backwards in ((64, False), (64, True), (7, True), (1000, False)):
        chunks, selection = chosen(chunked(content, size=size, backwards=backwards), **wanted)
        parts = selection.train.tolist(), selection.validation.tolist()
        results.append((*parts, selection.exact, selection.near))
        assert ids(chunks, selection.train)
    assert results[0] == results[1] == results[2] == results[3]
    assert results[0][2] and results[0][3]
    _, other = chosen(chunked(content), **wanted, seed=2)
    assert set(other.train.tolist()) != set(results[0][0])


def test_the_order_of_rows_does_not_depend_on_other_rows(chunked):
    content = rows(120, seed=8)
    chunks, selection = chosen(chunked(content))
    fewer, less = chosen(chunked(content[:50] + content[51:]))
    gone = content[50]["id"]
    left = [one for one in ids(chunks, selection.train) if not one.endswith(f"/{gone}")]
    assert left == ids(fewer, less.train)
    assert len(less.train) == len(selection.train) - 1


def test_chunks_that_nothing_is_left_of(chunked):
    """Every row of a chunk may be left out: too long, of another domain, or contaminated."""
    none = Rules(**{**vars(RULES), "domains": ("logic",)})
    content = [{"prompt": "one", "response": "two"}] * 3
    chunks, selection = chosen(chunked(content, rules=none))
    assert len(chunks) == len(selection.train) == len(selection.validation) == 0
    nothing = chunked(content, rules=none)
    chunks, selection = chosen(nothing + chunked(content[:1]) + chunked(content, rules=none))
    assert selection.train.tolist() == [0] and ids(chunks, selection.train)
