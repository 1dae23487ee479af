"""Text in, verdict out: rule-based verifiers and the pool of killable processes that runs them.

Importing this package registers the built-in verifiers; the pool lives in `verifiers.pool`.
"""

from verifiers import format, numeric  # noqa: F401  (the import registers them)
from verifiers.compose import weighted
from verifiers.registry import VerifierLookupError, known_names, register, resolve
from verifiers.verdict import Status, TaskLike, Verdict, Verifier

__all__ = [
    "Status",
    "TaskLike",
    "Verdict",
    "Verifier",
    "VerifierLookupError",
    "known_names",
    "register",
    "resolve",
    "weighted",
]
