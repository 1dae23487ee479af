"""`repetition`: shares counted by hand, loops found by brute force, and ordinary reasoning left alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers import PlainTask, VerifierLookupError, resolve
from verifiers.repetition import final_loop, repeated_share

REASONING = (
    "There are 12 apples. Tom takes 3 of them, so 12 - 3 = 9 are left. Then Ann brings 4 more apples, and 9 + 4 = 13. "
    "Half of 13 is not whole, so they cut one apple. Each of them gets 6.5 apples in the end."
)


def judged(text, **options):
    verdict = resolve("repetition", options)(text, PlainTask(None))
    return verdict.score, verdict.status


@pytest.mark.parametrize(
    ("words", "ngram", "expected"),
    [("a b c d", 2, 0.0), ("a b a b", 2, 1 / 3), ("a a a a a", 1, 0.8), ("a b", 3, 0.0), ("a b c a b c", 3, 1 / 4)],
)
def test_shares_by_hand(words, ngram, expected):
    assert repeated_share(words.split(), ngram) == pytest.approx(expected)


def test_reasoning_costs_nothing_and_repeats_do():
    assert judged(REASONING) == (0.0, "correct")
    score, status = judged(f"{REASONING} Wait. {REASONING} Or not.")
    assert (status, -0.6 < score < -0.4) == ("wrong", True)
    assert judged(f"{REASONING} Wait. {REASONING} Or not.", max_share=0.6) == (0.0, "correct")


@pytest.mark.parametrize("unit", ["So the answer is 5. ", "a", "我们再算一次。", "\\boxed{5} ", "no no yes "])
def test_loops_at_the_end_get_the_full_punishment(unit):
    spaced = unit if len(unit) > 1 else f"{unit} "
    assert judged(REASONING + spaced * 40) == (-1.0, "wrong")


def test_a_few_repeats_are_no_loop():
    assert judged(REASONING + " ha ha ha ha ha") == (0.0, "correct")
    assert judged("") == (0.0, "correct")


def brute_force(words, min_repeats):
    best = (0, 0)
    for length in range(1, len(words) + 1):
        tail = words[-length:]
        period = next(p for p in range(1, length + 1) if all(tail[i] == tail[i + p] for i in range(length - p)))
        if length >= min_repeats * period:
            best = (length, period)
    return best


letters = st.lists(st.sampled_from("ab"), max_size=7)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(letters, letters, st.integers(1, 4), st.integers(2, 4))
def test_loops_are_those_of_brute_force(start, unit, repeats, min_repeats):
    words = start + unit * repeats
    assert final_loop(words, min_repeats) == brute_force(words, min_repeats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ngram": 0}, "ngram is 0"),
        ({"max_share": 1.0}, "max_share is 1.0"),
        ({"min_repeats": 1}, "min_repeats is 1"),
        ({"min_loop_words": 0}, "min_loop_words is 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(VerifierLookupError, match=message):
        resolve("repetition", options)


@pytest.mark.parametrize("unit", ["a b ", "你", "! ", "aab ", "a b c d e f g h "])
def test_a_million_characters_of_anything(unit):
    """Work in the square of the length would take hours here."""
    assert judged(unit * (1_000_000 // len(unit))) == (-1.0, "wrong")
