"""The verifier's side of the sandbox: fork servers kept warm, one run at a time each, started on demand.

A server belongs to the process that started it and dies with it: the kernel kills the server, and its namespace with
it, when that process ends in whatever way. Nothing of a run is ever on disk, except in the mode `limits-only`. A little
over 400 lines: the life of a server is read in one piece.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from verifiers.code import layout, limits_only
from verifiers.code.jail import NOBODY
from verifiers.code.limits import Ending, Limits
from verifiers.code.zygote import BOOT, MAX_HEADER_BYTES, STOP

Isolation = Literal["namespaces", "bubblewrap", "limits-only"]
Choice = Literal["auto", "namespaces", "bubblewrap", "limits-only"]
CHOICES: tuple[Choice, ...] = ("auto", "namespaces", "bubblewrap", "limits-only")
_START_TIMEOUT_S = 30.0
_GRACE_S = 3.0
_MAX_IDLE = 4


class SandboxError(RuntimeError):
    """Programs can't be run here in the isolation asked for, or the sandbox itself failed; never the program's fault."""


class Server:
    """One fork server process: `profile` says what its file system holds (`layout`)."""

    def __init__(self, isolation: Isolation, profile: str) -> None:
        self.isolation: Isolation = isolation
        self.profile = profile
        self.has_work = False
        try:
            packages = layout.for_profile(profile).packages
            self._directory = limits_only.make_directory(packages) if isolation == "limits-only" else None
        except OSError as exc:
            raise SandboxError(f"the sandbox ({isolation}) has no directory to work in: {exc}; set TMPDIR") from exc
        self._detached: int | None = None  # in limits-only, where the process that was started is not the server
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        try:
            with theirs:
                self._process = _SPAWNER.submit(self._start, theirs).result()
            self.facts = self._handshake()
            if isolation == "limits-only":
                self._detached = os.pidfd_open(self.facts["pid"])
        except BaseException:
            self.close()
            raise

    def _start(self, control: socket.socket) -> subprocess.Popen[bytes]:
        """Start the process; runs in a thread that lives as long as this process, as the kernel watches that thread."""
        place = layout.for_profile(self.profile)
        setup: dict[str, Any] = {"kind": self.isolation, "python_path": list(place.python_path)}
        fd = control.fileno()
        home = layout.BUBBLEWRAP_HOME if self.isolation == "bubblewrap" else str(Path(__file__).parents[1])
        command = [
            os.path.realpath(sys.executable),
            "-s",
            "-S",
            "-P",
            "-B",
            "-c",
            BOOT,
            home,
            str(fd),
        ]
        if self.isolation == "namespaces":
            setup |= {"binds": place.binds, "links": place.links}
        elif self.isolation == "limits-only":
            setup |= {
                "directory": self._directory,
                "readable": place.readable(),
                "python_path": [f"{self._directory}/packages"],
            }
        parent_pid = 0 if self.isolation == "bubblewrap" else os.getpid()
        command += [str(parent_pid), json.dumps(setup)]
        if self.isolation == "bubblewrap":
            command = [*layout.bubblewrap_arguments(place), *command]
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", **_PYTHON_ENVIRONMENT}
        null = subprocess.DEVNULL
        # The kernel counts no processes of root's: below bubblewrap, which keeps the user, it is nobody who starts them.
        user = NOBODY if self.isolation == "bubblewrap" and os.geteuid() == 0 else None
        return subprocess.Popen(
            command,
            pass_fds=(fd,),
            stdin=null,
            stdout=null,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )

    def _handshake(self) -> dict[str, Any]:
        self._control.settimeout(_START_TIMEOUT_S)
        try:
            answer = json.loads(self._control.recv(MAX_HEADER_BYTES) or b"{}")
        except (OSError, ValueError) as exc:
            raise SandboxError(f"the sandbox ({self.isolation}) did not start: {exc}") from exc
        if "facts" in answer:
            stderr, self._process.stderr = self._process.stderr, None
            if stderr is not None:
                stderr.close()
            return answer["facts"]
        self._process.kill()
        cause = answer.get("error") or (self._process.communicate()[1].decode(errors="replace").strip() or "no reason")
        raise SandboxError(f"the sandbox ({self.isolation}) did not start: {cause[-400:]}")

    def ask(self, request: dict[str, Any], fds: list[int]) -> None:
        """Send a request; the answer is fetched by `answer`."""
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
        except OSError as exc:
            raise SandboxError(f"the sandbox's fork server is gone: {exc}") from exc

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The answer to the last request, or None if there is none in that time; raises `SandboxError`."""
        self._control.settimeout(max(seconds, 0.001))
        try:
            message = self._control.recv(MAX_HEADER_BYTES)
            answer = json.loads(message)
        except TimeoutError:
            return None
        except (OSError, ValueError) as exc:
            raise SandboxError(f"the sandbox's fork server died: {exc}") from exc
        if "error" in answer:
            raise SandboxError(f"the sandbox's fork server: {answer['error']}")
        return answer

    def cancel(self) -> None:
        """Ask it to stop the run under way."""
        with contextlib.suppress(OSError):
            self._control.send(STOP)

    def close(self) -> None:
        """End it and everything in its sandbox. Safe to call twice."""
        self._control.close()
        process = getattr(self, "_process", None)
        if self._detached is not None:
            _end_detached(self._detached)
            self._detached = None
        if process is not None and process.returncode is None:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
        if self._directory is not None:
            limits_only.delete(self._directory)

    def abandon(self) -> None:
        """In a forked copy of this process: let go of it without touching what belongs to the original."""
        self._control.close()
        if self._detached is not None:
            os.close(self._detached)


def _end_detached(pidfd: int) -> None:
    """Wait until a server whose socket was closed has cleared up and ended; kill it if it doesn't."""
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(_GRACE_S * 1000):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


_PYTHON_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # the same program gives the same output
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class _Pool:
    """The idle servers of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: list[Server] = []

    def take(self, isolation: Isolation, profile: str) -> Server:
        """An idle server of that kind, or a new one."""
        with self.lock:
            for place, server in enumerate(self.idle):
                if (server.isolation, server.profile) == (isolation, profile):
                    return self.idle.pop(place)
        return Server(isolation, profile)

    def give_back(self, server: Server) -> None:
        """Keep a server for later; the oldest idle ones beyond `_MAX_IDLE` are ended."""
        with self.lock:
            self.idle.append(server)
            surplus = [] if len(self.idle) <= max_idle() else [self.idle.pop(0)]
        for each in surplus:
            each.close()

    def close(self) -> None:
        """End all idle servers."""
        with self.lock:
            servers, self.idle = self.idle, []
        for server in servers:
            server.close()


_POOL = _Pool()
_SPAWNER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="code-sandbox-spawner")


def max_idle() -> int:
    """How many idle servers are kept warm."""
    return max(_MAX_IDLE, 2 * (os.cpu_count() or 1))


def _forget_after_fork() -> None:
    global _POOL, _SPAWNER
    for server in _POOL.idle:
        server.abandon()
    _POOL = _Pool()
    _SPAWNER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="code-sandbox-spawner")
    available.cache_clear()


os.register_at_fork(after_in_child=_forget_after_fork)


@atexit.register
def close_all() -> None:
    """End the fork servers that are idle, for example before counting processes; new ones start on demand."""
    _POOL.close()


@functools.cache
def available(choice: Choice) -> Isolation:
    """The isolation that `choice` comes to on this machine, tried out once; raises `SandboxError` saying what to do."""
    if sys.platform != "linux":
        raise SandboxError("programs can be run on Linux only")
    candidates: tuple[Isolation, ...] = ("namespaces", "bubblewrap") if choice == "auto" else (choice,)
    failures = []
    for isolation in candidates:
        if isolation == "bubblewrap" and shutil.which("bwrap") is None:
            failures.append("bubblewrap is not installed")
            continue
        try:
            _POOL.give_back(Server(isolation, "python"))
        except SandboxError as exc:
            failures.append(str(exc))
        else:
            return isolation
    if choice == "limits-only":
        raise SandboxError(f"programs can't be run here: {failures[0]}")
    advice = "allow user namespaces, install bubblewrap, or accept weaker isolation with sandbox = 'limits-only'"
    raise SandboxError(f"no isolation for programs: {'; '.join(failures)}; {advice}")


@dataclass
class Run:
    """A run under way or ended: its output (each cut at `file_mb`), its channel if it has one, how it ended."""

    server: Server
    limits: Limits
    output_file: int
    error_file: int
    channel: socket.socket | None = None
    ending: Ending | None = None
    start: float = field(default_factory=time.monotonic)

    def wait(self) -> Ending:
        """Wait for the end of it, which the server brings about; raises `SandboxError` if the server does not."""
        if self.ending is None:
            # Without a private /tmp, what the run left there is deleted file by file first.
            grace_s = _GRACE_S if self.server.isolation == "namespaces" else _START_TIMEOUT_S
            seconds = self.start + self.limits.wall_s + grace_s - time.monotonic()
            answer = self.server.answer(max(seconds, _GRACE_S))
            if answer is None:
                raise SandboxError("the sandbox's fork server did not answer in time")
            self.ending = Ending(**answer)
            if self.ending.setup_error is not None:
                raise SandboxError(f"the sandbox could not be set up: {self.ending.setup_error}")
        return self.ending

    def stop(self) -> Ending:
        """Stop it if it has not ended."""
        if self.ending is None:
            self.server.cancel()
        return self.wait()

    def output(self, limit: int = 2**26) -> bytes:
        """What it wrote to standard output."""
        return _contents(self.output_file, limit)

    def errors(self, limit: int = 2000) -> str:
        """The end of what it wrote to standard error."""
        size = os.fstat(self.error_file).st_size
        return os.pread(self.error_file, limit, max(0, size - limit)).decode(errors="replace")


def _contents(fd: int, limit: int) -> bytes:
    size, parts = min(os.fstat(fd).st_size, limit), bytearray()
    while len(parts) < size:
        part = os.pread(fd, min(size - len(parts), 2**24), len(parts))
        if not part:
            break
        parts += part
    return bytes(parts)


class Session:
    """One sample's use of the sandbox, on one server: any number of runs one after another, and a /program between them."""

    def __init__(self, choice: Choice, profile: str = "python") -> None:
        self.isolation = available(choice)
        self._server: Server | None = _POOL.take(self.isolation, profile)
        self.facts = self._server.facts
        self._has_work = False
        self._fds = contextlib.ExitStack()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        server, self._server = self._server, None
        self._fds.close()
        if server is None:
            return
        try:
            if exc is None and self._has_work:
                self._change_work(server, {"do": "drop work"})
        except SandboxError:
            server.close()
            raise
        if exc is None:
            _POOL.give_back(server)
        else:  # it may be in the middle of a run
            server.close()

    def make_work(self, size_mb: int) -> None:
        """An empty /program, which later runs of this session share; only those started with `writes_work` write to it."""
        assert self._server is not None
        self._change_work(self._server, {"do": "make work", "size_mb": size_mb})
        self._has_work = True

    def _change_work(self, server: Server, request: dict[str, Any]) -> None:
        server.ask(request, [])
        if server.answer(_START_TIMEOUT_S) is None:
            raise SandboxError("the sandbox's fork server did not answer in time")

    @contextlib.contextmanager
    def run(
        self,
        role: Literal["program", "calls", "tests", "command"],
        job: dict[str, Any],
        limits: Limits,
        *,
        stdin: bytes = b"",
        writes_work: bool = False,
        keeps_output: bool = True,
        channel: socket.socket | None = None,
        peer: socket.socket | None = None,
    ) -> Iterator[Run]:
        """Start a run; it is stopped, if it has not ended, when the block is left.

        `calls` and `tests` talk over a channel: a new one whose other end is the run's, or `channel`; `peer` is one more
        socket for `tests`. Without `keeps_output` standard output goes to /dev/null. Raises `SandboxError`.
        """
        assert self._server is not None
        with contextlib.ExitStack() as stack:
            job_file = _anonymous_file(stack, json.dumps(job).encode())
            input_file = _anonymous_file(stack, stdin)
            output = _anonymous_file(stack) if keeps_output else stack.enter_context(_null())
            errors = _anonymous_file(stack)
            fds, ours = [job_file, input_file, output, errors], None
            if channel is None and role in ("calls", "tests"):
                ours, channel = socket.socketpair()
                stack.enter_context(ours)
                stack.enter_context(channel)
            if channel is not None:
                fds.append(channel.fileno())
            if peer is not None:
                fds.append(peer.fileno())
            work = "rw" if writes_work else "ro"
            self._server.ask({"do": "run", "role": role, "limits": limits.to_dict(), "work": work}, fds)
            for given in (channel, peer):
                if given is not None:
                    given.close()
            run = Run(self._server, limits, output, errors, ours)
            yield run
            run.stop()


@contextlib.contextmanager
def _null() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _anonymous_file(stack: contextlib.ExitStack, content: bytes = b"") -> int:
    """A file in memory that has no name, with this content and read from its start."""
    fd = os.memfd_create("run", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.fchmod(fd, 0o666)  # so that /dev/stdin can be opened by the sandbox's user
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
