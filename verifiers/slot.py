"""One place for a worker in a `ScorePool`: a thread that owns the process in it.

It starts the process, hands it chunks of samples, reads one result per sample, kills it when a sample overstays, and
replaces it. The samples behind a bad one go to the replacement.
"""

from __future__ import annotations

import json
import pickle
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verifiers.health import Tally
from verifiers.jobs import Chunk, Job, Kind, failure
from verifiers.process import HANDOVER_S, WorkerProcess, exit_cause
from verifiers.registry import VerifierLookupError
from verifiers.verdict import GoldAudit, Verdict
from verifiers.worker import MEMORY_GROWTH

CLOSE_CHECK_S = 0.1


class ScorePoolError(RuntimeError):
    """The pool itself can't go on: closed, or a worker that does not start."""


class ClosedError(Exception):
    """The pool was closed while its thread was waiting for a worker."""


@dataclass
class Shared:
    """What a pool and its slots have in common; `lock` guards `tally`, `workers` and `closed`."""

    setup: bytes
    cwd: str
    log_path: Path | None
    timeout_s: float
    startup_timeout_s: float
    recycle_after: int
    room: threading.Semaphore  # for chunks that are pickled and wait for a worker
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False
    tally: Tally = field(default_factory=Tally)
    workers: dict[int, WorkerProcess] = field(default_factory=dict)
    chunks: queue.SimpleQueue[Chunk | None] = field(default_factory=queue.SimpleQueue)
    starts: queue.SimpleQueue[Exception | None] = field(default_factory=queue.SimpleQueue)

    def finish(self, job: Job, position: int, result: Verdict | GoldAudit | None) -> None:
        """Put one result in its place, and wake the caller with the last."""
        with self.lock:
            if isinstance(result, Verdict):
                self.tally.add(result, job.completions[position])
            job.results[position] = result
            job.missing -= 1
            if job.missing == 0:
                job.done.set()


class Slot:
    """The owner of one worker process; `run` is the body of its thread."""

    def __init__(self, index: int, shared: Shared, on_failure: Callable[[Exception], None]) -> None:
        self._index, self._shared, self._on_failure = index, shared, on_failure
        self._worker: WorkerProcess | None = None

    def run(self) -> None:
        """Serve the pool's chunks until it closes; a start that fails is reported in `shared.starts`."""
        try:
            self._start()
        except Exception as exc:  # noqa: BLE001  (raised again by the constructor)
            self._stop()
            self._shared.starts.put(exc)
            return
        self._shared.starts.put(None)
        try:
            while (chunk := self._shared.chunks.get()) is not None:
                self._shared.room.release()
                self._run_chunk(chunk)
        except ClosedError:
            pass
        except Exception as exc:  # noqa: BLE001  (raised again by every `score`)
            self._on_failure(exc)
        finally:
            self._stop()

    def _start(self) -> WorkerProcess:
        """Start a worker and wait until it has resolved its verifiers."""
        shared = self._shared
        if shared.closed:
            raise ClosedError
        try:
            worker = WorkerProcess(shared.cwd, shared.log_path)
        except OSError as exc:
            raise ScorePoolError(f"a verifier worker can't be started: {exc}") from exc
        self._worker = worker
        with shared.lock:
            shared.workers[self._index] = worker
        try:
            worker.send(shared.setup)
            message = self._receive(worker, shared.startup_timeout_s)
            late = {"error": f"not ready after {shared.startup_timeout_s:g} s"}
            answer = late if message is None else json.loads(message)
        except (EOFError, OSError, ValueError):
            answer = {"error": f"{exit_cause(worker.stop())} before it was ready"}
        if answer:
            self._stop()
            if "lookup_error" in answer:
                raise VerifierLookupError(answer["lookup_error"])
            where = "pass log_path to see its output" if shared.log_path is None else f"see {shared.log_path}"
            raise ScorePoolError(f"a verifier worker did not start: {answer['error']}; {where}")
        return worker

    def _stop(self, restart: str | None = None, recycle: str | None = None) -> int | None:
        """Kill the worker, if there is one, counting the cause; its exit status."""
        with self._shared.lock:
            worker, self._worker = self._worker, None
            self._shared.workers.pop(self._index, None)
            if recycle is not None:
                self._shared.tally.recycles[recycle] += 1
        status = None if worker is None else worker.stop()
        if restart is not None:
            self._count_restart(restart)
        return status

    def _count_restart(self, cause: str) -> None:
        with self._shared.lock:
            self._shared.tally.restarts[cause] += 1

    def _receive(self, worker: WorkerProcess, seconds: float) -> bytes | None:
        """The worker's next message, or None after `seconds`; raises EOFError or OSError if it died, `ClosedError`."""
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            if worker.readable(min(left, CLOSE_CHECK_S)):
                return worker.receive()
            if self._shared.closed:
                raise ClosedError
            if left <= 0:
                return None

    def _run_chunk(self, chunk: Chunk) -> None:
        """All results of a chunk, with as many workers as that takes; leaves a live worker behind."""
        shared, done = self._shared, 0
        with shared.lock:
            shared.tally.running += 1
        try:
            while done < len(chunk.payloads) and not chunk.job.abandoned:
                if shared.closed:
                    raise ClosedError
                worker = self._worker or self._start()
                if worker.readable(0):  # nothing is due: an idle worker died, or talks out of turn
                    self._stop(restart="died or talked while idle")
                elif worker.samples >= shared.recycle_after:
                    self._stop(recycle="samples")
                else:
                    done = self._drive(worker, chunk, done)
        finally:
            with shared.lock:
                shared.tally.running -= 1
        if self._worker is None:
            self._start()

    def _drive(self, worker: WorkerProcess, chunk: Chunk, done: int) -> int:
        """Give the worker the samples from `done` on; the number judged when it is through or stopped."""
        kind = chunk.job.kind
        try:
            worker.send(pickle.dumps((kind, chunk.payloads[done:])))
            if self._receive(worker, HANDOVER_S) is None:
                raise TimeoutError(f"it took no sample for {HANDOVER_S:g} s")
            for position in chunk.positions[done:]:
                result, replace = self._result(worker, kind)
                worker.samples += 1
                done += 1
                if replace == MEMORY_GROWTH:
                    self._stop(recycle=replace)
                elif replace is not None:
                    self._stop(restart=replace)
                self._shared.finish(chunk.job, position, result)
                if replace is not None:
                    return done
        except (EOFError, OSError, ValueError) as exc:
            status = self._stop()
            silent = isinstance(exc, EOFError | ConnectionError)
            cause = exit_cause(status) if silent and status is not None else f"{type(exc).__name__}: {exc}"
            self._count_restart(cause)
            result = failure(kind, "error", f"the worker died on this sample: {cause}")
            self._shared.finish(chunk.job, chunk.positions[done], result)
            done += 1
        return done

    def _result(self, worker: WorkerProcess, kind: Kind) -> tuple[Verdict | GoldAudit | None, str | None]:
        """The next sample's result, and why the worker has to be replaced, if so.

        The worker measures the time of a call itself; here the clock runs from its last message, that is, never from
        earlier than the call's start, until the worker is killed.
        """
        limit_s = self._shared.timeout_s
        start = time.monotonic()
        while (message := self._receive(worker, start + limit_s - time.monotonic())) is not None:
            fields = json.loads(message)
            if not isinstance(fields, float):
                return _decode(kind, fields)
            limit_s = fields
        reason = f"no verdict within {limit_s:g} s; the worker was killed"
        return failure(kind, "timeout", reason, time.monotonic() - start), "timeout"


def _decode(kind: Kind, message: Any) -> tuple[Verdict | GoldAudit | None, str | None]:
    """A worker's result, and why it asks to be replaced; raises ValueError if the message is garbled."""
    if not isinstance(message, list) or len(message) != 3 or message[0] != kind:
        raise ValueError("its message is garbled")
    _, fields, replace = message
    if kind == "audit":
        if not fields:
            return None, replace
        status, reason, parsed = fields
        return GoldAudit(status=status, reason=reason, parsed=parsed), replace
    score, status, reason, extracted, parts, elapsed_s = fields
    verdict = Verdict(score=score, status=status, reason=reason, extracted=extracted, parts=parts, elapsed_s=elapsed_s)
    return verdict, replace
