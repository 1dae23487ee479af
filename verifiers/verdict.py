"""The records that verifiers return, and the protocols around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

Status = Literal["correct", "wrong", "unparsable", "timeout", "error"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a verifier says of one completion: a wrong answer and a verifier that failed are different statuses."""

    score: float
    status: Status
    reason: str
    extracted: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain JSON-ready values."""
        return asdict(self)


GoldStatus = Literal["ok", "unparsable", "ambiguous", "embedded_number", "missing"]


@dataclass(frozen=True, kw_only=True)
class GoldAudit:
    """What a verifier's `prepare` says of one gold answer, before any completion is judged by it.

    `ambiguous`: readable in more than one way (the reason says which). `embedded_number`: not readable as a whole, and
    a careless grader would accept a bare number out of it. `parsed` is the reading, as text, where there is one.
    """

    status: GoldStatus
    reason: str
    parsed: str | None = None


class TaskLike(Protocol):
    """What a verifier may read of a task."""

    @property
    def prompt(self) -> Any: ...

    @property
    def answer(self) -> Any: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


class Verifier(Protocol):
    """Any callable that judges a completion against its task."""

    def __call__(self, completion: str, task: TaskLike, /) -> Verdict: ...
