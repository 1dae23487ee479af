"""Loads the repaired interpreter before any test module imports a kernel."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("triton") is not None:
    from tests.policy.kernels import interpreter  # noqa: F401
