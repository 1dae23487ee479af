"""What a forked child of the fork server becomes: a Python program, a server of calls, a runner of tests, a command."""

from __future__ import annotations

import atexit
import io
import json
import os
import socket
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from verifiers.code import calls, testing
from verifiers.code.wire import Channel

SOURCE_NAME = "solution.py"


def prepare(request: dict[str, Any], job_fd: int, private: str) -> Callable[[], None]:
    """Read the job and return what carries it out; all that may fail for our own fault happens here."""
    with os.fdopen(job_fd, "rb") as stream:
        stream.seek(0)
        job = json.loads(stream.read())
    role = request["role"]
    if role == "command":
        return _command(job, private)
    _fresh_streams()
    if role == "program":
        return lambda: _program(job["source"])
    channel = Channel(socket.socket(fileno=3))
    if role == "calls":
        return lambda: calls.serve(channel, job)
    peer = Channel(socket.socket(fileno=4))
    return lambda: testing.run(channel, peer, job)


def _fresh_streams() -> None:
    """Standard streams over the descriptors that this run was given."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        errors = "backslashreplace" if name == "stderr" else "surrogateescape"
        raw = open(number, mode + "b", closefd=False)  # noqa: SIM115  (it lives as long as the process)
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors=errors, line_buffering=name == "stderr")
        setattr(stream, "mode", mode)  # noqa: B010  (as in a fresh interpreter)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def new_module(name: str) -> types.ModuleType:
    """An empty module of that name, known to `sys.modules`."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = __builtins__
    sys.modules[name] = module
    return module


def _program(source: str) -> None:
    """Run a whole program as `python solution.py` would, up to its exit status; never returns."""
    module = new_module("__main__")
    module.__dict__["__file__"] = SOURCE_NAME
    sys.setrecursionlimit(sys.getrecursionlimit() + 8)  # the frames below it
    sys.set_int_max_str_digits(0)  # a right answer of 5,000 digits is right; the clock is the limit
    status = 0
    try:
        exec(compile(source, SOURCE_NAME, "exec", dont_inherit=True), module.__dict__)
    except BaseException as exc:  # noqa: BLE001  (shown as the interpreter shows it)
        status = _exit_status(exc)
    _finish(module, status)


def _exit_status(exc: BaseException) -> int:
    """The exit status of a program that ended by an exception, which is printed."""
    if not isinstance(exc, SystemExit):
        sys.excepthook(type(exc), exc, exc.__traceback__)
        return 1
    code = exc.code
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _finish(module: types.ModuleType, status: int) -> None:
    """End as the interpreter would (threads, exit handlers, finalizers, output), but without taking it all apart.

    Taking a forked interpreter apart would copy most of its memory and cost more than a small program does.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]  (waits for the threads that are not daemons)
        atexit._run_exitfuncs()
        module.__dict__.clear()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as exc:  # noqa: BLE001  (the output may be incomplete)
        status = status or (_exit_status(exc) if isinstance(exc, SystemExit) else 120)
    os._exit(status)


def _command(job: dict[str, Any], private: str) -> Callable[[], None]:
    for name, text in job["files"].items():
        with open(f"{private}/program/{name}", "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(text)
    arguments = [argument.replace("{work}", f"{private}/program") for argument in job["arguments"]]
    environment = {**job["environment"], "HOME": f"{private}/tmp", "TMPDIR": f"{private}/tmp"}

    def run() -> None:
        try:
            os.execve(arguments[0], arguments, environment)
        except OSError as exc:
            os.write(2, f"{arguments[0]}: {exc.strerror}\n".encode())
            os._exit(127)

    return run
