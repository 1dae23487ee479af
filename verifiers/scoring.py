"""`score`: verdicts for a list of completions, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verifiers.pool import Progress, ScorePool, VerifierSpec
from verifiers.verdict import TaskLike, Verdict


def score(
    completions: Sequence[str],
    tasks: Sequence[TaskLike],
    verifier: str = "math",
    *,
    options: Mapping[str, Any] | None = None,
    num_workers: int = 2,
    timeout_s: float = 5.0,
    memory_limit_mb: int = 1024,
    progress: Progress | None = None,
) -> list[Verdict]:
    """One verdict per completion, in order, from worker processes that live for this call.

    `verifier` is a known name or `"package.module:attribute"`, `options` its options; the rest is as in `ScorePool`,
    which to use where more than one batch is scored: starting the workers takes some 0.1 s.
    """
    spec = VerifierSpec(verifier, verifier, options=options or {})
    with ScorePool([spec], num_workers, timeout_s, memory_limit_mb) as pool:
        return pool.score(completions, tasks, progress)
