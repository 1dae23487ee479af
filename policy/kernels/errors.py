"""The error of a kernel that cannot run where it was asked to."""

from __future__ import annotations


class KernelUnavailableError(RuntimeError):
    """The operation has no kernel for this device; the message says what it needs."""
