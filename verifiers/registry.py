"""Verifiers by name: built-in ones, and plug-ins written `"package.module:function"`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from types import ModuleType
from typing import Any, TypeVar, get_args

from verifiers.verdict import Status, TaskLike, Verdict, Verifier

_STATUSES = get_args(Status)
_REGISTERED: dict[str, Verifier] = {}
_V = TypeVar("_V", bound=Verifier)


class VerifierLookupError(ValueError):
    """No usable verifier under this name; the message names the nearest one, or the cause."""


def register(name: str) -> Callable[[_V], _V]:
    """Make the decorated verifier known under `name`; raises ValueError if another one has it."""
    if not name or ":" in name:
        raise ValueError(f"verifier name {name!r} must be non-empty and without ':', which marks a plug-in path")

    def add(verifier: _V) -> _V:
        if _REGISTERED.get(name, verifier) is not verifier:
            raise ValueError(f"a verifier named {name!r} is registered already")
        _REGISTERED[name] = verifier
        return verifier

    return add


def known_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTERED)


def resolve(name: str) -> Verifier:
    """The verifier called `name`, or the plug-in at `"package.module:function"`.

    A plug-in may return a Verdict, a bool (1 or 0) or a number (kept as score, `correct` from 1 up); whatever else it
    returns becomes a verdict `error`. Raises `VerifierLookupError`.
    """
    if ":" in name:
        return _checked(name, _import_plugin(name))
    if name in _REGISTERED:
        return _REGISTERED[name]
    raise VerifierLookupError(
        f"unknown verifier {name!r}{_nearest(name, _REGISTERED)}; known: {', '.join(known_names())}; "
        'a plug-in is written "package.module:function"'
    )


def _nearest(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _import_plugin(path: str) -> Callable[[str, TaskLike], Any]:
    module_name, _, attribute = path.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise VerifierLookupError(f'verifier {path!r} is not of the form "package.module:function"')
    if module_name == "__main__":
        raise VerifierLookupError(f"verifier {path!r}: move it out of '__main__' into a module of its own")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as exc:
        raise VerifierLookupError(
            f"verifier {path!r}: importing {module_name!r} failed with {type(exc).__name__}: {exc}"
        ) from exc
    return _usable(path, module, attribute)


def _usable(path: str, module: ModuleType, attribute: str) -> Callable[[str, TaskLike], Any]:
    found = getattr(module, attribute, None)
    if found is None:
        raise VerifierLookupError(
            f"verifier {path!r}: module {module.__name__!r} has no {attribute!r}{_nearest(attribute, vars(module))}"
        )
    if not callable(found):
        raise VerifierLookupError(f"verifier {path!r} is a {type(found).__name__}, not a function")
    if inspect.iscoroutinefunction(found):
        raise VerifierLookupError(f"verifier {path!r} is async; a verifier is a plain function")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # some callables written in C have none to look at
        return found
    try:
        signature.bind("completion", None)
    except TypeError as exc:
        raise VerifierLookupError(f"verifier {path!r} can't be called as f(completion, task): {exc}") from exc
    return found


def _checked(name: str, function: Callable[[str, TaskLike], Any]) -> Verifier:
    def verifier(completion: str, task: TaskLike) -> Verdict:
        return as_verdict(name, function(completion, task))

    return verifier


def as_verdict(name: str, result: Any) -> Verdict:
    """What the plug-in `name` returned, as a Verdict of plain values; status `error` where it is none."""
    if isinstance(result, Verdict):
        return _plain(name, result)
    if getattr(result, "shape", None) == () and hasattr(result, "item"):  # a NumPy scalar or a tensor of one number
        result = result.item()
    if not isinstance(result, Real):
        return _broken(f"verifier {name!r} returned {type(result).__name__}, not a Verdict, bool or float")
    score = _finite(result)
    if score is None:
        return _broken(f"verifier {name!r} returned a score that is not finite")
    status: Status = "correct" if score >= 1 else "wrong"
    return Verdict(score=score, status=status, reason=f"{name} returned {score:g}")


def _plain(name: str, verdict: Verdict) -> Verdict:
    score = _finite(verdict.score)
    if score is None:
        return _broken(f"verifier {name!r} returned a Verdict whose score {verdict.score!r:.80} is not a finite number")
    if verdict.status not in _STATUSES:
        return _broken(f"verifier {name!r} returned a Verdict with status {verdict.status!r:.80}")
    if not isinstance(verdict.reason, str) or not isinstance(verdict.extracted, str | None):
        return _broken(f"verifier {name!r} returned a Verdict whose reason or extracted is not text")
    try:
        parts = {str(key): _finite(value) for key, value in dict(verdict.parts).items()}
    except (TypeError, ValueError):
        parts = {"parts": None}
    clean = {key: value for key, value in parts.items() if value is not None}
    if len(clean) < len(parts):
        return _broken(f"verifier {name!r} returned a Verdict whose parts are not all finite numbers by name")
    return Verdict(score=score, status=verdict.status, reason=verdict.reason, extracted=verdict.extracted, parts=clean)


def _finite(value: Any) -> float | None:
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _broken(reason: str) -> Verdict:
    return Verdict(score=0.0, status="error", reason=reason)
