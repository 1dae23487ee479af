"""Text in, verdict out: rule-based verifiers and the pool of killable processes that runs them.

Built-in verifiers are found by name (`resolve`) and imported when first asked for; the pool lives in `verifiers.pool`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from verifiers.registry import VerifierLookupError, known_names, prepare, register, resolve
from verifiers.task import PlainTask
from verifiers.verdict import GoldAudit, GoldStatus, Status, TaskLike, Verdict, Verifier

if TYPE_CHECKING:
    from verifiers.compose import all_of, by_task, first_of, weighted
    from verifiers.scoring import score

__all__ = [
    "GoldAudit",
    "GoldStatus",
    "PlainTask",
    "Status",
    "TaskLike",
    "Verdict",
    "Verifier",
    "VerifierLookupError",
    "all_of",
    "by_task",
    "first_of",
    "known_names",
    "prepare",
    "register",
    "resolve",
    "score",
    "weighted",
]

_ELSEWHERE = {
    "all_of": "verifiers.compose",
    "by_task": "verifiers.compose",
    "first_of": "verifiers.compose",
    "score": "verifiers.scoring",
    "weighted": "verifiers.compose",
}


def __getattr__(name: str) -> Any:
    """What is imported on first use, so that `import verifiers` stays light."""
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'verifiers' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ELSEWHERE[name]), name)
