"""Processes that die in the middle of what they do to files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def killed_after(survives: int, action: Callable[[], Any]) -> bool:
    """Run the action in a fork that SIGKILL ends at its next change of a file after `survives` of them.

    False if it came to its end before; a change is a write, a flush, a truncation, a renaming, a removal or a new folder.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _die_after(survives)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "the action failed"
    return os.WIFSIGNALED(status)


def _die_after(survives: int) -> None:
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if count == survives:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*arguments, **named)

        return call

    for name in ("replace", "fsync", "unlink", "mkdir", "rmdir", "ftruncate", "write"):
        setattr(os, name, counted(getattr(os, name)))
