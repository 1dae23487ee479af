"""Near-duplicate questions and near-duplicate traces, by MinHash (Broder 1997); the same in every process and order of calls.

Questions are found through MinHash LSH and then compared exactly; traces of one question, of which there are few, are
compared by their signatures, each with each.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH
from pydantic import Field

from distill.filters.base import Drop, Filter, Table
from distill.ngrams import jaccard, ngram_hashes, shingles, words_and_symbols
from distill.trace import Trace

_SEED = 1  # of the permutations: part of what a signature is
_SHINGLES_PER_UPDATE = 4096  # times the permutations is what one update holds in memory
_MISSED = 0.002  # share of pairs right at the threshold that the index may overlook; farther above it they are fewer


class NearDuplicateQuestionsConfig(Table):
    """Questions that are another one in almost the same words."""

    threshold: float = Field(
        default=0.8, gt=0, le=1, description="Jaccard similarity of two questions from which they are the same"
    )
    shingle_words: int = Field(default=3, ge=1, description="words of one shingle; symbols are words")
    num_permutations: int = Field(default=128, ge=16, le=1024, description="length of a MinHash signature")
    same_numbers: bool = Field(
        default=True, description="questions whose numbers differ are different ones, however alike their words"
    )


class NearDuplicateTracesConfig(Table):
    """Traces of one question that say almost the same."""

    threshold: float = Field(
        default=0.8, gt=0, le=1, description="estimated Jaccard similarity of two traces from which they are the same"
    )
    shingle_words: int = Field(default=5, ge=1, description="words of one shingle; symbols are words")
    num_permutations: int = Field(default=128, ge=16, le=1024, description="length of a MinHash signature")


def question_of(trace: Trace) -> str:
    """What the question asks: of chat messages those of the user alone, since many questions share a system prompt."""
    if isinstance(trace.question, str):
        return trace.question
    asked = [message["content"] for message in trace.question if message["role"] == "user"]
    return "\n\n".join(asked) or trace.question_text


class Signer:
    """MinHash signatures: uint32 [num_permutations], of which two sets share a share that estimates their Jaccard."""

    def __init__(self, num_permutations: int) -> None:
        self._empty = MinHash(num_perm=num_permutations, seed=_SEED, hashfunc=int)

    def __call__(self, shingled: np.ndarray) -> MinHash:
        """The MinHash of a set of shingles (`ngrams.shingles`)."""
        signature = self._empty.copy()
        short = (shingled & np.uint64(0xFFFFFFFF)).tolist()
        for start in range(0, len(short), _SHINGLES_PER_UPDATE):
            signature.update_batch(short[start : start + _SHINGLES_PER_UPDATE])
        return signature


@lru_cache(maxsize=256)  # a batch: two filters in a row sign the same texts
def signature_of(text: str, shingle_words: int, num_permutations: int) -> np.ndarray:
    """The signature of a text, as an array that can't be written to."""
    signature = _signer(num_permutations)(shingles(words_and_symbols(text), shingle_words)).hashvalues
    signature.setflags(write=False)
    return signature


@lru_cache
def _signer(num_permutations: int) -> Signer:
    return Signer(num_permutations)


def similarity(signatures: np.ndarray, signature: np.ndarray) -> np.ndarray:
    """Estimated Jaccard of one signature [p] with each of `signatures` [n, p]: [n]."""
    return (signatures == signature).mean(axis=-1)


def lsh_bands(threshold: float, num_permutations: int) -> tuple[int, int]:
    """(bands, rows of a band) for MinHash LSH: the most rows with which few pairs at the threshold are overlooked.

    Two sets of Jaccard s share none of b bands of r rows with probability (1 - s^r)^b. More rows mean fewer candidates
    that are none, which cost no more than a comparison each.
    """
    best = (num_permutations, 1)
    for rows in range(2, num_permutations // 2 + 1):
        bands = num_permutations // rows
        if (1 - threshold**rows) ** bands <= _MISSED:
            best = (bands, rows)
    return best


class _Question(NamedTuple):
    question_id: str
    shingled: np.ndarray


class NearDuplicateQuestions(Filter):
    """Keeps the traces of a question unless an earlier question, under another id, is almost the same.

    Which question is the earlier one follows the order of the traces. Of each kept question the shingles and its place
    in the index stay in memory: about 8 KiB.
    """

    name = "near_duplicate_questions"

    def __init__(self, config: NearDuplicateQuestionsConfig) -> None:
        self._config = config
        self._sign = Signer(config.num_permutations)
        bands = lsh_bands(config.threshold, config.num_permutations)
        self._index = MinHashLSH(num_perm=config.num_permutations, params=bands)
        self._kept: list[_Question] = []
        self._known: dict[str, Drop | None] = {}

    def fault(self, trace: Trace) -> Drop | None:
        """Near-duplicate of the earlier question that is most alike."""
        if trace.question_id not in self._known:
            self._known[trace.question_id] = self._place(trace.question_id, question_of(trace))
        return self._known[trace.question_id]

    def _place(self, question_id: str, text: str) -> Drop | None:
        question = _Question(question_id, self._shingled(text))
        signature = self._sign(question.shingled)
        candidates = sorted(key for key in self._index.query(signature) if isinstance(key, int))
        alike = [jaccard(question.shingled, self._kept[key].shingled) for key in candidates]
        if alike and (best := max(alike)) >= self._config.threshold:
            other = self._kept[candidates[alike.index(best)]]
            return Drop("near-duplicate question", f"{best:.2f} alike {other.question_id}")
        self._index.insert(len(self._kept), signature, check_duplication=False)
        self._kept.append(question)
        return None

    def _shingled(self, text: str) -> np.ndarray:
        """The question's shingles, each with all its numbers where these count: other numbers, no shingle in common."""
        tokens = words_and_symbols(text)
        shingled = shingles(tokens, self._config.shingle_words)
        numbers = sorted(token for token in tokens if any(map(str.isdigit, token)))
        if self._config.same_numbers and numbers:
            shingled = np.sort(shingled ^ ngram_hashes(numbers, len(numbers)))
        return shingled


class NearDuplicateTraces(Filter):
    """Keeps a trace unless an earlier kept one of its question is almost the same; signatures stay in memory."""

    name = "near_duplicate_traces"

    def __init__(self, config: NearDuplicateTracesConfig) -> None:
        self._config = config
        self._kept: dict[str, _Signatures] = defaultdict(_Signatures)

    def fault(self, trace: Trace) -> Drop | None:
        """Near-duplicate of the earlier trace that is most alike."""
        signature = signature_of(trace.completion, self._config.shingle_words, self._config.num_permutations)
        kept = self._kept[trace.question_id]
        alike = similarity(kept.rows, signature) if len(kept.labels) else np.zeros(1)
        best = int(alike.argmax())
        if alike[best] >= self._config.threshold:
            return Drop("near-duplicate trace", f"{alike[best]:.2f} alike {kept.labels[best]}")
        kept.add(signature, f"sample {trace.sample_index} of {trace.source}")
        return None


class _Signatures:
    """The signatures of one question's kept traces in an array that doubles when it is full, and what to call them."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._rows = np.empty((0, 0), np.uint32)

    @property
    def rows(self) -> np.ndarray:
        """Signatures [n, p]."""
        return self._rows[: len(self.labels)]

    def add(self, signature: np.ndarray, label: str) -> None:
        """One more."""
        if len(self.labels) == len(self._rows):
            grown = np.empty((max(1, 2 * len(self._rows)), len(signature)), np.uint32)
            grown[: len(self.labels)] = self.rows if self.labels else 0
            self._rows = grown
        self._rows[len(self.labels)] = signature
        self.labels.append(label)
