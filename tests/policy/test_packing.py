"""The layout of packed sequences, and fitting them into bins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.deepseek import Packing
from policy.packing import layout, pack_by_length

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
