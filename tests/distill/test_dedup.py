"""Near-duplicates: MinHash estimates Jaccard, LSH finds what an exact search finds, and nothing depends on chance."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.dedup import (
    NearDuplicateQuestions,
    NearDuplicateQuestionsConfig,
    NearDuplicateTraces,
    NearDuplicateTracesConfig,
    Signer,
    lsh_bands,
    question_of,
    signature_of,
    similarity,
)
from distill.filters.at_most_k import farthest_first
from distill.filters.base import Drop
from distill.ngrams import jaccard, ngram_hashes, shingles, word_spans, words, words_and_symbols
from tests.distill.trace_builders import prose, trace

ROOT = Path(__file__).resolve().parents[2]


def questions(*texts: str, **options: object) -> list[str | None]:
    """Of each question, under an id of its own, the detail of the drop, or None."""
    made = NearDuplicateQuestions(NearDuplicateQuestionsConfig(**options))
    drops = [made.fault(trace(f"q/{index}", question=text)) for index, text in enumerate(texts)]
    return [drop and drop.detail for drop in drops]


# --- words and n-grams -----------------------------------------------------------------------------------------------


def test_words_are_those_of_another_spelling() -> None:
    assert words("Let $X_1 = 3.5$, so:\n\\frac{1}{2}") == ["let", "x", "1", "3", "5", "so", "frac", "1", "2"]
    assert words("STRASSE １２ ﬁne") == words("straße 12 fine")
    assert words("求 x 的值") == ["求", "x", "的", "值"]
    assert words_and_symbols("$3+4$") == ["3", "+", "4"]
    assert words_and_symbols("a_1") == ["a", "_", "1"]
    text = "Let $X_1 = 3$"
    assert [(span.word, text[span.start : span.end]) for span in word_spans(text)] == [
        ("let", "Let"),
        ("x", "X"),
        ("1", "1"),
        ("3", "3"),
    ]


@given(tokens=st.lists(st.sampled_from("abc"), max_size=30), n=st.integers(1, 5))
@settings(deadline=None, derandomize=True)
def test_equal_n_grams_and_no_others_have_equal_hashes(tokens: list[str], n: int) -> None:
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    hashes = ngram_hashes(tokens, n).tolist()
    assert len(hashes) == len(ngrams)
    assert len(set(zip(ngrams, hashes, strict=True))) == len(set(ngrams)) == len(set(hashes))


def test_hashes_and_signatures_are_the_same_in_another_process() -> None:
    code = (
        "from distill.dedup import signature_of; from distill.ngrams import ngram_hashes\n"
        "print(ngram_hashes(['a', 'b', 'c'], 2).tolist(), signature_of('one two three four', 2, 16).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PYTHONHASHSEED": "1"}, check=True
    )
    here = f"{ngram_hashes(['a', 'b', 'c'], 2).tolist()} {signature_of('one two three four', 2, 16).tolist()}\n"
    assert done.stdout == here


def test_jaccard_of_shingles() -> None:
    left, right = shingles(list("abcd"), 2), shingles(list("bcde"), 2)  # ab bc cd, bc cd de
    assert jaccard(left, right) == 2 / 4
    assert jaccard(left, left) == jaccard(shingles([], 2), shingles([], 2)) == 1
    assert len(shingles(["a"], 3)) == 1  # a text shorter than a shingle is one


def test_a_signature_estimates_jaccard_and_is_that_of_the_set() -> None:
    rng = random.Random(0)
    pool = np.unique(np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64))
    for share in (0.1, 0.5, 0.9):
        common = int(6000 * share)
        left, right = pool[:6000], pool[6000 - common : 12_000 - common]
        exact = jaccard(left, right)
        sign = Signer(512)
        estimate = similarity(sign(left).hashvalues[None], sign(right).hashvalues)[0]
        assert abs(estimate - exact) < 4 * (exact * (1 - exact) / 512) ** 0.5 + 1e-9
    shuffled = left.copy()
    rng.shuffle(shuffled)
    assert (Signer(64)(left).hashvalues == Signer(64)(shuffled).hashvalues).all()


# --- questions -------------------------------------------------------------------------------------------------------


def test_a_question_in_almost_the_same_words_is_dropped() -> None:
    text = f"Find all {prose(0, 40)} and prove it."
    same = text.upper().replace("FIND ALL", "Find  every")
    assert questions(text, prose(500, 40), same) == [None, None, "0.91 alike q/0"]


def test_all_traces_of_a_question_go_its_way() -> None:
    made = NearDuplicateQuestions(NearDuplicateQuestionsConfig())
    text = prose(0, 40)
    order = ["a", "b", "a", "b", "c"]
    texts = {"a": text, "b": text, "c": prose(99, 40)}
    drops = [made.fault(trace(name, question=texts[name])) for name in order]
    same = Drop("near-duplicate question", "1.00 alike a")
    assert drops == [None, same, None, same, None]


def test_numbers_make_another_question_of_the_same_words() -> None:
    text = f"{prose(0, 30)} has 3 apples and buys 5 more; {prose(50, 30)}?"
    other = text.replace("5", "7")
    moved = text.replace("3 apples and buys 5", "5 apples and buys 3")
    assert questions(text, other, moved) == [None, None, "0.84 alike q/0"]
    assert questions(text, f"{text} 5") == [None, None]  # how often a number is there counts as well
    assert questions(text, other, same_numbers=False) == [None, "0.91 alike q/0"]


def test_signs_make_another_question_of_short_ones() -> None:
    assert questions("Compute 3 + 4 * 5", "Compute 3 * 4 + 5", "Compute 3 + 4 * 5 .") == [None, None, "0.80 alike q/0"]


def test_a_system_prompt_makes_no_questions_alike() -> None:
    system = {"role": "system", "content": prose(0, 200)}
    made = NearDuplicateQuestions(NearDuplicateQuestionsConfig())
    asked = [[system, {"role": "user", "content": f"Why {word}?"}] for word in ("north", "south")]
    assert [made.fault(trace(f"q/{i}", question=q)) for i, q in enumerate(asked)] == [None, None]
    assert question_of(trace(question=asked[0])) == "Why north?"
    assert question_of(trace(question=[system])) == prose(0, 200)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 0.95, 1.0])
def test_bands_overlook_few_at_the_threshold_with_the_most_rows(threshold: float) -> None:
    bands, rows = lsh_bands(threshold, 128)
    assert bands * rows <= 128
    assert bands >= 2
    assert (1 - threshold**rows) ** bands <= 0.002
    assert rows == 64 or (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > 0.002


def test_too_short_signatures_are_used_as_well_as_they_can_be() -> None:
    assert lsh_bands(0.1, 16) == (16, 1)


def test_lsh_finds_what_an_exact_search_finds() -> None:
    """300 originals, each with a version of which some words are others: every pair above the threshold is found."""
    rng = random.Random(1)
    texts: list[str] = []
    for number in range(300):
        tokens = [f"word{rng.randrange(10_000)}" for _ in range(60)]
        texts.append(" ".join(tokens))
        for place in rng.sample(range(60), rng.choice([0, 1, 1, 2, 3, 6])):
            tokens[place] = f"other{number}"
        texts.append(" ".join(tokens))
    found = questions(*texts, same_numbers=False)
    sets = [shingles(words_and_symbols(text), 3) for text in texts]
    exact = [index % 2 == 1 and jaccard(sets[index - 1], sets[index]) >= 0.8 for index in range(600)]
    missed = sum(is_near and not drop for is_near, drop in zip(exact, found, strict=True))
    assert sum(exact) > 150
    assert [bool(drop) for drop, is_near in zip(found, exact, strict=True) if not is_near] == [False] * (
        600 - sum(exact)
    )
    assert missed == 0


# --- traces ----------------------------------------------------------------------------------------------------------


def test_a_trace_of_almost_the_same_text_is_dropped_within_its_question_only() -> None:
    made = NearDuplicateTraces(NearDuplicateTracesConfig())
    text = prose(0, 200)
    rows = [
        ("a", text),
        ("a", prose(5000, 200)),
        ("a", text.replace("betaalphaalpha", "something")),
        ("b", text),
        ("a", text),
    ]
    drops = [
        made.fault(trace(name, reasoning=reasoning, sampling={"sample_index": i}))
        for i, (name, reasoning) in enumerate(rows)
    ]
    assert [drop and drop.reason for drop in drops] == [
        None,
        None,
        "near-duplicate trace",
        None,
        "near-duplicate trace",
    ]
    assert drops[-1] == Drop("near-duplicate trace", "1.00 alike sample 0 of source")


def test_many_traces_of_one_question_are_each_compared_with_all_kept() -> None:
    made = NearDuplicateTraces(NearDuplicateTracesConfig(num_permutations=32))
    texts = [prose(100 * number, 60) for number in range(37)]
    first = [made.fault(trace(reasoning=text)) for text in texts]
    again = [made.fault(trace(reasoning=text)) for text in texts]
    assert first == [None] * 37
    assert all(drop is not None for drop in again)


# --- the farthest first ----------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=12), k=st.integers(1, 14)
)
@settings(deadline=None, derandomize=True)
def test_each_choice_is_farthest_from_those_before(rows: list[list[int]], k: int) -> None:
    signatures = np.array(rows, np.uint32)
    chosen = farthest_first(signatures, k)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen) == min(k, len(rows))

    def to_nearest(row: int, before: list[int]) -> float:
        return min(float((signatures[row] != signatures[other]).mean()) for other in before)

    for position in range(1, len(chosen)):
        before = chosen[:position]
        rest = [row for row in range(len(rows)) if row not in before]
        assert to_nearest(chosen[position], before) == pytest.approx(max(to_nearest(row, before) for row in rest))
