"""The child process of a `ScorePool`: reads chunks of samples from its connection, sends one verdict per sample.

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
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from verifiers.compose import weighted
from verifiers.registry import VerifierLookupError, as_verdict, resolve
from verifiers.verdict import Verdict, Verifier

STARTED = b"started"
MAX_TEXT_CHARS = 4000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class SentTask:
    """What travels of a task: all that a verifier may read."""

    prompt: Any
    answer: Any
    metadata: Mapping[str, Any]


def main(fd: int, parent_pid: int) -> int:
    """Serve one pool until its end of the connection closes; the exit status."""
    _die_with_parent(parent_pid)
    connection = Connection(fd)
    try:
        setup = json.loads(connection.recv_bytes())
        verifier = _set_up(setup)
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
            chunk: list[bytes] = pickle.loads(connection.recv_bytes())
            connection.send_bytes(STARTED)
            for payload in chunk:
                connection.send_bytes(_judge(verifier, payload))
    except (EOFError, ConnectionError):
        return 0


def _die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process with the thread that started it, even if a verifier never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)


def _set_up(setup: Mapping[str, Any]) -> Verifier:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the kernel does not enforce it
        limit = setup["memory_limit_mb"] * 2**20
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.path[:] = setup["sys_path"]
    return weighted({name: (resolve(verifier), weight) for name, verifier, weight in setup["specs"]})


def _judge(verifier: Verifier, payload: bytes) -> bytes:
    """One sample's verdict as a JSON list, whose last item says that this worker should be replaced."""
    own_pid = os.getpid()
    out_of_memory = False
    start = time.perf_counter()
    try:
        completion, prompt, answer, metadata = pickle.loads(payload)
        verdict = as_verdict("weighted", verifier(completion, SentTask(prompt, answer, metadata)))
    except MemoryError as exc:
        out_of_memory = True
        verdict = Verdict(score=0.0, status="error", reason=f"out of memory: {_describe(exc)}")
    except (Exception, SystemExit, KeyboardInterrupt) as exc:  # noqa: BLE001  (the verdict says it)
        verdict = Verdict(score=0.0, status="error", reason=_describe(exc))
    elapsed_s = time.perf_counter() - start
    if os.getpid() != own_pid:  # a verifier forked and let the child return: it must not answer in our place
        os._exit(0)
    return encode(verdict, elapsed_s, out_of_memory)


def _describe(exc: BaseException) -> str:
    """Type, message and place of an exception whose own `__str__` may be broken."""
    try:
        message = str(exc)
    except Exception as broken:  # noqa: BLE001  (its `__str__` is a plug-in's code)
        message = f"<its message raised {type(broken).__name__}>"
    frames = traceback.extract_tb(exc.__traceback__, limit=-1)
    place = f" ({os.path.basename(frames[0].filename)}:{frames[0].lineno})" if frames else ""
    return f"{type(exc).__name__}: {message[:MAX_TEXT_CHARS]}{place}"


def encode(verdict: Verdict, elapsed_s: float, replace_worker: bool) -> bytes:
    """A verdict for the wire, its texts cut to `MAX_TEXT_CHARS`."""
    extracted = None if verdict.extracted is None else verdict.extracted[:MAX_TEXT_CHARS]
    reason = verdict.reason[:MAX_TEXT_CHARS]
    fields = [verdict.score, verdict.status, reason, extracted, dict(verdict.parts), elapsed_s, replace_worker]
    return json.dumps(fields).encode()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
