"""Several verifiers as one, by a weighted sum of their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

from verifiers.verdict import TaskLike, Verdict, Verifier


def weighted(components: Mapping[str, tuple[Verifier, float]]) -> Verifier:
    """One verifier whose score is the sum of weight * score over `components` ({part name: (verifier, weight)}).

    Status, reason and extracted answer are those of the first component; `parts` holds every raw score by name, and
    a component's own parts as `name.part`. A component that fails (`error`, `timeout`) makes the whole verdict that
    failure with score 0, so that it is never read as a wrong answer. Raises ValueError without components, or for a
    weight that is not finite.
    """
    if not components:
        raise ValueError("a weighted verifier needs at least one component")
    for name, (_, weight) in components.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of verifier component {name!r} is {weight}; it must be a finite number")
    fixed = dict(components)

    def combined(completion: str, task: TaskLike) -> Verdict:
        verdicts = {name: verifier(completion, task) for name, (verifier, _) in fixed.items()}
        parts = {name: verdict.score for name, verdict in verdicts.items()}
        score = sum(weight * parts[name] for name, (_, weight) in fixed.items())
        for name, verdict in verdicts.items():
            parts.update({f"{name}.{part}": value for part, value in verdict.parts.items()})
        for name, verdict in verdicts.items():
            if verdict.status in ("error", "timeout"):
                return Verdict(score=0.0, status=verdict.status, reason=f"{name}: {verdict.reason}", parts=parts)
        first = next(iter(verdicts.values()))
        return Verdict(score=score, status=first.status, reason=first.reason, extracted=first.extracted, parts=parts)

    return combined
