"""The fork server: a warm Python inside the sandbox that forks one process per run, waits for it and leaves nobody behind.

Started with `BOOT` as `python -c`, so that nothing of this package but the sandbox's own modules is imported. It is
told what to run by one message on its control socket (a JSON header and file descriptors), and answers with how it
ended. The forked child gives up its rights, closes everything it was not given, and only then reads its job.
"""

from __future__ import annotations

import bisect  # noqa: F401  (what solutions import most is warm, here and below)
import cmath  # noqa: F401
import contextlib
import copy  # noqa: F401
import decimal  # noqa: F401
import fractions  # noqa: F401
import functools  # noqa: F401
import gc
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math
import operator  # noqa: F401
import os
import random  # noqa: F401
import re  # noqa: F401
import resource
import select
import signal
import socket
import statistics  # noqa: F401
import string  # noqa: F401
import sys
import threading  # noqa: F401
import time
import typing  # noqa: F401
from collections.abc import Callable
from typing import Any

from verifiers.code import jail, kernel, landlock, limits_only, roles
from verifiers.code.limits import Ending, Limits
from verifiers.code.seccomp import Filter

BOOT = """
import sys, types
home, *arguments = sys.argv[1:]
for name, path in (("verifiers", home), ("verifiers.code", home + "/code")):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [path]
from verifiers.code.zygote import main
job = main(arguments)
del name, path, module, main, home, arguments
job()
"""
MAX_HEADER_BYTES = 2**16
MAX_FDS = 8
STOP = b"stop"
_CHANNEL_FD = 3
_FIRST_LOOK_S, _LOOK_EVERY_S = 0.02, 0.05
_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")


def main(arguments: list[str]) -> Callable[[], None]:
    """Enter the sandbox and serve; returns only in a forked child, with what it is to run."""
    fd, parent_pid, setup = int(arguments[0]), int(arguments[1]), json.loads(arguments[2])
    control = socket.socket(fileno=fd)
    if setup["kind"] == "limits-only":
        limits_only.detach()
    else:
        kernel.die_with_parent(parent_pid)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o022)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the only signal with a handler, so the only one that reaches process 1
    try:
        server = Server(control, setup)
    except OSError as exc:
        control.send(json.dumps({"error": str(exc)}).encode())
        os._exit(1)
    control.send(json.dumps({"facts": server.facts}).encode())
    return server.serve()


class Server:
    """The control socket's other end, and what holds for every run."""

    def __init__(self, control: socket.socket, setup: dict[str, Any]) -> None:
        self._control = control
        self._kind: str = setup["kind"]
        self._private: str | None = None
        self._fence: limits_only.Fence | None = None
        self._shared_tmp = "/tmp" if self._kind == "bubblewrap" else None  # where runs have no /tmp of their own
        if self._kind == "namespaces":
            jail.enter(jail.Layout(tuple(map(tuple, setup["binds"])), tuple(map(tuple, setup["links"]))))
        elif self._kind == "limits-only":
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
            self._private = setup["directory"]
            self._shared_tmp = f"{self._private}/tmp"
            self._fence = limits_only.Fence(setup["directory"], setup["readable"])
        self._is_init = os.getpid() == 1
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # programs of the same user must not read this process
        if self._kind != "limits-only" and not self._is_init:
            raise OSError(1, "the fork server is not process 1 of its namespace")
        self._own_pid = os.getpid()
        self._has_proc = os.path.exists("/proc/self/stat")
        self._has_work = False
        try:
            self._filter: Filter | None = Filter()
        except OSError:
            self._filter = None
        self._prepare_python(setup["python_path"])
        self.facts = {
            "kind": self._kind,
            "seccomp": self._filter is not None,
            "landlock": landlock.version(),
            "proc": self._has_proc,
            "uid": os.getuid(),
            "pid": os.getpid(),
        }

    def _prepare_python(self, path: list[str]) -> None:
        """Make this interpreter what a program expects of a fresh one, as far as that can be done before the fork."""
        import site

        site.setquit()
        site.sethelper()
        site.setcopyright()
        sys.path[:] = [entry for entry in sys.path if os.path.exists(entry) or entry.endswith(".zip")] + path
        sys.argv[:] = ["solution.py"]
        gc.collect()
        gc.freeze()

    def serve(self) -> Callable[[], None]:
        """Do what is asked until the control socket closes; returns in each forked child with its job."""
        while True:
            header, fds, _, _ = socket.recv_fds(self._control, MAX_HEADER_BYTES, MAX_FDS)
            if not header:
                self._end()
            if header == STOP:  # it crossed the end of the run that it was for
                continue
            request = json.loads(header)
            if request["do"] == "run":
                job = self._run(request, fds)
                if job is not None:
                    return job
                continue
            try:
                self._set_work(request)
                answer: dict[str, Any] = {}
            except OSError as exc:
                answer = {"error": str(exc)}
            self._control.send(json.dumps(answer).encode())

    def _end(self) -> None:
        if self._private is not None:
            self._kill_everybody()
            limits_only.delete(self._private)
        os._exit(0)

    def _set_work(self, request: dict[str, Any]) -> None:
        """Make /program anew, or throw it away."""
        if self._kind == "namespaces":
            if self._has_work:
                jail.unmount_work()
                self._has_work = False
            if request["do"] == "make work":
                jail.mount_work(request["size_mb"])
                self._has_work = True
            return
        work = f"{self._private or ''}/program"
        os.makedirs(work, exist_ok=True)
        limits_only.empty_directory(work)
        self._has_work = request["do"] == "make work"

    # One run, on the server's side.

    def _run(self, request: dict[str, Any], fds: list[int]) -> Callable[[], None] | None:
        limits = Limits(**request["limits"])
        started, starts = os.pipe()
        pid = os.fork()
        if pid == 0:
            return self._become(request, limits, fds, starts)
        os.close(starts)
        for fd in fds:
            os.close(fd)
        with os.fdopen(started, "rb") as stream:
            setup_error = stream.read().decode() or None
        shared_pages = 0 if request["role"] == "command" else _own_pages(self._own_pid)
        ending = self._watch(pid, limits, shared_pages, setup_error)
        self._control.send(json.dumps(vars(ending)).encode())
        return None

    def _watch(self, pid: int, limits: Limits, shared_pages: int, setup_error: str | None) -> Ending:
        """Wait for the run's first process or stop it at a limit, then end all others."""
        start = time.monotonic()
        pidfd = os.pidfd_open(pid)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(self._control, select.POLLIN)
        killed, peak, look = None, 0.0, _FIRST_LOOK_S
        while killed is None:
            left = start + limits.wall_s - time.monotonic()
            if left <= 0:
                killed = "time"
                break
            events = poller.poll(min(left, look) * 1000)
            if any(fd == pidfd for fd, _ in events):
                break
            if events:  # the parent wants it stopped, or is gone
                killed = "cancelled"
                if not self._control.recv(MAX_HEADER_BYTES):
                    self._kill_everybody()
                    self._end()
            look = _LOOK_EVERY_S
            num_processes, memory_mb, cpu_s = self._usage(shared_pages)
            peak = max(peak, memory_mb)
            if memory_mb > limits.memory_mb * 1.1 + 16:
                killed = "memory"
            elif cpu_s > limits.cpu_s:
                killed = "cpu"
            elif num_processes > limits.num_processes + 1:  # root is above the kernel's own limit
                killed = "processes"
            elif self._shared_tmp is not None and limits_only.is_full(
                self._shared_tmp, limits.num_files, limits.tmp_mb
            ):
                killed = "files"
        wall_s = time.monotonic() - start
        os.close(pidfd)
        if killed is not None:
            os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        used = self._kill_everybody() + usage.ru_utime + usage.ru_stime
        if self._shared_tmp is not None:
            limits_only.empty_directory(self._shared_tmp)
        if self._kind == "bubblewrap" and not self._has_work:
            limits_only.empty_directory("/program")
        return Ending(
            exit_status=os.waitstatus_to_exitcode(status),
            wall_s=wall_s,
            cpu_s=used,
            max_memory_mb=max(peak, usage.ru_maxrss / 1024),
            killed=killed,
            setup_error=setup_error,
        )

    def _kill_everybody(self) -> float:
        """Kill and reap all that the run left; the CPU seconds they used."""
        used = 0.0
        while True:
            if self._is_init:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)  # in this namespace: all but this process itself
            else:
                for pid in self._members():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            try:
                while True:
                    pid, _, usage = os.wait4(-1, 0 if self._is_init else os.WNOHANG)
                    used += usage.ru_utime + usage.ru_stime
                    if pid == 0:
                        time.sleep(0.001)
                        break
            except ChildProcessError:
                return used

    def _members(self) -> list[int]:
        """The processes of the run: all others in the namespace, else all descendants (orphans come to this one)."""
        if not self._has_proc:
            return []
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        if self._is_init:
            return [pid for pid in pids if pid != 1]
        parents = {pid: stat[1] for pid in pids if (stat := _stat(pid))}
        related, grown = {self._own_pid}, True
        while grown:
            children = {pid for pid, parent in parents.items() if int(parent) in related}
            grown = not children <= related
            related |= children
        return sorted(related - {self._own_pid})

    def _usage(self, shared_pages: int) -> tuple[int, float, float]:
        """How many processes of the run are alive; MiB in use and CPU seconds used by them and those they waited for.

        Of each process `shared_pages` are taken off: what a forked Python has in common with this one.
        """
        pages, ticks = 0, 0
        members = self._members()
        for pid in members:
            if stat := _stat(pid):
                ticks += sum(map(int, stat[11:15]))
                pages += max(0, _own_pages(pid) - shared_pages)
        return len(members), pages * _PAGE / 2**20, ticks / _TICKS

    # One run, on the child's side: no rights, nothing open but what it was given.

    def _become(self, request: dict[str, Any], limits: Limits, fds: list[int], starts: int) -> Callable[[], None]:
        try:
            self._control.close()
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._kind == "namespaces":
                may_write = request["work"] == "rw"
                jail.make_private(limits.tmp_mb, limits.num_files, self._has_work, may_write)
            elif self._private is not None:
                os.chdir(f"{self._private}/tmp")
            else:
                os.chdir("/tmp")
            starts, job_fd = _place_fds(fds, starts)
            _set_limits(limits, self._fence.num_others if self._fence else 0)
            if self._fence is not None:
                self._fence.enter(request["work"] == "rw")
            else:
                kernel.drop_capabilities()
                if self._kind == "bubblewrap" and landlock.version():
                    landlock.restrict(["/"], ["/tmp", "/dev", *(["/program"] if request["work"] == "rw" else [])])
            if self._filter is not None:
                self._filter.install()
            job = roles.prepare(request, job_fd, self._private or "")
        except BaseException as exc:  # noqa: BLE001  (told to the server; this process must not go on)
            os.write(starts, f"{type(exc).__name__}: {exc}".encode()[:2000] or b"?")
            os._exit(1)
        os.close(starts)
        return job


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on, or None if there is none any more."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].decode().split()
    except OSError:
        return None


def _own_pages(pid: int) -> int:
    """The pages of a process that are no file's."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as stream:
            fields = stream.read().split()
        return int(fields[1]) - int(fields[2])
    except (OSError, IndexError):
        return 0


def _place_fds(fds: list[int], starts: int) -> tuple[int, int]:
    """Put stdin, stdout, stderr at 0 to 2 and the channel, if any, at 3; close all else but `starts` and the job."""
    job, *given = fds
    high = 100
    kept = [os.dup2(fd, high + place, inheritable=False) for place, fd in enumerate((starts, job, *given))]
    for place, fd in enumerate(kept[2:]):
        os.dup2(fd, place, inheritable=True)
    num_given = len(given)
    os.closerange(num_given, high)
    os.closerange(high + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return kept[0], kept[1]


def _set_limits(limits: Limits, num_others: int) -> None:
    mib = 2**20
    memory = limits.memory_mb * mib
    wanted = {
        resource.RLIMIT_CPU: math.ceil(limits.cpu_s) + 1,
        resource.RLIMIT_DATA: memory,
        resource.RLIMIT_FSIZE: limits.file_mb * mib,
        resource.RLIMIT_NOFILE: limits.num_open_files,
        resource.RLIMIT_NPROC: limits.num_processes + num_others,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if limits.limits_address_space:
        wanted[resource.RLIMIT_AS] = memory
    for which, value in wanted.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    # Programs may ask for a larger stack: it counts as memory.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = limits.stack_mb * mib
    resource.setrlimit(resource.RLIMIT_STACK, (stack if hard == resource.RLIM_INFINITY else min(stack, hard), hard))
