"""Mathematics as text: a bounded parser of LaTeX and plain notation, and equivalence of answers by kind."""

from verifiers.mathematics.compare import Outcome, equivalent
from verifiers.mathematics.options import MathOptions

__all__ = ["MathOptions", "Outcome", "equivalent"]
