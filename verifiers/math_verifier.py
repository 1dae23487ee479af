r"""`math`: the stated answer is the gold answer, by value and by kind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from verifiers.extract import stated_answer
from verifiers.mathematics import MathOptions, equivalent
from verifiers.mathematics.audit import audit_gold, gold_text
from verifiers.registry import register
from verifiers.verdict import GoldAudit, TaskLike, Verdict

_SHOWN_CHARS = 200


@register("math")
@dataclass(frozen=True)
class MathVerifier:
    """1 if the stated answer is mathematically the gold answer, else 0."""

    last_number: bool = False  # without any stated answer, take the last number of the text
    boxes: Literal["last", "all", "single"] = "last"  # which of several boxes is the answer
    unordered_lists: bool = True  # a bare list may come in any order; tuples never
    missing_units: Literal["allow", "refuse"] = "allow"  # a unit on one side only
    percent: Literal["loose", "value"] = "loose"  # "50" for "50%"; "value" takes % as a factor 1/100 alone
    rounded_digits: int = 4  # significant digits from which a decimal stands for a value that has none; 0: never
    gold_digits: int = 2  # significant digits from which a decimal gold stands for what rounds to it; 0: never
    decimal_comma: bool = True  # "2,74" for a gold 2.74

    def __post_init__(self) -> None:
        if self.boxes not in ("last", "all", "single"):
            raise ValueError(f'boxes is {self.boxes!r}; it must be "last", "all" or "single"')
        if not isinstance(self.last_number, bool):
            raise ValueError(f"last_number is {self.last_number!r}; it must be true or false")
        _ = self.options

    @cached_property
    def options(self) -> MathOptions:
        """The options of the comparison; raises ValueError naming a bad one."""
        return MathOptions(
            unordered_lists=self.unordered_lists,
            missing_units=self.missing_units,
            percent=self.percent,
            rounded_digits=self.rounded_digits,
            gold_digits=self.gold_digits,
            decimal_comma=self.decimal_comma,
        )

    def prepare(self, task: TaskLike) -> GoldAudit:
        """What is to be known of the gold answer before any completion is judged by it."""
        return audit_gold(task.answer)

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        """`wrong` is another answer, `unparsable` none that can be read, `error` a gold that can't be read."""
        gold = gold_text(task.answer)
        if gold is None:
            return Verdict(score=0.0, status="error", reason="the gold answer is missing")
        stated = stated_answer(completion, last_number=self.last_number, boxes=self.boxes)
        if stated.text is None:
            return Verdict(score=0.0, status="unparsable", reason=stated.reason)
        outcome = equivalent(gold, stated.text, self.options)
        shown = stated.text if len(stated.text) <= _SHOWN_CHARS else stated.text[: _SHOWN_CHARS - 1] + "…"
        score = 1.0 if outcome.status == "correct" else 0.0
        return Verdict(
            score=score, status=outcome.status, reason=f"{outcome.reason} ({stated.source})", extracted=shown
        )
