"""Sequences one after the other in flat tensors: their layout, and how to fit them into micro-batches, also of ranks."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

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


def balance_over_ranks(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """For every rank its micro-batches, each the places of its sequences in `lengths`, at most `max_tokens` together.

    Ranks wait for each other at every micro-batch, so all have the same number of them, some maybe empty, and those of
    one round are about equally long; the longest rounds come first. Deterministic: every rank computes the same plan.
    One rank's plan is `pack_by_length`. A sequence longer than `max_tokens` is a ValueError.
    """
    sizes = list(lengths)
    packed = pack_by_length(sizes, max_tokens)
    if num_ranks == 1:
        return [packed]
    num_rounds = max(1, -(-sum(sizes) // (num_ranks * max_tokens)))
    while True:
        rounds = _level(sizes, num_ranks, num_rounds, max_tokens)
        if rounds is None and len(packed) <= num_ranks * num_rounds:
            rounds = _rounds_of(packed, sizes, num_ranks, num_rounds)
        if rounds is not None:
            return [[bins[rank] for bins in rounds] for rank in range(num_ranks)]
        num_rounds += 1


def wasted_shares(
    lengths: Sequence[int], plan: Sequence[Sequence[Sequence[int]]], max_tokens: int
) -> tuple[float, float]:
    """Shares of a plan's time that better packing, and better balance, would save: each from 0 to below 1.

    Packing: rounds of micro-batches beyond the fewest that could hold all tokens. Imbalance: time in which ranks wait
    for the longest micro-batch of their round, time being counted in tokens.
    """
    rounds = [[sum(lengths[place] for place in part) for part in parts] for parts in zip(*plan, strict=True)]
    tokens, num_ranks = sum(map(sum, rounds)), len(plan)
    slots = num_ranks * sum(map(max, rounds))
    fewest = -(-tokens // (num_ranks * max_tokens))
    return (1 - max(fewest, 1) / len(rounds) if rounds else 0.0), (1 - tokens / slots if slots else 0.0)


def _level(sizes: list[int], num_ranks: int, num_rounds: int, max_tokens: int) -> list[list[list[int]]] | None:
    """Rounds of one micro-batch per rank, longest sequences first, each where it leaves most room below its round's
    level; None where a sequence then fits nowhere."""
    order = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    levels = _levels([sizes[place] for place in order], num_ranks, num_rounds)
    bins: list[list[int]] = [[] for _ in range(num_ranks * num_rounds)]
    loads = [0] * len(bins)
    room = [
        (-levels[index // num_ranks], index) for index in range(len(bins))
    ]  # a heap: most room below the level first
    heapq.heapify(room)
    for place in order:
        put_back = []
        while room and loads[room[0][1]] + sizes[place] > max_tokens:
            put_back.append(heapq.heappop(room))
        if not room:
            return None
        left, chosen = heapq.heappop(room)
        bins[chosen].append(place)
        loads[chosen] += sizes[place]
        for entry in (*put_back, (left + sizes[place], chosen)):
            heapq.heappush(room, entry)
    return _rounds_of(bins, sizes, num_ranks, num_rounds)


def _levels(sizes: list[int], num_ranks: int, num_rounds: int) -> list[float]:
    """How long the micro-batches of each round should be: no shorter than the longest sequences that must go there
    (`sizes` falls), else all the same, and together as long as all sequences."""
    least = [float(sizes[first]) if (first := index * num_ranks) < len(sizes) else 0.0 for index in range(num_rounds)]
    total = sum(sizes) / num_ranks
    for fixed in range(num_rounds):
        rest = max(0.0, total - sum(least[:fixed])) / (num_rounds - fixed)
        if least[fixed] <= rest:
            return least[:fixed] + [rest] * (num_rounds - fixed)
    return least


def _rounds_of(bins: list[list[int]], sizes: list[int], num_ranks: int, num_rounds: int) -> list[list[list[int]]]:
    """Micro-batches of about the same length side by side, `num_ranks` to a round."""
    bins = [*bins, *([] for _ in range(num_ranks * num_rounds - len(bins)))]
    by_load = sorted(bins, key=lambda own: -sum(sizes[place] for place in own))
    return [by_load[first : first + num_ranks] for first in range(0, len(by_load), num_ranks)]
