"""What a filter of traces is: a name, and for each trace that reaches it either nothing or the reason for dropping it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from distill.trace import KEPT, Trace


class Table(BaseModel):
    """A frozen table of a config file that takes no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Drop(NamedTuple):
    """Why a trace goes: one of a few `reason`s, which are counted, and what is particular to this trace."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Judged(NamedTuple):
    """A trace, changed only by what the filter has learnt of it, and why it goes (None: it stays)."""

    trace: Trace
    drop: Drop | None


class Filter:
    """One rule; a subclass has `name` and either `fault` or `judge`, and says nothing about traces that it has not seen.

    A filter that `waits` is shown (`see`) every trace that the filters before it have kept, in order, and judges the
    first only after the last was seen; the traces then come in the same order.
    """

    name: str
    waits: bool = False

    def admit(self, trace: Trace) -> None:
        """UserError for a trace that this filter could never judge; called as it is read, before anything is spent."""

    def see(self, trace: Trace) -> None:
        """Look at a trace before any is judged; called only if the filter `waits`."""

    def judge(self, traces: Sequence[Trace]) -> Sequence[Judged]:
        """One judgement per trace, in order."""
        return [Judged(trace, self.fault(trace)) for trace in traces]

    def fault(self, trace: Trace) -> Drop | None:
        """Why this trace goes, or None; a filter that judges all at once has its own `judge` instead of this."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the filter holds; may be called twice."""


def reason_of(word: str) -> str | None:
    """The reason in a value of `Trace.filters`, None for "kept"."""
    return None if word == KEPT else word.partition(": ")[0]
