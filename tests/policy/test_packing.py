"""The layout of packed sequences, and fitting them into bins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.deepseek import Packing
from policy.packing import balance_over_ranks, layout, pack_by_length, wasted_shares

LAW = settings(deadline=None, derandomize=True, max_examples=100)
LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=30)


@LAW
@given(LENGTHS)
def test_the_layout_says_where_each_token_lies(lengths: list[int]) -> None:
    sequence_ids, position_ids, cu_seqlens = layout(torch.tensor(lengths))
    tokens = [(row, place) for row, length in enumerate(lengths) for place in range(length)]
    assert list(zip(sequence_ids.tolist(), position_ids.tolist(), strict=True)) == tokens
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [sum(lengths[:row]) for row in range(len(lengths) + 1)]


@LAW
@given(LENGTHS)
def test_padding_is_undone_and_leaves_zeros(lengths: list[int]) -> None:
    _, position_ids, cu_seqlens = layout(torch.tensor(lengths))
    packing = Packing.of(position_ids, cu_seqlens)
    x = torch.arange(1.0, 2 * len(position_ids) + 1).reshape(-1, 2)
    padded = packing.pad(x)
    assert padded.shape == (len(lengths), max(lengths), 2)
    assert torch.equal(packing.unpad(padded), x)
    assert padded.sum() == x.sum()
    for row, length in enumerate(lengths):
        assert padded[row, length:].abs().sum() == 0


@LAW
@given(LENGTHS, st.integers(20, 60))
def test_every_item_lies_in_one_bin_that_holds_it(lengths: list[int], capacity: int) -> None:
    bins = pack_by_length(lengths, capacity)
    assert sorted(place for own in bins for place in own) == list(range(len(lengths)))
    assert all(0 < sum(lengths[place] for place in own) <= capacity for own in bins)
    # Two bins that would fit into one can't both be there after best fit.
    sums = sorted(sum(lengths[place] for place in own) for own in bins)
    assert len(sums) < 2 or sums[0] + sums[1] > capacity
    assert pack_by_length(lengths, capacity) == bins


def test_the_best_bin_is_chosen_and_ties_keep_their_order() -> None:
    assert pack_by_length([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert pack_by_length([3, 3, 3], 6) == [[0, 1], [2]]
    assert pack_by_length([], 6) == []
    assert pack_by_length(iter([6]), 6) == [[0]]


def test_an_item_that_fits_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match="an item of 7 tokens does not fit into 6"):
        pack_by_length([1, 7], 6)


@LAW
@given(LENGTHS, st.integers(1, 9), st.integers(20, 60))
def test_ranks_share_all_sequences_in_equally_many_micro_batches(lengths: list[int], ranks: int, capacity: int) -> None:
    plan = balance_over_ranks(lengths, ranks, capacity)
    assert len(plan) == ranks
    assert sorted(place for own in plan for part in own for place in part) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in part) <= capacity for own in plan for part in own)
    assert len({len(own) for own in plan}) == 1
    # Never more rounds than best-fit bins dealt out to the ranks.
    assert len(plan[0]) <= -(-len(pack_by_length(lengths, capacity)) // ranks)
    assert balance_over_ranks(lengths, ranks, capacity) == plan
    longest = [max(sum(lengths[place] for place in part) for part in parts) for parts in zip(*plan, strict=True)]
    assert ranks == 1 or longest == sorted(longest, reverse=True)
    packing, imbalance = wasted_shares(lengths, plan, capacity)
    assert 0 <= packing < 1
    assert 0 <= imbalance < 1


@LAW
@given(LENGTHS, st.integers(20, 60))
def test_one_rank_s_share_is_the_best_fit(lengths: list[int], capacity: int) -> None:
    assert balance_over_ranks(lengths, 1, capacity) == [pack_by_length(lengths, capacity)]
    assert wasted_shares(lengths, [pack_by_length(lengths, capacity)], capacity)[1] == pytest.approx(0)


def test_fewer_sequences_than_ranks_leave_some_without() -> None:
    assert balance_over_ranks([7, 9], 4, 10) == [[[1]], [[0]], [[]], [[]]]
    assert balance_over_ranks([10, 10, 10], 2, 10) == [[[0], [2]], [[1], []]]


def test_the_longest_stand_side_by_side() -> None:
    # Equal sums over both rounds would put a 10 beside a 6.
    plan = balance_over_ranks([10, 10, 3, 3, 3, 3], 2, 10)
    assert [[sum([10, 10, 3, 3, 3, 3][place] for place in part) for part in own] for own in plan] == [[10, 6], [10, 6]]


def test_what_only_best_fit_can_place_is_placed() -> None:
    lengths = [6, 6, 5, 5, 5, 5, 4, 4]  # 40 in 4 bins of 10
    plan = balance_over_ranks(lengths, 2, 10)
    assert [len(own) for own in plan] == [2, 2]
    assert wasted_shares(lengths, plan, 10) == (0, 0)


def test_waste_is_counted_in_rounds_and_in_waiting() -> None:
    # 12 of 16 slots are used, and 12 tokens need one round of two micro-batches of 10, not two.
    assert wasted_shares([6, 4, 2], [[[0], []], [[1], [2]]], 10) == pytest.approx((0.5, 0.25))
    assert wasted_shares([], [[[]], [[]]], 10) == (0, 0)


@pytest.mark.parametrize("num_ranks", [8, 64])
@pytest.mark.parametrize("num_samples", [512, 8192])
def test_on_a_long_tail_ranks_hardly_wait(num_ranks: int, num_samples: int) -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(4000), 1.0, num_samples)
    lengths = np.clip(drawn, 16, 32768).astype(int).tolist()
    packing, imbalance = wasted_shares(lengths, balance_over_ranks(lengths, num_ranks, 32768), 32768)
    assert packing + imbalance < 0.03


def test_a_sequence_no_rank_can_hold_is_named() -> None:
    with pytest.raises(ValueError, match="an item of 11 tokens does not fit into 10"):
        balance_over_ranks([3, 11], 2, 10)
