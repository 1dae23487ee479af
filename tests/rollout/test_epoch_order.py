"""Laws of the order in which steps take rows."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.epoch_order import EpochOrder
from rollout.errors import UserError

LAW = settings(deadline=None, derandomize=True, max_examples=80)


@LAW
@given(st.integers(1, 12), st.data())
def test_every_row_once_per_epoch_and_no_row_twice_in_a_step(num_rows, data):
    num_prompts = data.draw(st.integers(1, num_rows))
    seed = data.draw(st.integers(0, 5))
    order = EpochOrder(num_rows, shuffle_seed=3)
    steps = [order.rows(seed, step, num_prompts) for step in range(6 * num_rows // num_prompts)]
    assert all(len(set(rows)) == num_prompts for rows in steps)
    taken = list(chain(*steps))
    for start in range(0, len(taken) - num_rows + 1, num_rows):
        assert sorted(taken[start : start + num_rows]) == list(range(num_rows))


def test_a_step_depends_on_seed_and_step_alone():
    order = EpochOrder(50, shuffle_seed=0)
    later = order.rows(7, 9, 8)
    assert EpochOrder(50, shuffle_seed=0).rows(7, 9, 8) == later
    assert order.rows(8, 9, 8) != later != EpochOrder(50, shuffle_seed=1).rows(7, 9, 8)


def test_epochs_are_shuffled_differently():
    order = EpochOrder(20, shuffle_seed=0)
    assert order.rows(0, 0, 20) != order.rows(0, 1, 20)


@pytest.mark.parametrize("num_prompts", [0, 4])
def test_more_prompts_than_rows_are_refused(num_prompts):
    with pytest.raises(UserError, match=f"num_prompts = {num_prompts} .* 3"):
        EpochOrder(3, shuffle_seed=0).rows(0, 0, num_prompts)
