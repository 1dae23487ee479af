"""Traces for the tests of selection, and a scorer that needs no processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.trace import R1_COMPLETION, Trace, render_completion, split_reasoning
from verifiers.verdict import TaskLike, Verdict

WORDS = [
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "phi"),
]


def prose(start: int, count: int) -> str:
    """`count` words from a text of 8000 different ones: equal only where the places are equal."""
    return " ".join(
        f"{WORDS[i % 20]}{WORDS[(i // 20) % 20]}{WORDS[(i // 400) % 20]}" for i in range(start, start + count)
    )


def trace(question_id: str = "set/0", *, text: str | None = None, **changes: Any) -> Trace:
    """A right and well-formed trace of 40 words; `text` is a teacher's whole text instead."""
    values: dict[str, Any] = {
        "question_id": question_id,
        "question": f"What is asked in {question_id}?",
        "gold": "4",
        "teacher": "teacher",
        "source": "source",
        "finish_reason": "stop",
        "num_tokens": 50,
        "sampling": {"sample_index": 0},
    }
    if text is not None:
        reasoning, answer, fault = split_reasoning(text)
        values |= {"reasoning": reasoning, "answer_text": answer, "completion": text, "fault": fault}
    else:
        reasoning = changes.pop("reasoning", prose(0, 40))
        answer = changes.pop("answer_text", r"The answer is \boxed{4}.")
        values |= {"reasoning": reasoning, "answer_text": answer}
        values["completion"] = render_completion(R1_COMPLETION, reasoning, answer)
    return Trace(**(values | changes))


class Scorer:
    """Says of each completion what `statuses` says of the box in it; keeps what it was asked."""

    def __init__(self, **statuses: str) -> None:
        self.statuses = statuses
        self.asked: list[str] = []

    def score(self, completions: Sequence[str], tasks: Sequence[TaskLike]) -> list[Verdict]:
        self.asked += completions
        return [self._one(completion, task) for completion, task in zip(completions, tasks, strict=True)]

    def _one(self, completion: str, task: TaskLike) -> Verdict:
        default = "correct" if f"boxed{{{task.answer}}}" in completion else "wrong"
        status: Any = next((status for word, status in self.statuses.items() if word in completion), default)
        return Verdict(score=float(status == "correct"), status=status, reason=f"it is {status}")
