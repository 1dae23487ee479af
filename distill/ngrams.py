"""Texts as words and word n-grams, in a form that two spellings of one sentence share."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# A run of letters and digits, or one Han or kana character: those languages put no spaces between words.
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_WORD_OR_SYMBOL = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[^\w\s$]|_")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Span(NamedTuple):
    """A word and where it stands in its text."""

    word: str
    start: int
    end: int


def words(text: str) -> list[str]:
    """Words and numbers in one case and one form (NFKC); punctuation, markup and spaces are no part of it."""
    return [_plain(word) for word in _WORD.findall(text)]


def word_spans(text: str) -> Iterator[Span]:
    """`words` with their places in the text."""
    return (Span(_plain(match.group()), match.start(), match.end()) for match in _WORD.finditer(text))


def words_and_symbols(text: str) -> list[str]:
    """`words`, and every other visible character but `$` as a word of its own: 3 + 4 is not 3 * 4."""
    return [_plain(word) for word in _WORD_OR_SYMBOL.findall(text)]


def _plain(word: str) -> str:
    return word.casefold() if word.isascii() else unicodedata.normalize("NFKC", word).casefold()


def ngram_hashes(tokens: Sequence[str], n: int) -> np.ndarray:
    """A 64-bit number for each of the len(tokens) - n + 1 n-grams, the same in every process; empty for fewer tokens.

    A polynomial in an odd multiplier modulo 2^64 over the tokens' own hashes (BLAKE2b), by Horner's rule.
    """
    count = len(tokens) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    numbers = {token: _number(token) for token in set(tokens)}
    coded = np.array([numbers[token] for token in tokens], np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = total * _MULTIPLIER + coded[offset : offset + count]
    return total ^ (total >> np.uint64(32))  # the low half, which short hashes are made of, depends on the high one


def shingles(tokens: Sequence[str], n: int) -> np.ndarray:
    """The set of n-grams as sorted distinct 64-bit numbers; a text of fewer than n tokens is one shingle, an empty none."""
    return np.unique(ngram_hashes(tokens, min(n, len(tokens)))) if tokens else np.empty(0, np.uint64)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|both| / |either| of two sets of shingles; 1 for two empty ones."""
    if not len(left) and not len(right):
        return 1.0
    both = len(np.intersect1d(left, right, assume_unique=True))
    return both / (len(left) + len(right) - both)


def _number(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
