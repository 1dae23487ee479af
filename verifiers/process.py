"""One verifier worker as its owner sees it: a child process, the connection to it, and its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

HANDOVER_S = 60.0  # for a live worker to take a chunk, or to read or write one message, before it counts as dead
MAX_MESSAGE_BYTES = 2**26


class WorkerProcess:
    """A running `verifiers.worker`, to be used by the one thread that made it: it dies with that thread."""

    def __init__(self, cwd: str, log_path: Path | None) -> None:
        self.samples = 0
        ours, theirs = socket.socketpair()
        limit = struct.pack("@ll", int(HANDOVER_S), 0)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        with contextlib.ExitStack() as on_failure, theirs:
            on_failure.callback(ours.close)
            self.process = _spawn(theirs.fileno(), cwd, log_path)
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            status = self.process.wait(timeout=HANDOVER_S)
        self._connection.close()
        return status


def _spawn(fd: int, cwd: str, log_path: Path | None) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as stack:
        log = subprocess.DEVNULL if log_path is None else stack.enter_context(log_path.open("ab"))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "verifiers.worker", str(fd), str(os.getpid())],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=cwd,
            env=_environment(),
            start_new_session=True,
        )


def _environment() -> dict[str, str]:
    """The caller's environment, with this package importable and numeric libraries on one thread."""
    env = dict(os.environ)
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
