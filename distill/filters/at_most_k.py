"""`at_most_k`: of each question the k traces that are least alike."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
from pydantic import Field

from distill.dedup import signature_of, similarity
from distill.filters.base import Drop, Filter, Table
from distill.trace import Trace


class AtMostKConfig(Table):
    """The most traces of one question, chosen for their diversity."""

    k: int = Field(default=4, ge=1, description="traces kept of each question at most")
    seed: int = Field(default=0, ge=0, description="decides the first one; the others follow from it")
    shingle_words: int = Field(default=5, ge=1, description="words of one shingle; symbols are words")
    num_permutations: int = Field(default=128, ge=16, le=1024, description="length of a MinHash signature")


class AtMostK(Filter):
    """Keeps k traces of a question by farthest-first traversal (Gonzalez 1985) of their MinHash distances.

    The first is drawn by a hash of seed and text; each next one is the trace farthest from all chosen, its distance to
    them being that to the nearest. So the choice is one of texts: the order in which they come has no part in it.
    """

    name = "at_most_k"
    waits = True

    def __init__(self, config: AtMostKConfig) -> None:
        self._config = config
        self._seen: dict[str, list[tuple[int, bytes, np.ndarray]]] = defaultdict(list)
        self._num_seen = self._num_judged = 0
        self._chosen: set[int] | None = None
        self._totals: dict[str, int] = {}

    def see(self, trace: Trace) -> None:
        """Keep the trace's signature, 4 bytes a permutation, and its place in the order."""
        key = hashlib.blake2b(f"{self._config.seed}\0{trace.completion}".encode(), digest_size=8).digest()
        signature = signature_of(trace.completion, self._config.shingle_words, self._config.num_permutations)
        self._seen[trace.question_id].append((self._num_seen, key, signature))
        self._num_seen += 1

    def fault(self, trace: Trace) -> Drop | None:
        """More than k: not among the chosen."""
        if self._chosen is None:
            self._chosen = {place for seen in self._seen.values() for place in self._choose(seen)}
            self._totals = {question_id: len(seen) for question_id, seen in self._seen.items()}
            self._seen.clear()
        place = self._num_judged
        self._num_judged += 1
        if place in self._chosen:
            return None
        return Drop("more than k of one question", f"{self._config.k} of {self._totals[trace.question_id]} kept")

    def _choose(self, seen: list[tuple[int, bytes, np.ndarray]]) -> list[int]:
        if len(seen) <= self._config.k:
            return [place for place, _, _ in seen]
        ordered = sorted(seen, key=lambda item: (item[1], item[0]))
        chosen = farthest_first(np.stack([signature for _, _, signature in ordered]), self._config.k)
        return [ordered[index][0] for index in chosen]


def farthest_first(signatures: np.ndarray, k: int) -> list[int]:
    """Indices of k of the n signatures [n, p]: the first row, then always the row farthest from its nearest chosen one.

    Of rows equally far the first is taken.
    """
    chosen = [0]
    distance = 1 - similarity(signatures, signatures[0])
    distance[0] = -1
    while len(chosen) < min(k, len(signatures)):
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = np.minimum(distance, 1 - similarity(signatures, signatures[farthest]))
        distance[farthest] = -1
    return chosen
