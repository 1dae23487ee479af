"""Calling verifiers: async ones are awaited, and whatever they return becomes a Verdict of plain values."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Awaitable, Callable
from numbers import Real
from typing import Any, get_args

from verifiers.verdict import GoldAudit, Status, TaskLike, Verdict

STATUSES = get_args(Status)
_local = threading.local()


def judge(name: str, verifier: Callable[[str, TaskLike], Any], completion: str, task: TaskLike) -> Verdict:
    """The verdict of `verifier`, awaited if it is async and checked by `as_verdict`; what it raises passes through."""
    result = verifier(completion, task)
    if type(result) is not Verdict and inspect.isawaitable(result):
        result = run_async(result)
    return as_verdict(name, result)


def run_async(awaitable: Awaitable[Any]) -> Any:
    """The result of `awaitable`, on this thread's own event loop; where a loop runs already, on one in another thread."""
    import asyncio  # here, and not above: most verifiers are plain functions, and it is slow to import
    from concurrent.futures import ThreadPoolExecutor

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        if not hasattr(_local, "runner"):  # one loop for all samples, so that a client's connections live on
            _local.runner = asyncio.Runner()
        return _local.runner.run(_wait(awaitable))
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(_wait(awaitable))).result()


async def _wait(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def prepare(verifier: Any, task: TaskLike) -> GoldAudit | None:
    """What `verifier` says of the task's gold answer; None if it has no `prepare` or nothing to say.

    Raises TypeError if it returns something else, and what it raises itself.
    """
    audit = getattr(verifier, "prepare", None)
    if audit is None:
        return None
    result = audit(task)
    if inspect.isawaitable(result):
        result = run_async(result)
    if not isinstance(result, GoldAudit | None):
        raise TypeError(f"prepare of {verifier!r:.80} returned {type(result).__name__}, not a GoldAudit or None")
    return result


def timeout_of(verifier: Any, task: TaskLike) -> float:
    """The seconds that `verifier` asks for on this task: its `timeout_for(task)` or `timeout_s`; 0 without a wish."""
    timeout_for = getattr(verifier, "timeout_for", None)
    wish = getattr(verifier, "timeout_s", None) if timeout_for is None else timeout_for(task)
    return float(wish) if isinstance(wish, Real) and math.isfinite(wish) else 0.0


def as_verdict(name: str, result: Any) -> Verdict:
    """What the verifier `name` returned, as a Verdict of plain values; status `error` where it is none.

    A bool is 1 or 0, a number is kept as score and is `correct` from 1 up.
    """
    if isinstance(result, Verdict):
        return _plain(name, result)
    if getattr(result, "shape", None) == () and hasattr(result, "item"):  # a NumPy scalar or a tensor of one number
        result = result.item()
    if not isinstance(result, Real):
        return broken(f"verifier {name!r} returned {type(result).__name__}, not a Verdict, bool or float")
    score = _finite(result)
    if score is None:
        return broken(f"verifier {name!r} returned a score that is not finite")
    status: Status = "correct" if score >= 1 else "wrong"
    return Verdict(score=score, status=status, reason=f"{name} returned {score:g}")


def _plain(name: str, verdict: Verdict) -> Verdict:
    score = _finite(verdict.score)
    if score is None:
        return broken(f"verifier {name!r} returned a Verdict whose score {verdict.score!r:.80} is not a finite number")
    if verdict.status not in STATUSES:
        return broken(f"verifier {name!r} returned a Verdict with status {verdict.status!r:.80}")
    if not isinstance(verdict.reason, str) or not isinstance(verdict.extracted, str | None):
        return broken(f"verifier {name!r} returned a Verdict whose reason or extracted is not text")
    try:
        parts = {str(key): _finite(value) for key, value in dict(verdict.parts).items()}
    except (TypeError, ValueError):
        parts = {"parts": None}
    clean = {key: value for key, value in parts.items() if value is not None}
    if len(clean) < len(parts):
        return broken(f"verifier {name!r} returned a Verdict whose parts are not all finite numbers by name")
    return Verdict(score=score, status=verdict.status, reason=verdict.reason, extracted=verdict.extracted, parts=clean)


def _finite(value: Any) -> float | None:
    if type(value) is not float:
        if not isinstance(value, Real):
            return None
        try:
            value = float(value)
        except OverflowError:
            return None
    return value if math.isfinite(value) else None


def broken(reason: str) -> Verdict:
    """The verdict of a verifier that failed: `error`, score 0."""
    return Verdict(score=0.0, status="error", reason=reason)
