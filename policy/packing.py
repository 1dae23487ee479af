"""Sequences one after the other in flat tensors: their layout, and how to fit them into micro-batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

import torch
from torch import Tensor


def layout(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sequence_ids [T], position_ids [T] and cu_seqlens [B + 1] (int32) of sequences with these lengths [B]."""
    count = lengths.shape[0]
    sequence_ids = torch.arange(count, device=lengths.device).repeat_interleave(lengths)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    position_ids = torch.arange(int(starts[-1]), device=lengths.device) - starts[sequence_ids]
    return sequence_ids, position_ids, starts.to(torch.int32)


def pack_by_length(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: places of `lengths` in bins whose sums are at most `capacity`; a longer one is a ValueError.

    Deterministic: equal lengths keep their order, and of two bins with equal room the older one is filled.
    """
    sizes = list(lengths)
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted (tokens left, bin)
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[place] > capacity:
            raise ValueError(f"an item of {sizes[place]} tokens does not fit into {capacity}")
        best = bisect_left(room, (sizes[place], -1))
        if best == len(room):
            bins.append([])
            left, chosen = capacity, len(bins) - 1
        else:
            left, chosen = room.pop(best)
        bins[chosen].append(place)
        insort(room, (left - sizes[place], chosen))
    return bins
