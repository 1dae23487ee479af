"""How much of the learner's time goes to padding and to ranks that wait for others, on lengths with a long tail.

`python -m scripts.bench_packing` prints one Markdown table. Time is counted in token slots: every micro-batch of a round
lasts as long as the longest one of any rank. Attention's own cost, quadratic in a sequence, is not counted. A sequence
is one rank's: where the longest exceeds a rank's share of a minibatch (--median 2000, 64 ranks), no plan is without waste.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from policy.packing import balance_over_ranks, wasted_shares

MAX_LENGTH = 32_768
SPREAD = 1.0  # of the lognormal
NUM_SAMPLES = 8_192


@dataclass
class Cost:
    """Token slots that the ranks hold for a step, and the tokens among them."""

    tokens: int = 0
    padded: int = 0
    slots: int = 0
    num_rounds: int = 0
    plan_s: float = 0.0

    def add(self, lengths: Sequence[int], plan: Sequence[Sequence[Sequence[int]]], rows: bool) -> None:
        """Count a plan; `rows`: each micro-batch is a rectangle, all its sequences padded to its longest."""
        for parts in zip(*plan, strict=True):
            own = [[lengths[place] for place in part] for part in parts]
            sizes = [len(part) * max(part, default=0) if rows else sum(part) for part in own]
            self.tokens += sum(map(sum, own))
            self.padded += sum(sizes)
            self.slots += len(plan) * max(sizes)
            self.num_rounds += 1

    def row(self) -> str:
        """Padding, imbalance and both together, as shares of all slots."""
        padding, waiting = (self.padded - self.tokens) / self.slots, 1 - self.padded / self.slots
        shares = " | ".join(f"{100 * share:.2f} %" for share in (padding, waiting, padding + waiting))
        return f"{shares} | {self.num_rounds} | {self.plan_s:.2f}"


def lengths_of(num_samples: int, median: float, seed: int) -> list[int]:
    """Lognormal, cut off at MAX_LENGTH, where the cut-off ones pile up."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), SPREAD, num_samples)
    return np.clip(drawn, 16, MAX_LENGTH).astype(int).tolist()


def in_order(lengths: Sequence[int], num_ranks: int, max_tokens: int, rows: bool) -> list[list[list[int]]]:
    """The naive plan: each rank its equal number of samples, as they come, a new micro-batch when the next doesn't fit."""
    bounds = [len(lengths) * rank // num_ranks for rank in range(num_ranks + 1)]
    plan = [_filled_in_order(lengths, range(first, last), max_tokens, rows) for first, last in pairwise(bounds)]
    num_rounds = max(map(len, plan))
    return [own + [[]] * (num_rounds - len(own)) for own in plan]


def _filled_in_order(lengths: Sequence[int], places: range, max_tokens: int, rows: bool) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for place in places:
        own = [lengths[i] for i in (*parts[-1], place)]
        if parts[-1] and (len(own) * max(own) if rows else sum(own)) > max_tokens:
            parts.append([])
        parts[-1].append(place)
    return parts


def measure(lengths: Sequence[int], num_minibatches: int, num_ranks: int, max_tokens: int) -> dict[str, Cost]:
    """The cost of a step by each way to cut it."""
    costs = {"rows, in order": Cost(), "packed, in order": Cost(), "groupzero": Cost()}
    size = len(lengths) // num_minibatches
    for first in range(0, size * num_minibatches, size):
        own = lengths[first : first + size]
        for name, cost in costs.items():
            start = time.perf_counter()
            if name == "groupzero":
                plan = balance_over_ranks(own, num_ranks, max_tokens)
                cost.plan_s += time.perf_counter() - start
                cost.add(own, plan, rows=False)
                packing, imbalance = wasted_shares(own, plan, max_tokens)
                assert 0 <= packing < 1, packing
                assert 0 <= imbalance < 1, imbalance
            else:
                rows = name.startswith("rows")
                plan = in_order(own, num_ranks, max_tokens, rows)
                cost.plan_s += time.perf_counter() - start
                cost.add(own, plan, rows)
    return costs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--minibatches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[32_768, 65_536])
    parser.add_argument("--median", type=int, default=4_000, help="median length, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lengths = lengths_of(NUM_SAMPLES, options.median, options.seed)
    print(
        f"{NUM_SAMPLES} samples, lognormal of median {options.median} and spread {SPREAD:g}, at most {MAX_LENGTH} tokens: "
        f"mean {np.mean(lengths):.0f}, {100 * np.mean(np.array(lengths) == MAX_LENGTH):.1f} % at the limit\n"
    )
    print("| ranks | minibatches | max tokens | way | padding | waiting | together | rounds | plan, s |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|")
    for num_ranks in options.ranks:
        for num_minibatches in options.minibatches:
            for max_tokens in options.max_tokens:
                for name, cost in measure(lengths, num_minibatches, num_ranks, max_tokens).items():
                    print(f"| {num_ranks} | {num_minibatches} | {max_tokens} | {name} | {cost.row()} |")


if __name__ == "__main__":
    main()
