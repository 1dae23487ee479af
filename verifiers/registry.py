"""Verifiers by name: built-in and registered ones, entry points, and plug-ins written `"package.module:attribute"`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from verifiers.calling import as_verdict, judge, prepare, timeout_of
from verifiers.verdict import GoldAudit, TaskLike, Verdict, Verifier

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["ENTRY_POINT_GROUP", "VerifierLookupError", "as_verdict", "known_names", "prepare", "register", "resolve"]

ENTRY_POINT_GROUP = "groupzero.verifiers"
# Where each built-in lives; its module is imported when the name is first asked for.
BUILT_IN: Mapping[str, str] = {
    "all_of": "verifiers.compose:AllOf",
    "by_task": "verifiers.compose:ByTask",
    "choice": "verifiers.choice:Choice",
    "code": "verifiers.code_verifier:CodeVerifier",
    "exact": "verifiers.exact:Exact",
    "first_of": "verifiers.compose:FirstOf",
    "format": "verifiers.format:Format",
    "json_schema": "verifiers.json_schema:JsonSchema",
    "language": "verifiers.language:Language",
    "length": "verifiers.length:Length",
    "math": "verifiers.math_verifier:MathVerifier",
    "numeric": "verifiers.numeric:Numeric",
    "reasoning_gym": "verifiers.adapters:ReasoningGym",
    "repetition": "verifiers.repetition:Repetition",
    "trl": "verifiers.adapters:Trl",
    "verl": "verifiers.adapters:Verl",
    "weighted": "verifiers.compose:Weighted",
}
_REGISTERED: dict[str, Any] = {}
_V = TypeVar("_V")


class VerifierLookupError(ValueError):
    """No usable verifier under this name or with these options; the message names the nearest one, or the cause."""


def register(name: str) -> Callable[[_V], _V]:
    """Make the decorated function (sync or async) or frozen dataclass known under `name`.

    The fields of a dataclass are the verifier's options. Raises ValueError if another verifier has the name, TypeError
    for a class that is not a frozen dataclass.
    """
    if not name or ":" in name:
        raise ValueError(f"verifier name {name!r} must be non-empty and without ':', which marks a plug-in path")

    def add(verifier: _V) -> _V:
        if isinstance(verifier, type) and not _is_frozen_dataclass(verifier):
            raise TypeError(
                f"verifier {name!r}: a class must be a frozen dataclass, so that its options are its fields"
            )
        if _REGISTERED.get(name, verifier) is not verifier or not _may_own(name, verifier):
            raise ValueError(f"a verifier named {name!r} is registered already")
        _REGISTERED[name] = verifier
        return verifier

    return add


def _is_frozen_dataclass(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) and getattr(cls, "__dataclass_params__").frozen  # noqa: B009  (untyped)


def _may_own(name: str, verifier: Any) -> bool:
    """Whether `name` is free, or is the built-in that `verifier` is."""
    module, _, attribute = BUILT_IN.get(name, "").partition(":")
    own = (getattr(verifier, "__module__", None), getattr(verifier, "__qualname__", None))
    return name not in BUILT_IN or own == (module, attribute)


def known_names() -> list[str]:
    """All names that `resolve` takes, plug-in paths left out, sorted."""
    return sorted({*BUILT_IN, *_REGISTERED, *_entry_points()})


@functools.cache
def _entry_points() -> Mapping[str, EntryPoint]:
    from importlib.metadata import entry_points  # slow to import, and seldom asked for

    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def resolve(name: str, options: Mapping[str, Any] | None = None) -> Verifier:
    """The verifier `name`, or the plug-in at `"package.module:attribute"` (function, class or instance), ready to call.

    A class is instantiated with `options`; nothing else takes any. A plug-in may return a Verdict, a bool (1 or 0) or a
    number (kept as score, `correct` from 1 up), may be async, and whatever else it returns becomes a verdict `error`.
    Raises `VerifierLookupError`.
    """
    found = _find(name)
    verifier = _instance(name, found, dict(options or {}))
    return verifier if name in BUILT_IN else PlugIn(name, verifier)


def _find(name: str) -> Any:
    if ":" in name:
        return import_object(name)
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in BUILT_IN:
        return import_object(BUILT_IN[name])
    if name in _entry_points():
        return _load_entry_point(_entry_points()[name])
    raise VerifierLookupError(
        f"unknown verifier {name!r}{nearest(name, known_names())}; known: {', '.join(known_names())}; "
        'a plug-in is written "package.module:function"'
    )


@dataclass(frozen=True)
class PlugIn:
    """Someone else's verifier, behind the same manners as ours: its result is always a Verdict."""

    name: str
    target: Any

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        return judge(self.name, self.target, completion, task)

    def prepare(self, task: TaskLike) -> GoldAudit | None:
        """What the plug-in's own `prepare` says, if it has one."""
        return prepare(self.target, task)

    def timeout_for(self, task: TaskLike) -> float:
        """The seconds the plug-in asks for; 0 without a wish."""
        return timeout_of(self.target, task)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the candidate closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _load_entry_point(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as exc:
        raise VerifierLookupError(
            f"verifier {point.name!r}: loading its entry point {point.value!r} failed with {type(exc).__name__}: {exc}"
        ) from exc


def import_object(path: str) -> Any:
    """What lies at `"package.module:attribute"`; raises `VerifierLookupError`."""
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
    return _attribute(path, module, attribute)


def _attribute(path: str, module: ModuleType, attribute: str) -> Any:
    found = getattr(module, attribute, None)
    if found is None:
        raise VerifierLookupError(
            f"verifier {path!r}: module {module.__name__!r} has no {attribute!r}{nearest(attribute, vars(module))}"
        )
    return found


def _instance(name: str, found: Any, options: dict[str, Any]) -> Any:
    """`found` itself, or an instance of it with `options` if it is a class; checked to be callable as a verifier."""
    if isinstance(found, type):
        verifier = _construct(name, found, options)
    elif options:
        raise VerifierLookupError(
            f"verifier {name!r} is a {type(found).__name__} and takes no options, but was given "
            f"{', '.join(map(repr, options))}; only a verifier class has options"
        )
    else:
        verifier = found
    if not callable(verifier):
        raise VerifierLookupError(f"verifier {name!r} is a {type(verifier).__name__}, not a function")
    try:
        signature = inspect.signature(verifier)
    except (TypeError, ValueError):  # some callables written in C have none to look at
        return verifier
    try:
        signature.bind("completion", None)
    except TypeError as exc:
        raise VerifierLookupError(f"verifier {name!r} can't be called as f(completion, task): {exc}") from exc
    return verifier


def _construct(name: str, cls: type, options: dict[str, Any]) -> Any:
    parameters = _options_of(cls)
    for option in options:
        if parameters is not None and option not in parameters:
            known = ", ".join(parameters) or "it has none"
            raise VerifierLookupError(
                f"verifier {name!r} has no option {option!r}{nearest(option, parameters)}; options: {known}"
            )
    missing = [option for option, required in (parameters or {}).items() if required and option not in options]
    if missing:
        raise VerifierLookupError(f"verifier {name!r} needs the option {missing[0]!r}")
    try:
        return cls(**options)
    except (Exception, SystemExit) as exc:
        cause = str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__}: {exc}"
        raise VerifierLookupError(f"verifier {name!r}: {cause}") from exc


def _options_of(cls: type) -> dict[str, bool] | None:
    """Option names, and whether each must be given; None for a class that takes any keyword or shows no signature."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {parameter.name: parameter.default is parameter.empty for parameter in named}
