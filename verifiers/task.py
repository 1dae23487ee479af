"""`PlainTask`: the least that a verifier needs to know, for those who have no task records of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PlainTask:
    """One question: its gold answer, and optionally the prompt, more columns, and the name of its verifier."""

    answer: Any
    prompt: Any = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    verifier: str = ""
