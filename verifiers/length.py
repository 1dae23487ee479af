"""`length`: a punishment for completions that are too long, by a plain limit or softly before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from verifiers.calling import broken
from verifiers.registry import register
from verifiers.verdict import TaskLike, Verdict

Unit = Literal["characters", "tokens"]


@register("length")
@dataclass(frozen=True)
class Length:
    """0 for a length from `shortest` to `longest`, -1 outside; with `soft` it falls linearly over the last `soft` units.

    With `soft` this is DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): L_max is `longest`, L_cache is
    `soft`. Lengths are of the whole completion, in characters; with `unit = "tokens"` in tokens, which only
    `task.metadata["num_tokens"]` can tell (without it the verdict is `error`). `correct` means not punished.
    """

    longest: int
    soft: int = 0
    shortest: int = 0
    unit: Unit = "characters"

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"longest is {self.longest}; it must be at least 1")
        if not 0 <= self.soft <= self.longest:
            raise ValueError(f"soft is {self.soft}; it must lie between 0 and longest ({self.longest})")
        if not 0 <= self.shortest <= self.longest - self.soft:
            raise ValueError(f"shortest is {self.shortest}; it must lie between 0 and longest - soft")
        if self.unit not in ("characters", "tokens"):
            raise ValueError(f"unit is {self.unit!r}; it must be 'characters' or 'tokens'")

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        length = len(completion)
        if self.unit == "tokens":
            length = task.metadata.get("num_tokens")
            if not isinstance(length, int) or isinstance(length, bool):
                return broken("unit is 'tokens', but the task's metadata has no whole number num_tokens")
        score = self._score(length)
        reason = f"{length} {self.unit}"
        if score == 0:
            return Verdict(score=0.0, status="correct", reason=f"{reason}, within the limits")
        limit = f"fewer than {self.shortest}" if length < self.shortest else f"over {self.longest - self.soft}"
        return Verdict(score=score, status="wrong", reason=f"{reason}, {limit}")

    def _score(self, length: int) -> float:
        if length < self.shortest or length > self.longest:
            return -1.0
        free = self.longest - self.soft
        return 0.0 if length <= free else (free - length) / self.soft
