"""One verifier worker as its owner sees it: a child process, the connection to it, and its end."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from verifiers.descendants import MARK, kill_with_descendants

HANDOVER_S = 60.0  # for a live worker to take a chunk, or to read or write one message, before it counts as dead
MAX_MESSAGE_BYTES = 2**26


class WorkerProcess:
    """A running `verifiers.worker`, to be used by the one thread that made it: it dies with that thread."""

    def __init__(self, cwd: str, log_path: Path | None) -> None:
        self.samples = 0
        self._mark = secrets.token_hex(16)
        ours, theirs = socket.socketpair()
        limit = struct.pack("@ll", int(HANDOVER_S), 0)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        with contextlib.ExitStack() as on_failure, theirs:
            on_failure.callback(ours.close)
            self.process = _spawn(theirs.fileno(), cwd, log_path, self._mark)
            on_failure.pop_all()
        self._connection = Connection(ours.detach())
        self._poller = select.poll()
        self._poller.register(self._connection.fileno(), select.POLLIN)

    def send(self, message: bytes) -> None:
        """Hand over one message; raises OSError if the worker is gone or does not read for `HANDOVER_S`."""
        self._connection.send_bytes(message)

    def receive(self) -> bytes:
        """The next message; raises EOFError or OSError if the worker is gone or its message is no message."""
        return self._connection.recv_bytes(MAX_MESSAGE_BYTES)

    def readable(self, seconds: float) -> bool:
        """Whether a message (or the end of the connection) is there within `seconds`."""
        return bool(self._poller.poll(max(0.0, seconds) * 1000))

    def stop(self) -> int:
        """Kill the process with everything it started; its exit status as `subprocess` gives it. Safe to call twice."""
        status = self.process.returncode
        if status is None:
            kill_with_descendants(self.process.pid, self._mark)
            status = self.process.wait(timeout=HANDOVER_S)
        self._connection.close()
        return status


def _spawn(fd: int, cwd: str, log_path: Path | None, mark: str) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as stack:
        log = subprocess.DEVNULL if log_path is None else stack.enter_context(log_path.open("ab"))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "verifiers.worker", str(fd), str(os.getpid())],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=cwd,
            env=_environment(mark),
            start_new_session=True,
        )


def _environment(mark: str) -> dict[str, str]:
    """The caller's environment, with this package importable, numeric libraries on one thread, and the worker's mark."""
    env = {**os.environ, MARK: mark}
    home = str(Path(__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [home, env.get("PYTHONPATH")]))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        env.setdefault(name, "1")
    return env


def exit_cause(status: int) -> str:
    """An exit status of `subprocess` in words, signals by name."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
