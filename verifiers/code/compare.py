"""Comparison of what a program gave with what was expected: in the verifier's process, on plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

OutputRule = Literal["lines", "tokens", "exact"]
OUTPUT_RULES: tuple[OutputRule, ...] = ("lines", "tokens", "exact")


def same_output(expected: str, actual: str, rule: OutputRule = "lines", float_tolerance: float = 0.0) -> bool:
    """Whether a program's output is the expected one.

    `lines`: as many lines, each equal but for white space at its end; empty lines at the very end do not count.
    `tokens`: the same words between white space. `exact`: every character. With a `float_tolerance` t, two words that
    are both decimal numbers with a fraction or exponent in at least one of them may differ by t * max(1, |expected|).
    """
    if rule == "exact" or expected == actual:
        return expected == actual
    if rule == "tokens":
        return _same_words(expected.split(), actual.split(), float_tolerance)
    wanted, given = _lines(expected), _lines(actual)
    if len(wanted) != len(given):
        return False
    if not float_tolerance:
        return wanted == given
    pairs = zip(wanted, given, strict=True)
    return all(want == have or _same_words(want.split(), have.split(), float_tolerance) for want, have in pairs)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")] if text.strip() else []


def _same_words(expected: list[str], actual: list[str], tolerance: float) -> bool:
    if len(expected) != len(actual):
        return False
    return all(want == have or _close(want, have, tolerance) for want, have in zip(expected, actual, strict=True))


def _close(expected: str, actual: str, tolerance: float) -> bool:
    if not tolerance or not any(mark in text for text in (expected, actual) for mark in ".eE"):
        return False
    try:
        want, have = float(expected), float(actual)
    except ValueError:
        return False
    return math.isfinite(want) and abs(want - have) <= tolerance * max(1.0, abs(want))


def as_json(value: Any) -> Any:
    """A returned value as JSON would carry it: tuples are lists, keys are texts. Raises ValueError if it can't."""
    if isinstance(value, (Enum, complex | set | frozenset | bytes | bytearray | range)):
        raise ValueError(f"a {type(value).__name__} is not JSON")
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {_key(key): as_json(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a {type(value).__name__} is not JSON")


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, int | float):
        return str(key)
    raise ValueError(f"a {type(key).__name__} is no key in JSON")


def same_value(expected: Any, actual: Any, float_tolerance: float = 0.0) -> bool:
    """Whether a returned value (`as_json`) is the expected one, types included.

    true is not 1 and "1" is not 1. An integer is accepted where a float is expected (2 for 2.0), a float where an
    integer is expected is not. Floats are equal exactly, or within t * max(1, |expected|); NaN equals NaN.
    """
    if isinstance(expected, list | tuple):
        if not isinstance(actual, list) or len(expected) != len(actual):
            return False
        return all(same_value(want, have, float_tolerance) for want, have in zip(expected, actual, strict=True))
    if isinstance(expected, Mapping):
        if not isinstance(actual, dict) or expected.keys() != actual.keys():
            return False
        return all(same_value(want, actual[key], float_tolerance) for key, want in expected.items())
    if isinstance(expected, float) and not isinstance(actual, bool) and isinstance(actual, int | float):
        return _same_float(expected, actual, float_tolerance)
    return type(expected) is type(actual) and expected == actual


def _same_float(expected: float, actual: float, tolerance: float) -> bool:
    if expected == actual or (expected != expected and actual != actual):
        return True
    try:
        return math.isfinite(expected) and abs(expected - actual) <= tolerance * max(1.0, abs(expected))
    except OverflowError:
        return False
