"""What a sandboxed run may use, and what is reported of it when it has ended."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Killed = Literal["time", "cpu", "memory", "files", "processes", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one run: seconds, MiB (memory of all its processes together, each file, all of /tmp) and counts."""

    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_mb: int = 1024
    limits_address_space: bool = True
    file_mb: int = 16
    tmp_mb: int = 64
    num_files: int = 1024
    num_open_files: int = 128
    num_processes: int = 64
    stack_mb: int = 64

    def to_dict(self) -> dict[str, Any]:
        """As plain values, to send it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run ended: exit status as `subprocess` gives it (-9 for SIGKILL), and what it used.

    `killed` says which limit it was stopped for; `setup_error` that it never started, and why.
    """

    exit_status: int
    wall_s: float
    cpu_s: float
    max_memory_mb: float
    killed: Killed | None = None
    setup_error: str | None = None
