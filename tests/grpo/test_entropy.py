"""The adaptive entropy bonus."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.entropy import EntropyControl

LAW = settings(deadline=None, derandomize=True, max_examples=60)


def test_it_grows_below_the_target_and_is_off_above():
    control = EntropyControl(coef=0.001, target=0.5, step=0.002, maximum=0.004)
    assert control.applied == 0.001
    low = control.after(0.5)
    assert (low.coef, low.applied) == (pytest.approx(0.003), pytest.approx(0.003))
    assert low.after(0.1).coef == 0.004
    high = low.after(0.6)
    assert (high.coef, high.applied) == (pytest.approx(0.001), 0.0)
    assert high.after(0.7).coef == 0.0
    assert high.after(0.4).applied == pytest.approx(0.003)


def test_without_a_target_it_is_constant():
    control = EntropyControl(coef=0.01)
    assert control.after(3.0) is control
    assert control.applied == 0.01


@LAW
@given(st.lists(st.floats(0, 5), max_size=30), st.floats(0, 0.01))
def test_it_stays_within_its_bounds(entropies, first):
    control = EntropyControl(coef=first, target=1.0, step=0.003, maximum=0.01)
    for entropy in entropies:
        control = control.after(entropy)
        assert 0 <= control.coef <= 0.01
        assert control.applied == (control.coef if entropy <= 1.0 else 0.0)


def test_a_nan_steers_nothing():
    with pytest.raises(ValueError, match="NaN"):
        EntropyControl(coef=0.01, target=1.0).after(math.nan)
