"""`verified_correct`: a verifier says that the answer is right; `difficulty`: how often the question is answered right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, model_validator

from distill.filters.base import Drop, Filter, Judged, Table
from distill.trace import Trace
from rollout.errors import UserError
from rollout.records import Task
from rollout.rows import read_jsonl, read_parquet
from verifiers.pool import ScorePool, VerifierSpec
from verifiers.registry import VerifierLookupError, resolve
from verifiers.verdict import TaskLike, Verdict

_REASONS = {
    "wrong": "wrong answer",
    "unparsable": "no readable answer",
    "timeout": "the verifier ran out of time",
    "error": "the verifier failed",
}
NO_GOLD = "no known answer"


class Scorer(Protocol):
    """What judges completions; a `ScorePool` is one."""

    def score(self, completions: Sequence[str], tasks: Sequence[TaskLike]) -> list[Verdict]:
        """One verdict per completion, in order."""
        ...


class VerifiedCorrectConfig(Table):
    """How answers are verified, in processes that can be killed."""

    verifier: str = Field(default="math", description="verifier of traces that name none of their own")
    options: dict[str, Any] = Field(default_factory=dict, description="options of that verifier")
    verifiers: tuple[str, ...] = Field(
        default=(),
        description="others that traces may name; empty, and without options: every built-in one that needs no options",
    )
    needs_answer: bool = Field(default=True, description="drop traces without a known answer instead of asking")
    num_workers: int = Field(default=2, ge=1, description="verifier processes")
    timeout_s: float = Field(default=5.0, gt=0, description="longest time for one trace, in seconds")
    memory_limit_mb: int = Field(default=1024, ge=64, description="memory of one verifier process, in MiB")


def _options(config: VerifiedCorrectConfig) -> dict[str, Any]:
    """The options of the verifier `by_task`."""
    named: dict[str, Any] = {}
    if config.options or config.verifiers or ":" in config.verifier:  # otherwise a trace may name any that is known
        named = {name: name for name in config.verifiers}
        named[config.verifier] = {"verifier": config.verifier, "options": config.options}
    return {"verifiers": named, "default": config.verifier}


def check_verifier(config: VerifiedCorrectConfig) -> None:
    """UserError if there is no such verifier, or it does not take these options."""
    with _named_failure():
        resolve("by_task", _options(config))


@contextmanager
def _named_failure() -> Iterator[None]:
    try:
        yield
    except VerifierLookupError as error:
        raise UserError(f"select.verified_correct: {error}") from error


def open_pool(config: VerifiedCorrectConfig) -> ScorePool:
    """The pool of verifier processes; UserError if there is no such verifier."""
    spec = VerifierSpec("answer", "by_task", options=_options(config))
    with _named_failure():
        return ScorePool([spec], config.num_workers, config.timeout_s, config.memory_limit_mb)


class PassRates:
    """How often each question's traces were right, of those whose verdict is one; a verifier that failed says nothing."""

    def __init__(self) -> None:
        self._correct: Counter[str] = Counter()
        self._judged: Counter[str] = Counter()

    def add(self, question_id: str, status: str) -> None:
        """Count one verdict."""
        if status not in ("error", "timeout"):
            self._judged[question_id] += 1
            self._correct[question_id] += status == "correct"

    def share(self, question_id: str) -> float | None:
        """Right ones of those judged, None for a question without a verdict."""
        judged = self._judged.get(question_id)
        return self._correct[question_id] / judged if judged else None

    def shares(self) -> dict[str, float]:
        """The share of every question that has a verdict."""
        return {question_id: self._correct[question_id] / judged for question_id, judged in self._judged.items()}


class VerifiedCorrect(Filter):
    """Keeps a trace whose verdict is `correct`, and gives it that verdict.

    A verdict that a trace already has is taken as it is, unless it is that of a verifier that failed.
    """

    name = "verified_correct"

    def __init__(self, config: VerifiedCorrectConfig, rates: PassRates, pool: Scorer | None = None) -> None:
        self._config, self._rates = config, rates
        self._own: ScorePool | None = open_pool(config) if pool is None else None
        self._pool: Scorer | None = pool or self._own

    def judge(self, traces: Sequence[Trace]) -> Sequence[Judged]:
        """Verdicts of the traces that have none, then what they say."""
        open_indices = [index for index, trace in enumerate(traces) if self._is_open(trace)]
        assert self._pool is not None
        verdicts = self._pool.score(
            [traces[index].completion for index in open_indices], [_task(traces[index]) for index in open_indices]
        )
        judged = list(traces)
        for index, verdict in zip(open_indices, verdicts, strict=True):
            judged[index] = replace(traces[index], verdict=verdict)
        return [self._judged(trace) for trace in judged]

    def _is_open(self, trace: Trace) -> bool:
        if trace.verdict is not None and trace.verdict.status not in ("error", "timeout"):
            return False
        return trace.gold is not None or not self._config.needs_answer

    def _judged(self, trace: Trace) -> Judged:
        if trace.verdict is None:
            return Judged(trace, Drop(NO_GOLD))
        self._rates.add(trace.question_id, trace.verdict.status)
        if trace.verdict.status == "correct":
            return Judged(trace, None)
        return Judged(trace, Drop(_REASONS[trace.verdict.status], trace.verdict.reason[:200]))

    def close(self) -> None:
        """End the verifier processes that this filter has started."""
        if self._own is not None:
            self._own.close()


def _task(trace: Trace) -> Task:
    return Task(
        task_id=trace.question_id,
        prompt=trace.question,
        answer=trace.gold,
        verifier=trace.verifier or "",
        metadata=trace.metadata,
    )


class DifficultyConfig(Table):
    """Bounds on the share of right answers to a question."""

    min_pass_rate: float = Field(default=0.0, ge=0, le=1, description="a question answered right less often is dropped")
    max_pass_rate: float = Field(default=1.0, ge=0, le=1, description="a question answered right more often is dropped")
    rates: Path | None = Field(
        default=None,
        description="pass rates of someone else, such as the student: JSONL or Parquet with question_id and pass_rate, or "
        "a run's samples.parquet; by default the teacher's own, by verified_correct",
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> DifficultyConfig:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(f"min_pass_rate {self.min_pass_rate} is above max_pass_rate {self.max_pass_rate}")
        return self


class Difficulty(Filter):
    """Keeps the traces of questions whose pass rate is within the bounds, both included.

    The teacher's own rates count every trace that `verified_correct` judged, so this filter waits for all of them.
    """

    name = "difficulty"

    def __init__(self, config: DifficultyConfig, rates: PassRates) -> None:
        self._config = config
        self.waits = config.rates is None
        self._rate: Callable[[str], float | None] = (
            rates.share if config.rates is None else read_rates(config.rates).get
        )

    def fault(self, trace: Trace) -> Drop | None:
        """Too hard, too easy, or not known."""
        rate = self._rate(trace.question_id)
        if rate is None:
            return Drop("pass rate unknown")
        if rate < self._config.min_pass_rate:
            return Drop("too hard", f"pass rate {rate:.3f}")
        return Drop("too easy", f"pass rate {rate:.3f}") if rate > self._config.max_pass_rate else None


def read_rates(path: Path) -> dict[str, float]:
    """Pass rate by question, from rows of question_id and pass_rate or of task_id and status; UserError names the row."""
    rows = read_jsonl(path) if path.suffix == ".jsonl" else read_parquet(path)
    recorded: dict[str, float] = {}
    samples = PassRates()
    for index, row in enumerate(rows):
        if "task_id" in row and "status" in row:
            samples.add(str(row["task_id"]), row["status"] or "error")  # null: not scored
        elif "question_id" in row:
            recorded[str(row["question_id"])] = _pass_rate(row, rows.place(index))
        else:
            columns = "question_id and pass_rate, or task_id and status"
            raise UserError(f"{rows.place(index)}: pass rates need the columns {columns}")
    return recorded | samples.shares()


def _pass_rate(row: Mapping[str, Any], place: str) -> float:
    rate = row.get("pass_rate")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
        raise UserError(f"{place}: pass_rate is {rate!r}; it must be a number from 0 to 1")
    return float(rate)
