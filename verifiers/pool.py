"""`ScorePool`: verifiers in worker processes that can be killed, so that no sample can hang or crash the caller."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from verifiers.health import PoolHealth
from verifiers.jobs import Job, Kind, failure, split
from verifiers.registry import VerifierLookupError
from verifiers.slot import ScorePoolError, Shared, Slot
from verifiers.verdict import GoldAudit, TaskLike, Verdict

__all__ = ["PoolHealth", "ScorePool", "ScorePoolError", "VerifierSpec"]

MIN_MEMORY_LIMIT_MB = 64
PROGRESS_EVERY_S = 0.2
CHUNKS_AHEAD = 16  # pickled samples per worker that wait in memory
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class VerifierSpec:
    """One component of the score: `verifier` is a known name or `"package.module:attribute"`, `options` its options.

    `timeout_s` is the time this verifier needs on one sample, where it is not what the verifier itself asks for.
    """

    name: str
    verifier: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None


class ScorePool:
    """Scores completions with the weighted sum of `specs` in `num_workers` processes; use it as a context manager.

    `timeout_s` holds for each sample in wall time from its start in the worker; where the verifiers ask for more
    (`VerifierSpec.timeout_s`, or their own `timeout_s` or `timeout_for(task)`, added up over `specs`), that holds.
    `memory_limit_mb` bounds each worker's address space. What verifiers print goes to `log_path`, or nowhere. Workers
    are replaced after `recycle_after` samples, and after a sample with which their memory in use has grown by more than
    `max_growth_mb`. Raises `VerifierLookupError` if a verifier can't be resolved, ValueError for bad arguments,
    `ScorePoolError` if a worker does not start.
    """

    def __init__(
        self,
        specs: Sequence[VerifierSpec],
        num_workers: int = 2,
        timeout_s: float = 5.0,
        memory_limit_mb: int = 1024,
        *,
        log_path: Path | None = None,
        recycle_after: int = 20_000,
        max_growth_mb: int = 300,
        startup_timeout_s: float = 60.0,
    ) -> None:
        _check_specs(specs)
        _check_arguments(timeout_s, num_workers, memory_limit_mb, recycle_after, max_growth_mb)
        cwd = os.getcwd()
        self._shared = Shared(
            setup=_setup(specs, timeout_s, memory_limit_mb, max_growth_mb, cwd),
            cwd=cwd,
            log_path=None if log_path is None else log_path.absolute(),
            timeout_s=timeout_s,
            startup_timeout_s=startup_timeout_s,
            recycle_after=recycle_after,
            room=threading.Semaphore(CHUNKS_AHEAD * num_workers),
        )
        self._owner_pid = os.getpid()
        self._failure: Exception = ScorePoolError("this ScorePool is closed")
        self._jobs: set[Job] = set()
        slots = [Slot(index, self._shared, self._break) for index in range(num_workers)]
        self._threads = [
            threading.Thread(target=slot.run, name=f"score-pool-{index}", daemon=True)
            for index, slot in enumerate(slots)
        ]
        for thread in self._threads:
            thread.start()
        self._await_workers()

    def _await_workers(self) -> None:
        try:
            failures = [exc for _ in self._threads if (exc := self._shared.starts.get()) is not None]
        except BaseException:
            self.close()
            raise
        if failures:
            self.close()
            raise failures[0]

    @property
    def counters(self) -> dict[str, int]:
        """Since the start: samples `scored` (all verdicts), of them `error` and `timeout`; workers replaced after a
        kill or crash (`worker_restarts`) and in the ordinary way (`worker_recycles`)."""
        health = self.health
        return {
            "scored": sum(health.statuses.values()),
            "error": health.statuses["error"],
            "timeout": health.statuses["timeout"],
            "worker_restarts": sum(health.restarts.values()),
            "worker_recycles": sum(health.recycles.values()),
        }

    @property
    def health(self) -> PoolHealth:
        """What is queued and running now, and since the start: statuses, slowest calls, restarts by cause."""
        with self._shared.lock:
            return self._shared.tally.health(sum(job.missing for job in self._jobs))

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive now."""
        with self._shared.lock:
            return [worker.process.pid for worker in self._shared.workers.values()]

    def score(
        self, completions: Sequence[str], tasks: Sequence[TaskLike], progress: Progress | None = None
    ) -> list[Verdict]:
        """One verdict per completion, in order; blocks until all are there. May be called from any thread.

        `progress(done, total)` is called in the caller's thread, a few times a second while the count rises, and at the
        end. Raises ValueError if the lengths differ, TypeError for a completion that is not text, `ScorePoolError` if
        the pool is closed, closes meanwhile, or can't replace a worker.
        """
        if len(completions) != len(tasks):
            raise ValueError(f"{len(completions)} completions but {len(tasks)} tasks; each needs one")
        for position, completion in enumerate(completions):
            if not isinstance(completion, str):
                raise TypeError(f"completion {position} is {type(completion).__name__}, not str")
        return self._run("score", completions, tasks, progress)

    def prepare(self, tasks: Sequence[TaskLike], progress: Progress | None = None) -> list[GoldAudit | None]:
        """One audit of the gold answer per task, in order: the worst that the pool's verifiers say, None where none do.

        An audit that raises, crashes or overstays is `unparsable`. Raises `ScorePoolError` as `score` does.
        """
        return self._run("audit", [""] * len(tasks), tasks, progress)

    def _run(self, kind: Kind, completions: Sequence[str], tasks: Sequence[TaskLike], progress: Progress | None) -> Any:
        if os.getpid() != self._owner_pid:
            raise ScorePoolError("this ScorePool belongs to the process that made it; make another one after a fork")
        total = len(tasks)
        job = Job(kind, completions, tasks, results=[None] * total, missing=total)
        if not tasks:
            return []
        shared = self._shared
        with shared.lock:
            if shared.closed:
                raise self._failure
            self._jobs.add(job)

        report = _Reporter(job, total, progress)
        try:
            self._feed(job, report)
            while not job.done.wait(None if progress is None else PROGRESS_EVERY_S):
                report()
            report()
        finally:
            job.abandoned = True
            with shared.lock:
                self._jobs.discard(job)
        if job.error is not None:
            raise job.error
        return job.results

    def _feed(self, job: Job, report: Callable[[], None]) -> None:
        """Queue the job's chunks as there is room for them; returns early if the job has failed."""
        shared = self._shared

        def refuse(position: int, reason: str) -> None:
            shared.finish(job, position, failure(job.kind, "error", reason))

        for chunk in split(job, len(self._threads), refuse):
            while not shared.room.acquire(timeout=PROGRESS_EVERY_S):
                if job.error is not None:
                    return
                report()
            shared.chunks.put(chunk)

    def close(self) -> None:
        """Kill the workers and end the threads; a `score` under way raises `ScorePoolError`. Safe to call twice."""
        with self._shared.lock:
            self._shared.closed = True
        for _ in self._threads:
            self._shared.chunks.put(None)
        if os.getpid() == self._owner_pid:
            for thread in self._threads:
                thread.join()
        self._fail_jobs(ScorePoolError("the ScorePool was closed while it was scoring"))

    def __enter__(self) -> ScorePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _break(self, exc: Exception) -> None:
        """A worker can't be replaced: nothing more will be scored, and every caller is told why."""
        known = isinstance(exc, VerifierLookupError | ScorePoolError)
        error = exc if known else ScorePoolError(f"the ScorePool failed: {exc!r}")
        with self._shared.lock:
            self._shared.closed = True
            self._failure = error
        self._fail_jobs(error)

    def _fail_jobs(self, error: Exception) -> None:
        with self._shared.lock:
            jobs, self._jobs = self._jobs, set()
        for job in jobs:
            if job.missing:
                job.error = error
            job.done.set()


class _Reporter:
    """Tells a caller's `progress` how many samples of a job are done, whenever that has changed."""

    def __init__(self, job: Job, total: int, progress: Progress | None) -> None:
        self._job, self._total, self._progress, self._told = job, total, progress, 0

    def __call__(self) -> None:
        done = self._total - self._job.missing
        if self._progress is not None and done > self._told and self._job.error is None:
            self._told = done
            self._progress(done, self._total)


def _setup(
    specs: Sequence[VerifierSpec], timeout_s: float, memory_limit_mb: int, max_growth_mb: int, cwd: str
) -> bytes:
    """What a worker is told at its start; raises ValueError for options that are not JSON."""
    for spec in specs:
        try:
            json.dumps(spec.options)
        except (TypeError, ValueError) as exc:
            raise ValueError(f"the options of verifier {spec.name!r} must be plain JSON values: {exc}") from exc
    return json.dumps(
        {
            "specs": [(s.name, s.verifier, dict(s.options), s.weight, s.timeout_s) for s in specs],
            "sys_path": _plugin_path(cwd),
            "timeout_s": float(timeout_s),
            "memory_limit_mb": memory_limit_mb,
            "max_growth_mb": max_growth_mb,
        }
    ).encode()


def _plugin_path(cwd: str) -> list[str]:
    """The caller's import path made absolute, then the current directory."""
    path = [entry if os.path.isabs(entry) else os.path.join(cwd, entry).rstrip("/") for entry in sys.path]
    return list(dict.fromkeys([*path, cwd]))


def _check_specs(specs: Sequence[VerifierSpec]) -> None:
    names = [spec.name for spec in specs]
    if not names:
        raise ValueError("a ScorePool needs at least one VerifierSpec")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two verifiers of the pool are named {name!r}; names must differ")
    for spec in specs:
        if not math.isfinite(spec.weight):
            raise ValueError(f"the weight of verifier {spec.name!r} is {spec.weight}; it must be a finite number")
        if spec.timeout_s is not None:
            _check_seconds(f"the timeout_s of verifier {spec.name!r}", spec.timeout_s)


def _check_seconds(label: str, seconds: float) -> None:
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"{label} is {seconds}; it must be a positive number of seconds")


def _check_arguments(
    timeout_s: float, num_workers: int, memory_limit_mb: int, recycle_after: int, max_growth_mb: int
) -> None:
    _check_seconds("timeout_s", timeout_s)
    for label, value, least in (
        ("num_workers", num_workers, 1),
        ("memory_limit_mb", memory_limit_mb, MIN_MEMORY_LIMIT_MB),
        ("recycle_after", recycle_after, 1),
        ("max_growth_mb", max_growth_mb, 1),
    ):
        if value < least:
            raise ValueError(f"{label} is {value}; it must be at least {least}")
