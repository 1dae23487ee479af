"""`decontaminated`: traces that share 13 words in a row with a question of an evaluation set go, and every hit is listed.

Training data that overlaps with an evaluation by a 13-gram counts as contaminated since Brown et al. 2020, appendix C, who
also leave out n-grams that many documents share.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from distill.dedup import question_of
from distill.filters.base import Drop, Filter, Table
from distill.ngrams import Span, ngram_hashes, word_spans, words
from distill.trace import Trace
from rollout.errors import UserError
from rollout.rows import Rows, read_jsonl, read_parquet

_UNMARKED = re.compile(r"[\s$]+")
_EXCERPT_CHARS = 200
Part = Literal["question", "completion"]


class EvaluationSetConfig(Table):
    """An evaluation set whose questions must not be trained on."""

    path: Path = Field(description="a .jsonl or .parquet file, or a folder of .parquet files")
    columns: tuple[str, ...] = Field(
        default=("question",), min_length=1, description="columns of text that must not be found in a trace"
    )


class DecontaminatedConfig(Table):
    """What must not be found in traces."""

    sets: dict[str, EvaluationSetConfig] = Field(default_factory=dict, description="evaluation sets by name")
    ngram: int = Field(default=13, ge=1, description="words in a row that are a hit; case and punctuation don't count")
    parts: tuple[Part, ...] = Field(
        default=("question", "completion"), min_length=1, description="parts of a trace that are searched"
    )
    max_questions_with_ngram: int = Field(
        default=10,
        ge=1,
        description="an n-gram of more questions of a set than this is a phrase of its form, and no hit",
    )


class Passage(NamedTuple):
    """A text of an evaluation set."""

    set_name: str
    row: int
    text: str


class Hit(NamedTuple):
    """`phrase` of an evaluation passage, found in `excerpt` of a trace."""

    passage: Passage
    phrase: str
    excerpt: str


class Evaluations:
    """The n-grams of all evaluation sets, and whole texts that are shorter than one n-gram."""

    def __init__(self, config: DecontaminatedConfig) -> None:
        """Read the sets; UserError names the file, row and column that can't be."""
        self._ngram = config.ngram
        self._by_ngram: dict[tuple[str, ...], list[Passage]] = defaultdict(list)
        self._short: dict[str, list[Passage]] = defaultdict(list)
        self.num_passages: Counter[str] = Counter()
        hashes = [np.empty(0, np.uint64)]
        for name, source in config.sets.items():
            hashes += self._add_set(name, source, config.max_questions_with_ngram)
        self._hashes = np.unique(np.concatenate(hashes))  # finds candidates fast; what counts is `_by_ngram`

    def _add_set(self, name: str, source: EvaluationSetConfig, most_questions: int) -> list[np.ndarray]:
        hashes: list[np.ndarray] = []
        found: dict[tuple[str, ...], dict[int, Passage]] = defaultdict(dict)
        for row, text in _texts(source):
            passage = Passage(name, row, text)
            self.num_passages[name] += 1
            tokens = words(text)
            if len(tokens) < self._ngram and (whole := _whole(text)):
                self._short[whole].append(passage)
            hashes.append(ngram_hashes(tokens, self._ngram))
            for start in range(len(tokens) - self._ngram + 1):
                found[tuple(tokens[start : start + self._ngram])].setdefault(row, passage)
        if not self.num_passages[name]:
            raise UserError(f"{source.path}: the evaluation set {name!r} is empty")
        for ngram, rows in found.items():
            if len(rows) <= most_questions:
                self._by_ngram[ngram] += rows.values()
        return hashes

    def hits(self, text: str, *, is_question: bool) -> list[Hit]:
        """Each evaluation passage that shares an n-gram with `text`, once, with the first that they share.

        A passage of fewer words than an n-gram is hit by a question that is the same but for case, spaces and `$`.
        """
        hits: dict[Passage, Hit] = {}
        if is_question:
            for passage in self._short.get(_whole(text), ()):
                hits[passage] = Hit(passage, passage.text, text)
        candidates = np.flatnonzero(self._is_known(ngram_hashes(words(text), self._ngram)))
        spans = list(word_spans(text)) if len(candidates) else []
        for start in candidates.tolist():
            found = spans[start : start + self._ngram]
            for passage in self._by_ngram.get(tuple(span.word for span in found), ()):
                hits.setdefault(passage, Hit(passage, " ".join(span.word for span in found), _excerpt(text, found)))
        return list(hits.values())

    def _is_known(self, hashes: np.ndarray) -> np.ndarray:
        """Which hashes are those of n-grams of the sets, by binary search."""
        if not len(self._hashes):
            return np.zeros(len(hashes), bool)
        places = np.searchsorted(self._hashes, hashes)
        return self._hashes[np.minimum(places, len(self._hashes) - 1)] == hashes


class Decontaminated(Filter):
    """Keeps a trace that shares no n-gram with an evaluation set; `listed` takes each hit as a line of JSON values.

    What is found in a question is listed once for all its traces.
    """

    name = "decontaminated"

    def __init__(self, config: DecontaminatedConfig) -> None:
        self._config = config
        self._evaluations = Evaluations(config)
        self._questions: dict[bytes, list[Hit]] = {}
        self.listed: list[dict[str, Any]] = []

    @property
    def num_passages(self) -> Mapping[str, int]:
        """Texts of each evaluation set."""
        return self._evaluations.num_passages

    def fault(self, trace: Trace) -> Drop | None:
        """The evaluation set that a part of the trace is found in."""
        for part in self._config.parts:
            hits = self._question_hits(trace) if part == "question" else self._completion_hits(trace)
            if hits:
                passage = hits[0].passage
                return Drop(f"{part} in {passage.set_name}", f"row {passage.row}, {hits[0].phrase}"[:300])
        return None

    def _question_hits(self, trace: Trace) -> list[Hit]:
        text = question_of(trace)
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key not in self._questions:
            self._questions[key] = self._evaluations.hits(text, is_question=True)
            self.listed += [_line(hit, trace, "question") for hit in self._questions[key]]
        return self._questions[key]

    def _completion_hits(self, trace: Trace) -> list[Hit]:
        hits = self._evaluations.hits(trace.completion, is_question=False)
        self.listed += [_line(hit, trace, "completion") for hit in hits]
        return hits


def _line(hit: Hit, trace: Trace, part: Part) -> dict[str, Any]:
    return {
        "source": trace.source,
        "question_id": trace.question_id,
        "sample_index": trace.sample_index if part == "completion" else None,
        "part": part,
        "text": hit.excerpt,
        "phrase": hit.phrase,
        "evaluation_set": hit.passage.set_name,
        "evaluation_row": hit.passage.row,
        "evaluation_text": hit.passage.text,
    }


def _whole(text: str) -> str:
    """The text without case, spaces, `$` and a last full stop or question mark; signs inside it count."""
    return _UNMARKED.sub("", unicodedata.normalize("NFKC", text).casefold()).rstrip(".?!。？！")


def _excerpt(text: str, found: list[Span]) -> str:
    start, end = max(0, found[0].start - _EXCERPT_CHARS), found[-1].end + _EXCERPT_CHARS
    return f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"


def _texts(source: EvaluationSetConfig) -> Iterator[tuple[int, str]]:
    """(row from 0, text) of every named column."""
    path = source.path.expanduser()
    rows = read_jsonl(path) if path.suffix == ".jsonl" else read_parquet(path)
    for index, row in enumerate(rows):
        for column in source.columns:
            yield index, _text(row, column, rows, index)


def _text(row: Mapping[str, Any], column: str, rows: Rows, index: int) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = f"a {type(value).__name__}" if column in row else f"missing (there are {', '.join(row)})"
        raise UserError(f"{rows.place(index)}: column {column!r} is {found}; a text is needed")
    return value
