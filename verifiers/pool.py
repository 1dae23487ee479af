"""`ScorePool`: verifiers in worker processes that can be killed, so that no sample can hang or crash the caller.

One thread per worker owns its process: it starts it, hands it chunks of samples, reads one verdict per sample, kills it
when a sample overstays, and replaces it. The samples behind a bad one go to the replacement.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from verifiers.process import HANDOVER_S, WorkerProcess, exit_cause
from verifiers.registry import VerifierLookupError
from verifiers.verdict import Status, TaskLike, Verdict

MAX_CHUNK_SAMPLES = 32
MAX_CHUNK_BYTES = 2**20
CLOSE_CHECK_S = 0.1
MIN_MEMORY_LIMIT_MB = 64


class ScorePoolError(RuntimeError):
    """The pool itself can't go on: closed, or a worker that does not start."""


class _ClosedError(Exception):
    """The pool was closed while its thread was waiting for a worker."""


@dataclass(frozen=True)
class VerifierSpec:
    """One component of the score: `verifier` is a registered name or `"package.module:function"`."""

    name: str
    verifier: str
    weight: float = 1.0


@dataclass(eq=False)
class _Job:
    """One call of `score`: verdicts by position, and the event that says they are all there."""

    verdicts: list[Verdict | None]
    missing: int
    error: Exception | None = None
    abandoned: bool = False
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _Chunk:
    """Some samples of a job, each pickled by itself, with their positions in it."""

    job: _Job
    positions: list[int]
    payloads: list[bytes]


def _plugin_path(cwd: str) -> list[str]:
    """The caller's import path made absolute, then the current directory."""
    path = [entry if os.path.isabs(entry) else os.path.join(cwd, entry).rstrip("/") for entry in sys.path]
    return list(dict.fromkeys([*path, cwd]))


class ScorePool:
    """Scores completions with the weighted sum of `specs` in `num_workers` processes; use it as a context manager.

    `timeout_s` holds for each sample from its start in the worker, `memory_limit_mb` for each worker's address space.
    What verifiers print goes to `log_path`, or nowhere. Workers are replaced after `recycle_after` samples. Raises
    `VerifierLookupError` if a verifier can't be resolved, ValueError for bad arguments, `ScorePoolError` if a worker
    does not start.
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
        startup_timeout_s: float = 60.0,
    ) -> None:
        _check_arguments(specs, num_workers, timeout_s, memory_limit_mb, recycle_after)
        self._timeout_s = timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._recycle_after = recycle_after
        self._cwd = os.getcwd()
        self._log_path = None if log_path is None else log_path.absolute()
        self._setup = json.dumps(
            {
                "specs": [(spec.name, spec.verifier, spec.weight) for spec in specs],
                "sys_path": _plugin_path(self._cwd),
                "memory_limit_mb": memory_limit_mb,
            }
        ).encode()
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._failure: Exception = ScorePoolError("this ScorePool is closed")
        self._jobs: set[_Job] = set()
        self._workers: dict[int, WorkerProcess] = {}
        self._counters = {"scored": 0, "error": 0, "timeout": 0, "worker_restarts": 0, "worker_recycles": 0}
        self._chunks: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._starts: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"score-pool-{slot}", daemon=True)
            for slot in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()
        self._await_workers()

    def _await_workers(self) -> None:
        try:
            failures = [exc for _ in self._threads if (exc := self._starts.get()) is not None]
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
        with self._lock:
            return dict(self._counters)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive now."""
        with self._lock:
            return [worker.process.pid for worker in self._workers.values()]

    def score(self, completions: Sequence[str], tasks: Sequence[TaskLike]) -> list[Verdict]:
        """One verdict per completion, in order; blocks until all are there. May be called from any thread.

        Raises ValueError if the lengths differ, TypeError for a completion that is not text, `ScorePoolError` if the
        pool is closed, closes meanwhile, or can't replace a worker.
        """
        if len(completions) != len(tasks):
            raise ValueError(f"{len(completions)} completions but {len(tasks)} tasks; each needs one")
        if os.getpid() != self._owner_pid:
            raise ScorePoolError("this ScorePool belongs to the process that made it; make another one after a fork")
        for position, completion in enumerate(completions):
            if not isinstance(completion, str):
                raise TypeError(f"completion {position} is {type(completion).__name__}, not str")
        job = _Job(verdicts=[None] * len(completions), missing=len(completions))
        if not completions:
            return []
        with self._lock:
            if self._closed:
                raise self._failure
            self._jobs.add(job)
        try:
            for chunk in self._split(job, completions, tasks):
                self._chunks.put(chunk)
            job.done.wait()
        finally:
            job.abandoned = True
            with self._lock:
                self._jobs.discard(job)
        if job.error is not None:
            raise job.error
        return [verdict for verdict in job.verdicts if verdict is not None]

    def close(self) -> None:
        """Kill the workers and end the threads; a `score` under way raises `ScorePoolError`. Safe to call twice."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._chunks.put(None)
        if os.getpid() == self._owner_pid:
            for thread in self._threads:
                thread.join()
        self._fail_jobs(ScorePoolError("the ScorePool was closed while it was scoring"))

    def __enter__(self) -> ScorePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _split(self, job: _Job, completions: Sequence[str], tasks: Sequence[TaskLike]) -> Iterator[_Chunk]:
        """The job in chunks small enough to share it among all workers; unsendable samples get their verdict here."""
        most = max(1, min(MAX_CHUNK_SAMPLES, len(completions) // (8 * len(self._threads))))
        positions: list[int] = []
        payloads: list[bytes] = []
        size = 0
        for position, (completion, task) in enumerate(zip(completions, tasks, strict=True)):
            try:
                payload = pickle.dumps((completion, task.prompt, task.answer, dict(task.metadata)), protocol=5)
            except Exception as exc:  # noqa: BLE001  (pickling runs the caller's own code)
                reason = f"the sample can't be sent to a worker: {type(exc).__name__}: {exc}"
                self._finish(job, position, _failed("error", reason))
                continue
            if positions and (len(positions) >= most or size + len(payload) > MAX_CHUNK_BYTES):
                yield _Chunk(job, positions, payloads)
                positions, payloads, size = [], [], 0
            positions.append(position)
            payloads.append(payload)
            size += len(payload)
        if positions:
            yield _Chunk(job, positions, payloads)

    # From here on: the threads that own the workers.

    def _serve(self, slot: int) -> None:
        try:
            self._start_worker(slot)
        except Exception as exc:  # noqa: BLE001  (raised again by the constructor)
            self._stop_worker(slot)
            self._starts.put(exc)
            return
        self._starts.put(None)
        try:
            while (chunk := self._chunks.get()) is not None:
                self._run_chunk(slot, chunk)
        except _ClosedError:
            pass
        except Exception as exc:  # noqa: BLE001  (raised again by every `score`)
            self._break(exc)
        finally:
            self._stop_worker(slot)

    def _start_worker(self, slot: int) -> None:
        """Start a worker and wait until it has resolved its verifiers."""
        if self._closed:
            raise _ClosedError
        try:
            worker = WorkerProcess(self._cwd, self._log_path)
        except OSError as exc:
            raise ScorePoolError(f"a verifier worker can't be started: {exc}") from exc
        with self._lock:
            self._workers[slot] = worker
        try:
            worker.send(self._setup)
            message = self._receive(worker, self._startup_timeout_s)
            late = {"error": f"not ready after {self._startup_timeout_s:g} s"}
            answer = late if message is None else json.loads(message)
        except (EOFError, OSError, ValueError):
            answer = {"error": f"{exit_cause(worker.stop())} before it was ready"}
        if answer:
            self._stop_worker(slot)
            if "lookup_error" in answer:
                raise VerifierLookupError(answer["lookup_error"])
            where = "pass log_path to see its output" if self._log_path is None else f"see {self._log_path}"
            raise ScorePoolError(f"a verifier worker did not start: {answer['error']}; {where}")

    def _stop_worker(self, slot: int, counter: str | None = None) -> int | None:
        """Kill the slot's worker, if it has one; its exit status."""
        with self._lock:
            worker = self._workers.pop(slot, None)
            if counter is not None:
                self._counters[counter] += 1
        return None if worker is None else worker.stop()

    def _receive(self, worker: WorkerProcess, seconds: float) -> bytes | None:
        """The worker's next message, or None after `seconds`; raises EOFError or OSError if it died, `_ClosedError`."""
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            if worker.readable(min(left, CLOSE_CHECK_S)):
                return worker.receive()
            if self._closed:
                raise _ClosedError
            if left <= 0:
                return None

    def _run_chunk(self, slot: int, chunk: _Chunk) -> None:
        """All verdicts of a chunk, with as many workers as that takes; leaves a live worker behind."""
        done = 0
        while done < len(chunk.payloads) and not chunk.job.abandoned:
            worker = self._workers[slot]
            if worker.readable(0):  # nothing is due: an idle worker died, or talks out of turn
                self._stop_worker(slot, "worker_restarts")
            elif worker.samples >= self._recycle_after:
                self._stop_worker(slot, "worker_recycles")
            else:
                done = self._drive(slot, worker, chunk, done)
            if slot not in self._workers:
                self._start_worker(slot)

    def _drive(self, slot: int, worker: WorkerProcess, chunk: _Chunk, done: int) -> int:
        """Give the worker the samples from `done` on; the number judged when it is through or stopped."""
        try:
            worker.send(pickle.dumps(chunk.payloads[done:]))
            if self._receive(worker, HANDOVER_S) is None:
                raise TimeoutError(f"it took no sample for {HANDOVER_S:g} s")
            for position in chunk.positions[done:]:
                start = time.monotonic()
                message = self._receive(worker, self._timeout_s)
                if message is None:
                    reason = f"no verdict within {self._timeout_s:g} s; the worker was killed"
                    verdict, replace = _failed("timeout", reason, time.monotonic() - start), True
                else:
                    verdict, replace = _decode(message)
                worker.samples += 1
                done += 1
                if replace:
                    self._stop_worker(slot, "worker_restarts")
                self._finish(chunk.job, position, verdict)
                if replace:
                    return done
        except (EOFError, OSError, ValueError) as exc:
            status = self._stop_worker(slot, "worker_restarts")
            silent = isinstance(exc, EOFError | ConnectionError)
            cause = exit_cause(status) if silent and status is not None else f"{type(exc).__name__}: {exc}"
            self._finish(chunk.job, chunk.positions[done], _failed("error", f"the worker died on this sample: {cause}"))
            done += 1
        return done

    def _finish(self, job: _Job, position: int, verdict: Verdict) -> None:
        with self._lock:
            self._counters["scored"] += 1
            if verdict.status in ("error", "timeout"):
                self._counters[verdict.status] += 1
            job.verdicts[position] = verdict
            job.missing -= 1
            if job.missing == 0:
                job.done.set()

    def _break(self, exc: Exception) -> None:
        """A worker can't be replaced: nothing more will be scored, and every caller is told why."""
        known = isinstance(exc, VerifierLookupError | ScorePoolError)
        error = exc if known else ScorePoolError(f"the ScorePool failed: {exc!r}")
        with self._lock:
            self._closed = True
            self._failure = error
        self._fail_jobs(error)

    def _fail_jobs(self, error: Exception) -> None:
        with self._lock:
            jobs, self._jobs = self._jobs, set()
        for job in jobs:
            if job.missing:
                job.error = error
            job.done.set()


def _failed(status: Status, reason: str, elapsed_s: float = 0.0) -> Verdict:
    return Verdict(score=0.0, status=status, reason=reason, elapsed_s=elapsed_s)


def _decode(message: bytes) -> tuple[Verdict, bool]:
    """A worker's verdict, and whether it asks to be replaced; raises ValueError if the message is garbled."""
    fields = json.loads(message)
    if not isinstance(fields, list) or len(fields) != 7:
        raise ValueError("its message is garbled")
    score, status, reason, extracted, parts, elapsed_s, replace = fields
    verdict = Verdict(score=score, status=status, reason=reason, extracted=extracted, parts=parts, elapsed_s=elapsed_s)
    return verdict, replace


def _check_arguments(
    specs: Sequence[VerifierSpec], num_workers: int, timeout_s: float, memory_limit_mb: int, recycle_after: int
) -> None:
    names = [spec.name for spec in specs]
    if not names:
        raise ValueError("a ScorePool needs at least one VerifierSpec")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two verifiers of the pool are named {name!r}; names must differ")
    for spec in specs:
        if not math.isfinite(spec.weight):
            raise ValueError(f"the weight of verifier {spec.name!r} is {spec.weight}; it must be a finite number")
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s is {timeout_s}; it must be a positive number of seconds")
    for label, value, least in (
        ("num_workers", num_workers, 1),
        ("memory_limit_mb", memory_limit_mb, MIN_MEMORY_LIMIT_MB),
        ("recycle_after", recycle_after, 1),
    ):
        if value < least:
            raise ValueError(f"{label} is {value}; it must be at least {least}")
