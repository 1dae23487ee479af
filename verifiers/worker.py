"""The child process of a `ScorePool`: reads chunks of samples from its connection, sends one result per sample.

Started as `python -P -m verifiers.worker FD PARENT_PID`. It is given pickled plain values and answers in JSON, so that
the parent never unpickles what a plug-in could have written. It ends with its connection or with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from verifiers.calling import as_verdict, broken, prepare, timeout_of
from verifiers.compose import Weighted
from verifiers.registry import VerifierLookupError, resolve
from verifiers.task import PlainTask
from verifiers.verdict import GoldAudit, TaskLike, Verdict

STARTED = b"started"
MAX_TEXT_CHARS = 4000
MAX_PARTS = 1000
OUT_OF_MEMORY = "out of memory"
MEMORY_GROWTH = "memory growth"
_SLOW_ENOUGH_TO_LOOK_S = 0.001  # a look at the memory in use costs some 10 microseconds
_PR_SET_PDEATHSIG = 1


def main(fd: int, parent_pid: int) -> int:
    """Serve one pool until its end of the connection closes; the exit status."""
    _die_with_parent(parent_pid)
    connection = Connection(fd)
    try:
        judge = _set_up(json.loads(connection.recv_bytes()))
    except EOFError:
        return 0
    except VerifierLookupError as exc:
        connection.send_bytes(json.dumps({"lookup_error": str(exc)}).encode())
        return 0
    except MemoryError:
        connection.send_bytes(json.dumps({"error": "out of memory while importing its verifiers"}).encode())
        return 0
    connection.send_bytes(b"{}")
    try:
        while True:
            kind, payloads = pickle.loads(connection.recv_bytes())
            connection.send_bytes(STARTED)
            for payload in payloads:
                judge.run(connection, kind, payload)
    except (EOFError, ConnectionError):
        return 0


def _die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process with the thread that started it, even if a verifier never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)


def _set_up(setup: Mapping[str, Any]) -> _Judge:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the kernel does not enforce it
        limit = setup["memory_limit_mb"] * 2**20
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        # Only the soft limit: a verifier that starts programs gives each the limit that it needs.
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    sys.path[:] = setup["sys_path"]
    return _Judge(setup)


class _Judge:
    """The verifiers of the pool, and what holds for each call of them."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        parts = {name: (resolve(verifier, options), weight) for name, verifier, options, weight, _ in setup["specs"]}
        self._verifier = Weighted(parts)
        self._asked_s = [(parts[name][0], timeout_s) for name, _, _, _, timeout_s in setup["specs"]]
        self._timeout_s: float = setup["timeout_s"]
        self._growth_limit = setup["max_growth_mb"] * 2**20
        self._resident_at_start = resident_bytes()
        self._pid = os.getpid()

    def run(self, connection: Connection, kind: str, payload: bytes) -> None:
        """Send one sample's result: kind, its fields, and why this worker should be replaced, or null.

        Before it, the time limit is sent if it is not the pool's own, so that the parent waits as long as that.
        """
        replace: str | None = None
        start = time.perf_counter()
        limit_s = self._timeout_s
        result: Verdict | GoldAudit | None
        try:
            completion, *fields = pickle.loads(payload)
            task = PlainTask(*fields)
            limit_s = self._limit_s(task)
            if limit_s != self._timeout_s:
                connection.send_bytes(json.dumps(limit_s).encode())
            start = time.perf_counter()
            if kind == "score":
                result = self._verifier(completion, task)
            else:
                result = prepare(self._verifier, task)
        except MemoryError as exc:
            replace = OUT_OF_MEMORY
            result = failed(kind, f"out of memory: {_describe(exc)}")
        except (Exception, SystemExit, KeyboardInterrupt) as exc:  # noqa: BLE001  (the verdict says it)
            result = failed(kind, _describe(exc))
        elapsed_s = time.perf_counter() - start
        if os.getpid() != self._pid:  # a verifier forked and let the child return: it must not answer in our place
            os._exit(0)
        if elapsed_s > limit_s and isinstance(result, Verdict):
            result = Verdict(score=0.0, status="timeout", reason=f"it took {elapsed_s:.2f} s of {limit_s:g} s")
        grown = elapsed_s > _SLOW_ENOUGH_TO_LOOK_S and resident_bytes() - self._resident_at_start > self._growth_limit
        connection.send_bytes(encode(kind, result, elapsed_s, replace or (MEMORY_GROWTH if grown else None)))

    def _limit_s(self, task: TaskLike) -> float:
        """The pool's own limit, or what the verifiers ask for on this task where that is more."""
        wishes = (timeout_of(verifier, task) if given is None else given for verifier, given in self._asked_s)
        return max(self._timeout_s, float(sum(wishes)))


def resident_bytes(pid: int | None = None) -> int:
    """The memory in use by a process (default: this one); 0 where the kernel does not tell."""
    try:
        with open(f"/proc/{pid or 'self'}/statm", "rb") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def failed(kind: str, reason: str) -> Verdict | GoldAudit:
    """The result of a call that raised: verdict `error`, or a gold that could not be read."""
    if kind == "score":
        return broken(reason)
    return GoldAudit(status="unparsable", reason=f"the verifier failed on it: {reason}")


def _describe(exc: BaseException) -> str:
    """Type, message and place of an exception whose own `__str__` may be broken."""
    try:
        message = str(exc)
    except Exception as broken_str:  # noqa: BLE001  (its `__str__` is a plug-in's code)
        message = f"<its message raised {type(broken_str).__name__}>"
    frames = traceback.extract_tb(exc.__traceback__, limit=-1)
    place = f" ({os.path.basename(frames[0].filename)}:{frames[0].lineno})" if frames else ""
    return f"{type(exc).__name__}: {message[:MAX_TEXT_CHARS]}{place}"


def encode(kind: str, result: Any, elapsed_s: float, replace: str | None) -> bytes:
    """A result for the wire as JSON [kind, fields, replace], its texts cut to `MAX_TEXT_CHARS`."""
    if kind == "score":
        verdict = as_verdict("weighted", result)
        if len(verdict.parts) > MAX_PARTS:
            verdict = broken(f"the verdict has {len(verdict.parts)} parts, more than {MAX_PARTS}")
        fields: Sequence[Any] = (
            verdict.score,
            verdict.status,
            verdict.reason[:MAX_TEXT_CHARS],
            _clip(verdict.extracted),
            dict(verdict.parts),
            elapsed_s,
        )
    else:
        fields = () if result is None else (result.status, result.reason[:MAX_TEXT_CHARS], _clip(result.parsed))
    return json.dumps([kind, fields, replace]).encode()


def _clip(text: str | None) -> str | None:
    return None if text is None else text[:MAX_TEXT_CHARS]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
