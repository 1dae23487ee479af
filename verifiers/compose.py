"""Several verifiers as one: a weighted sum, all together, the first that can tell, or the one that the task names.

A component is a verifier, a name (`"math"`, `"package.module:function"`), or, as a config says it, a mapping
`{verifier = "math", options = {...}, weight = 1.0}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from verifiers.calling import broken, judge, prepare, timeout_of
from verifiers.registry import VerifierLookupError, known_names, nearest, resolve
from verifiers.verdict import GoldAudit, GoldStatus, TaskLike, Verdict, Verifier

FAILURES = ("error", "timeout")
_COMPONENT_KEYS = ("verifier", "options", "weight")
# From the audit that rules a task out to the one that lets it pass.
_WORST_FIRST: tuple[GoldStatus, ...] = ("missing", "unparsable", "embedded_number", "ambiguous", "ok")


def weighted(components: Mapping[str, tuple[Any, float]]) -> Weighted:
    """`Weighted` of `{part name: (verifier or name, weight)}`."""
    return Weighted(components)


def all_of(components: Mapping[str, Any]) -> AllOf:
    """`AllOf` of `{part name: verifier or name}`."""
    return AllOf(components)


def first_of(components: Mapping[str, Any]) -> FirstOf:
    """`FirstOf` of `{part name: verifier or name}`."""
    return FirstOf(components)


def by_task(verifiers: Mapping[str, Any] | Sequence[str] = (), default: str | None = None) -> ByTask:
    """`ByTask` of `{name in the task: verifier or name}`."""
    return ByTask(verifiers, default)


@dataclass(frozen=True)
class _Several:
    """What compositions share: resolved components, the worst of their audits, and the sum of their times."""

    components: Mapping[str, Any]
    _parts: dict[str, Verifier] = field(init=False, repr=False, compare=False)
    _weights: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.components, Mapping) or not self.components:
            raise ValueError(f"a {type(self).__name__} verifier needs at least one component, as {{name: verifier}}")
        pairs = {name: _component(name, value) for name, value in self.components.items()}
        object.__setattr__(self, "_parts", {name: verifier for name, (verifier, _) in pairs.items()})
        object.__setattr__(self, "_weights", {name: weight for name, (_, weight) in pairs.items()})

    def prepare(self, task: TaskLike) -> GoldAudit | None:
        """The worst of the components' audits, with the name of the component that says it if there are several."""
        audits = {name: audit for name, part in self._parts.items() if (audit := prepare(part, task)) is not None}
        if not audits:
            return None
        name = min(audits, key=lambda name: _WORST_FIRST.index(audits[name].status))
        worst = audits[name]
        reason = worst.reason if len(self._parts) == 1 else f"{name}: {worst.reason}"
        return GoldAudit(status=worst.status, reason=reason, parsed=worst.parsed)

    def timeout_for(self, task: TaskLike) -> float:
        """The seconds its components ask for on this task, added up."""
        return sum(timeout_of(part, task) for part in self._parts.values())

    def _judge(self, name: str, completion: str, task: TaskLike) -> Verdict:
        return judge(name, self._parts[name], completion, task)


@dataclass(frozen=True)
class Weighted(_Several):
    """The sum of weight * score over all components.

    Status, reason and extracted answer are those of the first component; `parts` holds every raw score by name, and
    a component's own parts as `name.part`. A component that fails (`error`, `timeout`) makes the whole verdict that
    failure with score 0, so that it is never read as a wrong answer. Raises ValueError without components, or for a
    weight that is not finite.
    """

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        verdicts = {name: self._judge(name, completion, task) for name in self._parts}
        parts = _parts_of(verdicts)
        for name, verdict in verdicts.items():
            if verdict.status in FAILURES:
                return Verdict(score=0.0, status=verdict.status, reason=f"{name}: {verdict.reason}", parts=parts)
        score = sum(weight * verdicts[name].score for name, weight in self._weights.items())
        first = next(iter(verdicts.values()))
        return Verdict(score=score, status=first.status, reason=first.reason, extracted=first.extracted, parts=parts)


@dataclass(frozen=True)
class AllOf(_Several):
    """Correct if every component says so: in order, and the first that does not has the last word.

    The score is the smallest of theirs, and 0 as soon as one is not `correct`, whose status and reason the verdict then
    has; later components are not asked, so put the cheap ones first. The extracted answer is the first that there is.
    """

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        verdicts: dict[str, Verdict] = {}
        for name in self._parts:
            verdicts[name] = verdict = self._judge(name, completion, task)
            if verdict.status != "correct":
                break
        name, last = next(reversed(verdicts.items()))
        extracted = next((v.extracted for v in verdicts.values() if v.extracted is not None), None)
        passed = last.status == "correct"
        return Verdict(
            score=min(v.score for v in verdicts.values()) if passed else 0.0,
            status=last.status,
            reason=f"{', '.join(verdicts)}: all correct" if passed else f"{name}: {last.reason}",
            extracted=extracted,
            parts=_parts_of(verdicts),
        )


@dataclass(frozen=True)
class FirstOf(_Several):
    """The verdict of the first component that can tell, that is, says `correct` or `wrong`.

    A component that cannot read the answer (`unparsable`) or the gold (`error`), or that ran out of time, hands on to the
    next. Where none can tell, an `unparsable` is the verdict before a failure, the earlier before the later. `prepare`
    is content with the best of the audits.
    """

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        verdicts: dict[str, Verdict] = {}
        for name in self._parts:
            verdicts[name] = verdict = self._judge(name, completion, task)
            if verdict.status in ("correct", "wrong"):
                return _named(name, verdict, _parts_of(verdicts))
        unread = (name for name, verdict in verdicts.items() if verdict.status == "unparsable")
        name = next(unread, next(iter(verdicts)))
        return _named(name, verdicts[name], _parts_of(verdicts))

    def prepare(self, task: TaskLike) -> GoldAudit | None:
        """The best of the components' audits; None as soon as one of them has none."""
        audits = [prepare(part, task) for part in self._parts.values()]
        known = [audit for audit in audits if audit is not None]
        if len(known) < len(audits):
            return None
        return max(known, key=lambda audit: _WORST_FIRST.index(audit.status))


@dataclass(frozen=True)
class ByTask:
    """The verifier that the task's own `verifier` field names.

    `verifiers` says which names a task may use: a list of names, or `{name in the task: component}`; without it, every
    built-in and registered one that needs no options. A plug-in path in the data is never imported. A task without a
    name gets `default`; a task with an unknown one is an `error`, and `prepare` says so before anything runs.
    """

    verifiers: Mapping[str, Any] | Sequence[str] = ()
    default: str | None = None
    _allowed: dict[str, Verifier] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = self.verifiers
        if isinstance(named, str) or not isinstance(named, Mapping | Sequence):
            raise ValueError('verifiers is a list of names or {name in the task: {verifier = "...", options = {...}}}')
        components = dict(named) if isinstance(named, Mapping) else {name: name for name in named}
        if "by_task" in components.values():
            raise ValueError("verifiers can't hold by_task itself")
        allowed = {name: _component(name, value)[0] for name, value in components.items()}
        object.__setattr__(self, "_allowed", allowed)
        if self.default is not None:
            self._find(self.default)

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        try:
            name, verifier = self._choose(task)
        except VerifierLookupError as exc:
            return broken(str(exc))
        return judge(name, verifier, completion, task)

    def prepare(self, task: TaskLike) -> GoldAudit | None:
        """The audit of the chosen verifier; `missing` for a task whose verifier is unknown."""
        try:
            _, verifier = self._choose(task)
        except VerifierLookupError as exc:
            return GoldAudit(status="missing", reason=str(exc))
        return prepare(verifier, task)

    def timeout_for(self, task: TaskLike) -> float:
        """The seconds that the chosen verifier asks for."""
        try:
            return timeout_of(self._choose(task)[1], task)
        except VerifierLookupError:
            return 0.0

    def _choose(self, task: TaskLike) -> tuple[str, Verifier]:
        name = getattr(task, "verifier", "") or self.default
        if not name:
            raise VerifierLookupError("the task names no verifier, and by_task has no default")
        if not isinstance(name, str):
            raise VerifierLookupError(f"the task's verifier is a {type(name).__name__}, not a name")
        return name, self._find(name)

    def _find(self, name: str) -> Verifier:
        if name not in self._allowed:
            if self.verifiers or name == "by_task" or name not in known_names():
                allowed = list(self.verifiers) or [known for known in known_names() if known != "by_task"]
                raise VerifierLookupError(
                    f"the task's verifier {name!r:.80} is not among {', '.join(allowed)}{nearest(name, allowed)}"
                )
            self._allowed[name] = resolve(name)
        return self._allowed[name]


def _component(name: str, value: Any) -> tuple[Any, float]:
    """A component as (verifier, weight)."""
    options: Mapping[str, Any] = {}
    weight: Any = 1.0
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in _COMPONENT_KEYS]:
            raise ValueError(f"component {name!r} has {unknown[0]!r}; it may have {', '.join(_COMPONENT_KEYS)}")
        verifier, options, weight = value.get("verifier", name), value.get("options", {}), value.get("weight", 1.0)
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        verifier, weight = value
    else:
        verifier = value
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise ValueError(f"the weight of verifier component {name!r} is {weight}; it must be a finite number")
    if isinstance(verifier, str):
        return resolve(verifier, options), float(weight)
    if not callable(verifier):
        raise ValueError(f"component {name!r} is a {type(verifier).__name__}, not a verifier or the name of one")
    return verifier, float(weight)


def _parts_of(verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """Every score by name, then every component's own parts as `name.part`."""
    parts = {name: verdict.score for name, verdict in verdicts.items()}
    for name, verdict in verdicts.items():
        parts.update({f"{name}.{part}": value for part, value in verdict.parts.items()})
    return parts


def _named(name: str, verdict: Verdict, parts: Mapping[str, float]) -> Verdict:
    return Verdict(
        score=verdict.score,
        status=verdict.status,
        reason=f"{name}: {verdict.reason}",
        extracted=verdict.extracted,
        parts=parts,
    )
