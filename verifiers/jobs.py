"""What a `ScorePool` hands to its workers: a call's samples, cut into chunks, and the place for their results."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from verifiers.verdict import GoldAudit, Status, TaskLike, Verdict

MAX_CHUNK_SAMPLES = 64
MAX_CHUNK_BYTES = 2**20
Kind = Literal["score", "audit"]


@dataclass(eq=False)
class Job:
    """One call of the pool: results by position, and the event that says they are all there."""

    kind: Kind
    completions: Sequence[str]
    tasks: Sequence[TaskLike]
    results: list[Any]
    missing: int
    error: Exception | None = None
    abandoned: bool = False
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Chunk:
    """Some samples of a job, each pickled by itself, with their positions in it."""

    job: Job
    positions: list[int]
    payloads: list[bytes]


def split(job: Job, num_workers: int, refuse: Callable[[int, str], None]) -> Iterator[Chunk]:
    """The job in chunks that shrink towards its end, so that all workers finish together.

    `refuse(position, reason)` is called for a sample that can't be pickled.
    """
    positions: list[int] = []
    payloads: list[bytes] = []
    size = 0
    most = _chunk_samples(len(job.tasks), num_workers)
    for position, (completion, task) in enumerate(zip(job.completions, job.tasks, strict=True)):
        try:
            payload = _pickled(completion, task)
        except Exception as exc:  # noqa: BLE001  (pickling runs the caller's own code)
            refuse(position, f"the sample can't be sent to a worker: {type(exc).__name__}: {exc}")
            continue
        if positions and (len(positions) >= most or size + len(payload) > MAX_CHUNK_BYTES):
            yield Chunk(job, positions, payloads)
            positions, payloads, size = [], [], 0
            most = _chunk_samples(len(job.tasks) - position, num_workers)
        positions.append(position)
        payloads.append(payload)
        size += len(payload)
    if positions:
        yield Chunk(job, positions, payloads)


def _chunk_samples(num_left: int, num_workers: int) -> int:
    return max(1, min(MAX_CHUNK_SAMPLES, num_left // (4 * num_workers)))


def _pickled(completion: str, task: TaskLike) -> bytes:
    verifier = getattr(task, "verifier", "")
    return pickle.dumps((completion, task.answer, task.prompt, dict(task.metadata), verifier), protocol=5)


def failure(kind: Kind, status: Status, reason: str, elapsed_s: float = 0.0) -> Verdict | GoldAudit:
    """The result of a sample that no worker could judge."""
    if kind == "score":
        return Verdict(score=0.0, status=status, reason=reason, elapsed_s=elapsed_s)
    return GoldAudit(status="unparsable", reason=f"the verifier failed on it: {reason}")
