"""The record every verifier returns, and the two protocols around it."""

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
