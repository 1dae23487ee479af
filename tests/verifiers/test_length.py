"""`length`: DAPO's soft overlong punishment at its corners, and plain limits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers import PlainTask, VerifierLookupError, resolve


def score(length, metadata=None, **options):
    verdict = resolve("length", options)("x" * length, PlainTask(None, "", metadata or {}))
    return verdict.score, verdict.status


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1.0), (21, -1.0), (1000, -1.0)],
)
def test_soft_punishment_falls_linearly_over_the_cache(length, expected):
    """Equation 13 with L_max = 20, L_cache = 4."""
    assert score(length, longest=20, soft=4) == (expected, "correct" if expected == 0 else "wrong")


@pytest.mark.parametrize(("length", "expected"), [(1, -1.0), (2, 0.0), (5, 0.0), (6, -1.0)])
def test_plain_limits(length, expected):
    assert score(length, longest=5, shortest=2)[0] == expected


def test_tokens_come_from_the_metadata_or_not_at_all():
    assert score(1000, {"num_tokens": 5}, longest=5, unit="tokens") == (0.0, "correct")
    assert score(1, {"num_tokens": 6}, longest=5, unit="tokens") == (-1.0, "wrong")
    for metadata in ({}, {"num_tokens": "6"}, {"num_tokens": True}):
        assert score(1, metadata, longest=5, unit="tokens") == (0.0, "error")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs the option 'longest'"),
        ({"longest": 0}, "longest is 0"),
        ({"longest": 5, "soft": 6}, "soft is 6"),
        ({"longest": 5, "soft": 2, "shortest": 4}, "shortest is 4"),
        ({"longest": 5, "unit": "words"}, "unit is 'words'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(VerifierLookupError, match=message):
        resolve("length", options)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(0, 60), st.integers(1, 40), st.integers(0, 40))
def test_longer_is_never_better(length, longest, soft):
    soft = min(soft, longest)
    one, other = (score(n, longest=longest, soft=soft)[0] for n in (length, length + 1))
    assert -1.0 <= other <= one <= 0.0
