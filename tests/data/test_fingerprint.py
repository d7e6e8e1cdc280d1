"""Word hashes, n-grams, shingles and bands against slow references over tuples of words."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from random import Random

import numpy as np
import pytest

from srde.data.build import fingerprint as prints
from srde.data.build.fingerprint import (
    NGrams,
    Words,
    band_keys,
    hash_words,
    jaccard,
    shingles,
    text_hash,
    words,
)

PIECES = [
    "The",
    "cat",
    "CAT",
    "x_1",
    "42",
    "...",
    "\n",
    "naïve",
    "東京",
    "ﬁne",
    "q",
    "a",
    "b",
    "c",
    "-",
    "!?",
]


def random_texts(seed: int, count: int = 60) -> list[str]:
    """Texts of few different words, so that n-grams recur; some are empty, some hold no word at all."""
    rng = Random(seed)
    texts = [" ".join(rng.choices(PIECES, k=rng.choice([0, 1, 2, 3, 5, 12, 40]))) for _ in range(count)]
    return ["", " \n", *texts, "?!", ""]


def tuples(text: str, width: int) -> list[tuple[bytes, ...]]:
    """The n-grams of one text, the obvious way."""
    own = words(text)
    return [tuple(own[start : start + width]) for start in range(len(own) - width + 1)]


def parts(found: Words) -> list[list[int]]:
    return [found.hashes[a:b].tolist() for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]


def regex_words(text: str) -> list[bytes]:
    """The words by way of the general path, which a character outside ASCII forces."""
    with_mark = words(text + " é")
    assert with_mark[-1] == "é".encode()
    return with_mark[:-1]


def test_words_are_lower_cased_runs_of_letters_digits_and_underscores():
    assert words("The cat, x_1 = 3.14!") == [b"the", b"cat", b"x_1", b"3", b"14"]
    assert words("__init__(self)") == [b"__init__", b"self"]
    assert words("") == words(" \t\n.,;") == []


def test_an_apostrophe_parts_no_word_however_it_is_written():
    assert words("It's the cats' \"it's\"") == [b"its", b"the", b"cats", b"its"]
    assert words("It\u2019s the cats\u2019 \u201cit's\u201d") == [b"its", b"the", b"cats", b"its"]


def test_the_ascii_path_equals_the_general_one():
    every = "".join(map(chr, range(128)))
    assert words(every) == regex_words(every)
    for code in range(128):
        text = f"a{chr(code)}B{chr(code)}{chr(code)}c {chr(code)}"
        assert words(text) == regex_words(text), hex(code)
    rng = Random(0)
    for _ in range(200):
        text = "".join(rng.choices(every, k=30))
        assert words(text) == regex_words(text)


def test_words_are_compared_after_nfkc():
    assert words("ﬁne Ｗｉｄｅ x²") == [b"fine", b"wide", b"x2"]
    assert words("caf\u0065\u0301") == words("CAFÉ") == ["café".encode()]
    assert words("naïve Straße") == ["naïve".encode(), "straße".encode()]


def test_scripts_without_spaces_have_a_word_per_character():
    assert words("東京tower") == ["東".encode(), "京".encode(), b"tower"]
    assert words("カナ かな") == [one.encode() for one in "カナかな"]
    assert words("ｶﾅ") == words("カナ")  # half width
    assert words("สวย") == [one.encode() for one in "สวย"]
    assert words("한국어 текст") == ["한국어".encode(), "текст".encode()]


def test_a_lone_surrogate_is_no_obstacle():
    assert words("a \ud800 b")[0] == b"a" and words("a \ud800 b")[-1] == b"b"
    assert text_hash("\ud800") != text_hash("\ud801")


def test_each_text_has_the_hashes_of_its_words():
    texts = random_texts(1)
    found = parts(hash_words(texts))
    assert len(found) == len(texts)
    by_word: dict[bytes, int] = {}
    for text, hashes in zip(texts, found, strict=True):
        assert len(hashes) == len(words(text))
        for word, value in zip(words(text), hashes, strict=True):
            assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)


def test_words_that_are_alike_have_hashes_of_their_own():
    """Anagrams, numbers, repeated letters: what a weak hash takes for each other."""
    alike = ["".join(letters) for letters in itertools.permutations("abcdefgh")]
    alike += [str(number) for number in range(20_000)] + [
        letter * count for letter in "xyz" for count in range(1, 200)
    ]
    hashes = hash_words([" ".join(alike)]).hashes
    assert len(np.unique(hashes)) == len(hashes) == len(alike)
    assert len(np.unique(hashes >> np.uint64(32))) > len(alike) - 10  # so do the halves that shingles keep
    assert hashes.all()


@pytest.mark.parametrize("width", [1, 2, 3, 7, 13])
def test_windows_are_the_ngrams_of_each_text(width):
    to_hash: dict[tuple[bytes, ...], int] = {}
    to_tuple: dict[int, tuple[bytes, ...]] = {}
    for seed in range(4):
        texts = random_texts(seed)
        found = parts(NGrams(hash_words(texts)).windows(width))
        assert [len(one) for one in found] == [len(tuples(text, width)) for text in texts]
        for text, hashes in zip(texts, found, strict=True):
            for ngram, value in zip(tuples(text, width), hashes, strict=True):
                assert to_hash.setdefault(ngram, value) == value  # wherever in the batch it stands
                assert to_tuple.setdefault(value, ngram) == ngram


def test_an_ngram_is_no_set_and_no_sum_of_words():
    ((a,), (b,), (c,), (d,)) = parts(NGrams(hash_words(["x y z", "z y x", "x x y", "y x x"])).windows(3))
    assert len({a, b, c, d}) == 4


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["one"], ["one two", "three"]])
def test_batches_without_a_window_of_the_width(texts):
    ngrams = NGrams(hash_words(texts))
    for width in (3, 4, 50):
        found = ngrams.windows(width)
        assert found.hashes.tolist() == [] and found.offsets.tolist() == [0] * (len(texts) + 1)
    whole = ngrams.whole(ngrams.batch.offsets[:-1], ngrams.batch.offsets[1:])
    assert [bool(one) for one in whole] == [bool(words(text)) for text in texts]


def test_no_window_crosses_from_one_text_to_the_next():
    apart = parts(NGrams(hash_words(["a b c", "d e f"])).windows(2))
    (joined,) = parts(NGrams(hash_words(["a b c d e f"])).windows(2))
    assert apart == [joined[:2], joined[3:]]


def test_whole_is_the_ngram_from_a_place_to_a_place():
    texts = random_texts(3)
    batch = hash_words(texts)
    ngrams = NGrams(batch)
    flat = [word for text in texts for word in words(text)]
    rng = Random(3)
    pairs = [sorted((rng.randrange(len(flat) + 1), rng.randrange(len(flat) + 1))) for _ in range(500)]
    pairs += [[len(flat), len(flat)], [0, 0], [0, len(flat)]]
    starts, ends = np.array(pairs).T
    seen: dict[tuple[bytes, ...], int] = {}
    for (start, end), value in zip(pairs, ngrams.whole(starts, ends).tolist(), strict=True):
        assert seen.setdefault(tuple(flat[start:end]), value) == value
    assert len(set(seen.values())) == len(seen)
    assert seen[()] == 0
    (windows,) = parts(NGrams(hash_words([" ".join(word.decode() for word in flat[:3])])).windows(3))
    assert ngrams.whole(np.array([0]), np.array([3])).tolist() == windows


def test_a_text_has_one_hash_whatever_stands_before_it_in_the_batch():
    alone = NGrams(hash_words(["what is the answer"])).windows(3).hashes.tolist()
    behind = parts(NGrams(hash_words(["some words first " * 5000, "what is the answer"])).windows(3))[1]
    assert alone == behind


def shingle_sets(texts: list[str], salts: list[int] | None = None) -> list[np.ndarray]:
    batch = hash_words(texts)
    found = shingles(NGrams(batch), np.array(salts or [0] * len(texts), dtype=np.uint64))
    return [found.hashes[a:b] for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]


def test_shingles_have_the_sizes_and_intersections_of_the_sets_of_triples():
    texts = random_texts(4)
    sets = shingle_sets(texts)
    slow = [set(tuples(text, 3)) or {tuple(words(text))} for text in texts]
    for one, expected in zip(sets, slow, strict=True):
        assert one.dtype == np.uint32
        assert (np.diff(one.astype(np.int64)) > 0).all()  # sorted, none twice
        assert len(one) == len(expected)
    for a in range(len(texts)):
        for b in range(a):
            assert len(set(sets[a].tolist()) & set(sets[b].tolist())) == len(slow[a] & slow[b])


def test_salts_part_and_join():
    texts = ["one two three four five"] * 3 + ["short", "short"]
    a, b, c, d, e = shingle_sets(texts, [0, 5 << 40, 5 << 40, 5 << 40, 9 << 50])
    assert not set(a.tolist()) & set(b.tolist())
    assert b.tolist() == c.tolist() and len(b) == 3
    assert not set(d.tolist()) & set(e.tolist())
    assert (np.diff(b.astype(np.int64)) > 0).all()


def test_shingles_of_no_texts():
    assert shingle_sets([]) == []


def test_jaccard_is_the_formula_of_sets():
    rng = Random(5)
    for _ in range(200):
        a, b = ({rng.randrange(30) for _ in range(rng.randint(1, 20))} for _ in range(2))
        arrays = (np.array(sorted(one), dtype=np.uint32) for one in (a, b))
        assert jaccard(*arrays) == len(a & b) / len(a | b)


def sets_of(lists: list[np.ndarray]) -> Words:
    offsets = np.cumsum([0, *(len(one) for one in lists)])
    return Words(np.concatenate(lists), offsets)


@pytest.mark.parametrize("shared", [10, 25, 30, 35, 40, 45, 50])
def test_texts_share_a_band_as_often_as_their_similarity_says(shared):
    """Of 50 elements `shared` are common: the Jaccard similarity is exactly shared / 50."""
    pairs, union = 1500, 50
    rng = np.random.default_rng(shared)
    lists = []
    for _ in range(pairs):
        elements = rng.choice(2**32, size=union, replace=False).astype(np.uint32)
        common, rest = elements[:shared], elements[shared:]
        lists += [
            np.sort(np.r_[common, rest[: len(rest) // 2]]),
            np.sort(np.r_[common, rest[len(rest) // 2 :]]),
        ]
    keys = band_keys(sets_of(lists))
    assert keys.shape == (2 * pairs, prints.BANDS) and keys.dtype == np.uint64
    measured = (keys[::2] == keys[1::2]).any(axis=1).mean()
    expected = 1 - (1 - (shared / union) ** 5) ** 25
    assert abs(measured - expected) <= 4 * (expected * (1 - expected) / pairs) ** 0.5 + 1e-9


def test_bands_differ_from_each_other_and_equal_sets_agree_in_all():
    sets = shingle_sets(["a b c d e f", "a b c d e f", "quite another text with other words"])
    keys = band_keys(sets_of(sets))
    assert keys[0].tolist() == keys[1].tolist()
    assert len(set(keys[0].tolist())) == prints.BANDS  # no band stands for another
    assert not (keys[0] == keys[2]).any()
    assert band_keys(Words(np.zeros(0, dtype=np.uint32), np.zeros(1, dtype=np.int64))).shape == (
        0,
        prints.BANDS,
    )


def test_keys_do_not_depend_on_the_rest_of_the_batch():
    sets = shingle_sets(random_texts(6))
    together = band_keys(sets_of(sets))
    for place in range(0, len(sets), 7):
        assert band_keys(sets_of(sets[place : place + 1]))[0].tolist() == together[place].tolist()


SCRIPT = """
import numpy as np
from srde.data.build.fingerprint import NGrams, band_keys, hash_words, shingles, text_hash
ngrams = NGrams(hash_words(["The cat sat on the mat.", "", "東京 tower", "naïve x_1"]))
sets = shingles(ngrams, np.array([0, 1 << 40, 2 << 40, 0], dtype=np.uint64))
print(ngrams.windows(2).hashes.tolist(), sets.hashes.tolist(), band_keys(sets).tolist(), text_hash("é"))
"""


def test_every_process_finds_the_same_numbers():
    outputs = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1 and len(outputs.pop()) > 500


def test_signatures_can_be_made_after_a_fork():
    """A pool of threads that began before a fork never answers after it."""
    program = """
import os, numpy as np
from srde.data.build.fingerprint import Words, band_keys
sets = Words(np.arange(300_000, dtype=np.uint32), np.arange(0, 300_001, 150))
before = band_keys(sets)
assert "RAYON_NUM_THREADS" not in os.environ
child = os.fork()
if child == 0:
    os._exit(0 if (band_keys(sets) == before).all() else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAYON_NUM_THREADS"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=30).returncode == 0
