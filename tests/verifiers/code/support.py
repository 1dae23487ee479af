"""What several tests of the sandbox use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from verifiers.code.sandbox import SandboxError, available


@dataclass(frozen=True)
class PlainTask:
    answer: Any
    prompt: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def need_namespaces() -> None:
    """Skip the test where the kernel refuses namespaces and there is no bubblewrap."""
    try:
        available("auto")
    except SandboxError as exc:
        pytest.skip(f"this machine has no isolation for programs: {exc}")


def sums_to_argument(test, value):
    """A checker, named by its path."""
    return sum(value) == test["args"][0]
