"""Inside the sandbox, the program's side of function calls: it answers with plain values and judges nothing.

The tests are elsewhere (`verifiers.code.modes` compares in the verifier's process, `verifiers.code.testing` asserts in
another sandbox), so that all a program can gain by writing to the channel itself is to state values it computed.
"""

from __future__ import annotations

import builtins
import os
import sys
import types
from typing import Any

from verifiers.code import remote, wire

MODULE_NAME = "solution"
# What online judges import on a solution's behalf; a name that the program defines itself replaces it.
_PRELUDE_MODULES = (
    "bisect",
    "collections",
    "copy",
    "functools",
    "heapq",
    "itertools",
    "math",
    "random",
    "re",
    "string",
)
_PRELUDE_STARS = ("typing", "collections", "functools", "heapq", "itertools", "bisect", "math")


def serve(channel: wire.Channel, job: dict[str, Any]) -> None:
    """Run the program, say whether that went well, then answer requests until the other side closes."""
    module = types.ModuleType(MODULE_NAME)
    module.__dict__["__builtins__"] = builtins
    sys.modules[MODULE_NAME] = module
    sys.set_int_max_str_digits(0)
    if job.get("prelude"):
        _add_prelude(module.__dict__)
    given = frozenset(module.__dict__)
    try:
        exec(compile(job["source"], "solution.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as exc:  # noqa: BLE001  (told to the other side; SystemExit included)
        channel.send({"failed": remote.describe(exc)})
        return _leave()
    channel.send({"ready": True})
    if job.get("entry"):
        _serve_calls(channel, module, job["entry"])
    else:
        remote.Endpoint(channel, remote.ProgramSide(module, given)).serve()
    return _leave()


def _leave() -> None:
    """End at once: what a program left running, registered or locked must not keep it here."""
    os._exit(0)


def _add_prelude(namespace: dict[str, Any]) -> None:
    for name in _PRELUDE_STARS:
        module = __import__(name)
        public = getattr(module, "__all__", None) or [key for key in vars(module) if not key.startswith("_")]
        namespace.update({key: getattr(module, key) for key in public if hasattr(module, key)})
    namespace.update({name: __import__(name) for name in _PRELUDE_MODULES})
    namespace["pow"] = pow  # math.pow would hide it


def _find(module: types.ModuleType, entry: str) -> Any:
    """The function to call: a method of `class Solution` (a new object each time), a dotted name, or a function."""
    solution = module.__dict__.get("Solution")
    if "." not in entry and isinstance(solution, type) and hasattr(solution, entry):
        return getattr(solution(), entry)
    head, *attributes = entry.split(".")
    if head not in module.__dict__:
        raise NameError(f"the program defines no {entry!r}")
    target = module.__dict__[head]
    for attribute in attributes:
        target = getattr(target() if isinstance(target, type) else target, attribute)
    return target


def _serve_calls(channel: wire.Channel, module: types.ModuleType, entry: str) -> None:
    """Answer each list (or object) of arguments with the value returned, or with what was raised."""
    encode, send = wire.encode, channel.send
    while True:
        try:
            arguments = wire.decode(channel.receive())
        except wire.ClosedError:
            return
        try:
            function = _find(module, entry)
            value = function(**arguments) if type(arguments) is dict else function(*arguments)
            answer = {"value": encode(value)}
        except wire.NotPlainError as exc:
            answer = {"not plain": str(exc)}
        except BaseException as exc:  # noqa: BLE001  (told to the other side)
            answer = {"failed": remote.describe(exc)}
        send(answer)
