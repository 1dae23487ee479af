"""What a `ScorePool` counts: verdicts by status, the slowest calls, and why workers were replaced."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verifiers.calling import STATUSES
from verifiers.verdict import Status, Verdict

NUM_SLOWEST = 10
SHOWN_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class SlowCall:
    """One of the slowest calls so far; `completion` is its first `SHOWN_CHARS` characters."""

    elapsed_s: float
    status: Status
    reason: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class PoolHealth:
    """The state of a pool: samples `queued` and `running` now, and since its start everything else.

    `restarts` are workers replaced after a kill or crash, `recycles` those replaced in the ordinary way, by cause.
    """

    queued: int
    running: int
    statuses: Mapping[Status, int]
    slowest: tuple[SlowCall, ...]
    restarts: Mapping[str, int]
    recycles: Mapping[str, int]


@dataclass
class Tally:
    """The counters behind `PoolHealth`; its owner holds a lock around every call."""

    running: int = 0
    statuses: Counter[Status] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    recycles: Counter[str] = field(default_factory=Counter)
    _slowest: list[tuple[float, int, SlowCall]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)

    def add(self, verdict: Verdict, completion: str) -> None:
        """Count one verdict."""
        self.statuses[verdict.status] += 1
        if len(self._slowest) < NUM_SLOWEST or verdict.elapsed_s > self._slowest[0][0]:
            call = SlowCall(
                elapsed_s=verdict.elapsed_s,
                status=verdict.status,
                reason=verdict.reason[:SHOWN_CHARS],
                completion=completion[:SHOWN_CHARS],
            )
            heapq.heappush(self._slowest, (verdict.elapsed_s, next(self._order), call))
            if len(self._slowest) > NUM_SLOWEST:
                heapq.heappop(self._slowest)

    def health(self, num_missing: int) -> PoolHealth:
        """A copy of everything, the slowest call first; `num_missing` samples have no result yet."""
        return PoolHealth(
            queued=max(0, num_missing - self.running),
            running=self.running,
            statuses={status: self.statuses[status] for status in STATUSES},
            slowest=tuple(call for _, _, call in sorted(self._slowest, reverse=True)),
            restarts=dict(self.restarts),
            recycles=dict(self.recycles),
        )
