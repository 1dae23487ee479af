"""Ending a worker with everything it started, also what left its process group or outlived its own parent."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

MARK = "GROUPZERO_VERIFIER_WORKER"  # environment variable that a worker's descendants inherit
_MAX_PASSES = 50


@dataclass(frozen=True)
class _Process:
    parent: int
    group: int
    session: int
    start: int


def kill_with_descendants(pid: int, mark: str) -> None:
    """Kill the group of `pid`, and on Linux its descendants and every process whose environment holds `mark`.

    All are stopped before the first is killed, so that none can start another on the way. What both left the group and
    cleared its environment is found only while its ancestors live.
    """
    _signal_group(pid, signal.SIGSTOP)
    stopped: set[int] = set()
    if sys.platform == "linux":
        for _ in range(_MAX_PASSES):  # each pass finds what was started during the one before
            found = _related(pid, mark) - stopped
            if not found:
                break
            for each in found:
                _signal(each, signal.SIGSTOP)
            stopped |= found
    for each in stopped:
        _signal(each, signal.SIGKILL)
    _signal_group(pid, signal.SIGKILL)


def _related(pid: int, mark: str) -> set[int]:
    """All processes that belong to the worker `pid`, itself left out."""
    table = _process_table()
    oldest = table[pid].start if pid in table else 0
    related = {pid}
    grown = True
    while grown:
        children = {each for each, process in table.items() if process.parent in related}
        grown = not children <= related
        related |= children
    for each, process in table.items():
        may_be = each not in related and process.start >= oldest
        if may_be and (pid in (process.group, process.session) or _has_mark(each, mark)):
            related.add(each)
    return related - {pid}


def _process_table() -> dict[int, _Process]:
    """Every process that is not a zombie, by pid."""
    table = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if fields and fields[0] != "Z":
            table[int(entry)] = _Process(int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))
    return table


def _has_mark(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it ended, or is another user's
        return False


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
