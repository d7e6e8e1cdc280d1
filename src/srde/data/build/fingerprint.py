"""Numbers that stand for texts: word hashes, hashes of word n-grams, MinHash signatures.

All of it works on a batch of texts at once and on flat arrays: `hashes` has the words of all texts in a row, `offsets` says
where each text begins, and text i is ``hashes[offsets[i]:offsets[i + 1]]``.

A word is a run of letters, digits and underscores, lower-cased after Unicode's NFKC, apostrophes left out; of scripts without
spaces each character is one. The hash of a sequence is a polynomial in its elements modulo 2**64 (Karp and Rabin, 1987): of
bytes for a word, of words for an n-gram. All spans then cost two look-ups each. MinHash (Broder, 1997) comes from `rensa`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import rensa
import xxhash

PERMUTATIONS = 125
"""Length of a signature."""
BANDS = 25
"""Bands of 5: two texts with Jaccard similarity s share one with probability 1 - (1 - s^5)^25: 0.99 at 0.7, 1.00 at 0.8."""
SHINGLE = 3
"""Words in an n-gram of near-duplicate detection."""

_UNSPACED = "\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f"  # kana, Chinese characters, Thai
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ASCII_WORDS = (
    bytes(  # what is part of a word, lower-cased; all else becomes a blank
        ord(chr(code).lower()) if chr(code).isalnum() or code == ord("_") else ord(" ") for code in range(128)
    )
    + b" " * 128
)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers have inverses modulo 2**64
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_SEED = 1
_SLAB = 1 << 20  # bytes
_BYTES = np.random.Generator(np.random.PCG64(0)).integers(
    1, 2**64, 256, dtype=np.uint64
)  # what each byte counts in a word


class Words(NamedTuple):
    """The word hashes of a batch of texts: `hashes` uint64 [W], `offsets` int64 [texts + 1]."""

    hashes: np.ndarray
    offsets: np.ndarray


def words(text: str) -> list[bytes]:
    """The words of a text in UTF-8, as compared by every stage."""
    return _spaced(text).split()


def _spaced(text: str) -> bytes:
    """The words of a text with blanks between, and one after the last."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS, b"'") + b" "
    text = unicodedata.normalize("NFKC", text).replace("'", "").replace("\u2019", "")
    found = _WORDS.findall(text.lower())
    return " ".join(found).encode("utf-8", "surrogatepass") + b" "


def hash_words(texts: Sequence[str]) -> Words:
    """The word hashes of texts: polynomials in the words' bytes, about a megabyte of them at once."""
    parts: list[Words] = []
    slab: list[bytes] = []
    size = 0
    for text in texts:
        slab.append(_spaced(text))
        size += len(slab[-1])
        if size >= _SLAB:
            parts.append(_hash_slab(slab))
            slab, size = [], 0
    parts.append(_hash_slab(slab))
    first = np.cumsum([0, *(len(part.hashes) for part in parts)])
    offsets = [part.offsets[1:] + first[place] for place, part in enumerate(parts)]
    return Words(
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([np.zeros(1, dtype=np.int64), *offsets]),
    )


def _hash_slab(spaced: Sequence[bytes]) -> Words:
    ends = np.cumsum([len(one) for one in spaced])
    data = np.frombuffer(b"".join(spaced), dtype=np.uint8)
    within = np.concatenate([[False], data != ord(" "), [False]])
    borders = np.flatnonzero(within[1:] != within[:-1])
    starts, stops = borders[::2], borders[1::2]
    hashes = _Polynomials(_BYTES[data]).of(starts, stops)
    offsets = np.zeros(len(spaced) + 1, dtype=np.int64)
    offsets[1:] = np.searchsorted(starts, ends)
    return Words(_mixed(hashes), offsets)


class _Polynomials:
    """Hashes of any spans of a sequence of numbers, each for two look-ups and a product."""

    def __init__(self, values: np.ndarray) -> None:
        powers, inverses = _powers(len(values) + 1)
        self._inverses = inverses
        self.sums = np.zeros(len(values) + 1, dtype=np.uint64)
        np.cumsum(values * powers[:-1], out=self.sums[1:])

    def of(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The hash of the numbers from each start to its end; 0 for none."""
        return (self.sums[ends] - self.sums[starts]) * self._inverses[starts]

    def windows(self, width: int) -> np.ndarray:
        """The hash of `width` numbers from each place on that has so many."""
        count = max(len(self.sums) - width, 0)
        return (self.sums[width:] - self.sums[:count]) * self._inverses[:count]


class NGrams:
    """Hashes of all windows over a batch of words."""

    def __init__(self, batch: Words) -> None:
        self.batch = batch
        self._polynomials = _Polynomials(batch.hashes)

    def anywhere(self, width: int) -> np.ndarray:
        """The n-grams of `width` words from each place of the batch on, also those that run from one text into the next."""
        return self._polynomials.windows(width)

    def windows(self, width: int) -> Words:
        """The n-grams of `width` words of every text, in order; a text of fewer words has none."""
        lengths = np.maximum(np.diff(self.batch.offsets) - width + 1, 0)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.arange(offsets[-1]) + np.repeat(self.batch.offsets[:-1] - offsets[:-1], lengths)
        return Words(self.anywhere(width)[places], offsets)

    def whole(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The n-grams of all words from a start to an end in the batch, one for each pair; 0 where there is no word."""
        return self._polynomials.of(starts, ends)


def shingles(ngrams: NGrams, salts: np.ndarray) -> Words:
    """The distinct `SHINGLE`-word n-grams of each text, 32 bits each, sorted; of a shorter text, its one n-gram.

    Args:
        ngrams: Of the texts.
        salts: uint64 [texts]: n-grams of texts with different salts have nothing in common.
    """
    flat, offsets = ngrams.windows(SHINGLE)
    whole = ngrams.whole(ngrams.batch.offsets[:-1], ngrams.batch.offsets[1:])
    flat, whole, salts = _high(flat), _high(whole), _high(salts)
    sets = []
    for text in range(len(offsets) - 1):
        own = np.unique(flat[offsets[text] : offsets[text + 1]])
        own = own if len(own) else whole[text : text + 1]
        sets.append(np.sort(own ^ salts[text]) if salts[text] else own)
    sizes = np.zeros(len(sets) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in sets], out=sizes[1:])
    return Words(np.concatenate(sets) if sets else np.zeros(0, dtype=np.uint32), sizes)


def band_keys(sets: Words) -> np.ndarray:
    """Keys for locality-sensitive hashing, uint64 [texts, BANDS]: texts that agree in one may be near duplicates."""
    count = len(sets.offsets) - 1
    if not count:
        return np.zeros((0, BANDS), dtype=np.uint64)
    _start_without_threads()
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        sets.hashes.astype(np.uint64), sets.offsets.astype(np.uint64), PERMUTATIONS, _SEED
    )
    signatures = np.array(matrix.to_rows(), dtype=np.uint64).reshape(count, BANDS, -1)
    keys = np.zeros((count, BANDS), dtype=np.uint64)
    for place in range(signatures.shape[2]):
        keys = _mixed(keys * _BASE + signatures[:, :, place])
    return keys


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Shared elements over all elements of two sorted arrays without repeats."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def text_hash(text: str) -> int:
    """64 bits that stand for a text; the same everywhere."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


_known_powers = [np.ones(1, dtype=np.uint64)] * 2


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first powers of the base and of its inverse."""
    if count > len(_known_powers[0]):
        for place, base in enumerate((_BASE, _INVERSE)):
            factors = np.full(count, base, dtype=np.uint64)
            factors[0] = 1
            _known_powers[place] = np.cumprod(factors)
    return _known_powers[0][:count], _known_powers[1][:count]


@cache
def _start_without_threads() -> None:
    """Lets rensa begin with one thread: the builds' processes are forked, and a pool of threads would not live on in them.

    Its threads are set by an environment variable at its first use, which other libraries read as well.
    """
    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = "1"
    try:
        hashes = np.arange(1 << 16, dtype=np.uint64)
        rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, np.arange(0, (1 << 16) + 1, 1 << 8, dtype=np.uint64), 1, _SEED
        )
    finally:
        del os.environ["RAYON_NUM_THREADS"]
        if before is not None:
            os.environ["RAYON_NUM_THREADS"] = before


def _high(values: np.ndarray) -> np.ndarray:
    return (values >> np.uint64(32)).astype(np.uint32)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spreads bits: an odd factor alone would let low bits depend on low bits only."""
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(32))
