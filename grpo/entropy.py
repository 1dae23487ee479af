"""The coefficient of the entropy bonus: constant, or steered towards a target entropy (Skywork-OR1, arXiv 2505.22312)."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class EntropyControl:
    """The state of the entropy bonus: its coefficient, and whether it is applied at present.

    With a `target` (nats per token) the coefficient grows by `step` after every optimizer step whose entropy was at or
    below it and shrinks by `step` after the others, within 0 to `maximum`; it is applied only while the last entropy
    was at or below the target. Without one it stays what it is.
    """

    coef: float
    target: float | None = None
    step: float = 0.0
    maximum: float = float("inf")
    active: bool = True

    @property
    def applied(self) -> float:
        """The coefficient of the next optimizer step's loss."""
        return self.coef if self.active else 0.0

    def after(self, entropy: float) -> EntropyControl:
        """The state after an optimizer step with this mean entropy (nats per completion token).

        Raises ValueError for NaN, which says nothing: leave the state as it is after a skipped step.
        """
        if self.target is None:
            return self
        if entropy != entropy:
            raise ValueError("the entropy of the step is NaN: it cannot steer the entropy bonus")
        low = entropy <= self.target
        coef = min(self.coef + self.step, self.maximum) if low else max(self.coef - self.step, 0.0)
        return replace(self, coef=coef, active=low)
