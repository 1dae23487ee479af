"""Whether two scalar expressions are the same: structure, exact rationals, then values at 60 digits and at many points.

Points are drawn by a fixed seed. Equal at every point of the common domain to 35 digits or more counts as identical;
one point where the two differ settles that they are not.
"""

from __future__ import annotations

import random
from fractions import Fraction
from functools import lru_cache
from typing import Any

from verifiers.mathematics.exact import rational, same_residues
from verifiers.mathematics.expr import Expr, contains, free_symbols, walk
from verifiers.mathematics.numeric import Evaluator, OutOfDomainError, TooBigError, context

CONSTANT_DIGITS = 70
PROBE_DIGITS = 50
MAX_SYMBOLS = 24
MAX_NODES = 3_000
NEEDED_POINTS = 4
MODERATE_DIGITS = 10
MAX_EXCESS_DIGITS = 2_000
MAX_EXCESS_WORK = 20_000  # digits times nodes
MAX_POINTS = 24
_BRANCHING = ("fn", "root", "fact")
IMAGINARY = Expr("const", ("i",))


def same_expression(gold: Expr, answer: Expr) -> bool:
    """Whether the two have the same value, or the same values for all values of their variables."""
    if gold == answer:
        return True
    names = free_symbols(gold, answer)
    if not names:
        return _same_constant(gold, answer)
    if len(names) > MAX_SYMBOLS or _size(gold) + _size(answer) > MAX_NODES:
        return canonical(gold) == canonical(answer)
    # log means ln to some and log10 to others: the two sides must agree under one reading
    return _same_function(gold, answer, names, False) or (
        _has_plain_log(gold, answer) and _same_function(gold, answer, names, True)
    )


def _size(expr: Expr) -> int:
    return sum(1 for _ in walk(expr))


def _has_plain_log(*exprs: Expr) -> bool:
    return any(
        node.op == "fn" and node.args[0] == "log" and len(node.args) == 2 for expr in exprs for node in walk(expr)
    )


def _same_constant(gold: Expr, answer: Expr) -> bool:
    left, right = rational(gold), rational(answer)
    if left is not None and right is not None:
        return left == right
    if (left is None) != (right is None) and not contains_irrational_sources(gold, answer):
        return False
    if _size(gold) + _size(answer) > MAX_NODES:
        return canonical(gold) == canonical(answer)
    return _agree_numerically(gold, answer, False) or (
        _has_plain_log(gold, answer) and _agree_numerically(gold, answer, True)
    )


def contains_irrational_sources(*exprs: Expr) -> bool:
    """Whether an operation occurs whose value may be rational although `rational` gives None."""
    return any(node.op not in {"num", "add", "mul", "inv"} for expr in exprs for node in walk(expr))


def _agree_numerically(gold: Expr, answer: Expr, log_ten: bool) -> bool:
    left, right = constant_value(gold, log_ten), constant_value(answer, log_ten)
    if left is None or right is None:
        return left is None and right is None and canonical(gold) == canonical(answer)
    if (excess := excess_digits(left)) and close(left, right, CONSTANT_DIGITS - 15):
        # what is added to a huge value must not be lost in it
        if excess > MAX_EXCESS_DIGITS or excess * (_size(gold) + _size(answer)) > MAX_EXCESS_WORK:
            return same_residues(gold, answer) or canonical(gold) == canonical(answer)
        digits = CONSTANT_DIGITS + excess
        left, right = (constant_value(expr, log_ten, digits) for expr in (gold, answer))
        return left is not None and right is not None and close(left, right, digits - 15)
    if not close(left, right, CONSTANT_DIGITS - 15):
        return _both_zero(gold, answer, log_ten)
    return same_residues(gold, answer) is not False


def _both_zero(gold: Expr, answer: Expr, log_ten: bool) -> bool:
    """Two values that are both zero to 70 digits and shrink again at 140: cancellation, not a small number."""
    for digits in (CONSTANT_DIGITS, 2 * CONSTANT_DIGITS):
        for expr in (gold, answer):
            value = constant_value(expr, log_ten, digits)
            if value is None or (value != 0 and context().mag(value) > -3 * digits):
                return False
    return True


def constant_value(expr: Expr, log_ten: bool = False, digits: int = CONSTANT_DIGITS) -> Any:
    """The value of a constant to `digits` digits, or None where it has none within bounds."""
    try:
        return Evaluator({}, digits, log_ten=log_ten)(expr)
    except (OutOfDomainError, TooBigError):
        return None


def excess_digits(value: Any) -> int:
    """How many digits a finite value has before its point beyond `MODERATE_DIGITS`; 0 for those of moderate size."""
    mp = context()
    if not mp.isfinite(value) or value == 0:
        return 0
    digits = int(mp.mag(value) * 0.302)
    return digits if digits > MODERATE_DIGITS else 0


def close(left: Any, right: Any, digits: int) -> bool:
    """Equal to `digits` significant digits; infinities are equal with their sign."""
    mp = context()
    if not (mp.isfinite(left) and mp.isfinite(right)):
        return bool(left == right)
    scale = max(abs(left), abs(right))
    return bool(abs(left - right) <= scale * mp.mpf(10) ** -digits)


@lru_cache(maxsize=64)
def _points(count: int) -> tuple[tuple[Fraction, ...], ...]:
    """`MAX_POINTS` fixed points of `count` coordinates: small integers, (0, 1), (1, 4), negatives, all mixed in turn."""
    draw = random.Random(20_011)
    points = []
    for trial in range(MAX_POINTS):
        kind = trial % 6
        point = []
        for index in range(count):
            if kind == 0:
                value = Fraction(2 + (index * 3 + trial + draw.randrange(2)) % 9 + trial // 6)
            elif kind in {1, 4}:
                value = Fraction(draw.randrange(100, 1000), 1009) + (0 if kind == 1 else 1 + index % 3)
            elif kind == 2:
                value = Fraction(draw.randrange(1100, 4000), 1009)
            elif kind == 3:
                value = Fraction(-draw.randrange(150, 3000), 1009)
            else:
                value = Fraction(draw.randrange(-3000, 3000) * 2 + 1, 1511)
            point.append(value)
        points.append(tuple(point))
    return tuple(points)


def _same_function(gold: Expr, answer: Expr, names: list[str], log_ten: bool) -> bool:
    """Agreement on the common real domain; where that is empty (or i occurs), at the points as complex numbers."""
    exact = same_residues(gold, answer, names)
    if exact is not None:
        return exact
    imaginary = any(node == IMAGINARY for expr in (gold, answer) for node in walk(expr))
    for real in (False,) if imaginary else (True, False):
        verdict = _agree_at_points(gold, answer, names, log_ten, real)
        if verdict is not None:
            return verdict
    return False


def _agree_at_points(gold: Expr, answer: Expr, names: list[str], log_ten: bool, real: bool) -> bool | None:
    """Whether the two agree at every point where both have a value; None if there are fewer than two."""
    mp = context()
    agreed = 0
    needed = NEEDED_POINTS if contains(gold, *_BRANCHING) == contains(answer, *_BRANCHING) else MAX_POINTS
    for point in _points(len(names)):
        mp.dps = PROBE_DIGITS
        env = {name: mp.mpf(value.numerator) / value.denominator for name, value in zip(names, point, strict=True)}
        digits = PROBE_DIGITS
        try:
            left = Evaluator(env, digits, log_ten=log_ten, real=real)(gold)
            right = Evaluator(env, digits, log_ten=log_ten, real=real)(answer)
            if (excess := excess_digits(left)) and close(left, right, digits - 15):
                if excess > MAX_EXCESS_DIGITS or excess * (_size(gold) + _size(answer)) > MAX_EXCESS_WORK:
                    continue
                digits += excess
                mp.dps = digits
                env = {
                    name: mp.mpf(value.numerator) / value.denominator for name, value in zip(names, point, strict=True)
                }
                left = Evaluator(env, digits, log_ten=log_ten, real=real)(gold)
                right = Evaluator(env, digits, log_ten=log_ten, real=real)(answer)
        except OutOfDomainError:
            continue
        except TooBigError:
            return canonical(gold) == canonical(answer)
        if not (mp.isfinite(left) and mp.isfinite(right)):
            continue
        if not close(left, right, digits - 15) and max(abs(left), abs(right)) >= mp.mpf(10) ** (5 - PROBE_DIGITS):
            return False
        agreed += 1
        if agreed >= needed:
            return True
    return True if agreed >= 2 else None


def canonical(expr: Expr) -> Expr:
    """Sums and products flattened and sorted, literals folded to their values: equal forms are equal expressions."""
    if expr.op == "num":
        return Expr("num", (expr.args[0], None))
    if expr.op in {"sym", "const", "text"}:
        return expr
    parts = tuple(canonical(part) if isinstance(part, Expr) else part for part in expr.args)
    if expr.op in {"add", "mul"}:
        flat: list[Expr] = []
        for part in parts:
            flat.extend(part.args if part.op == expr.op else (part,))
        unit = Fraction(0 if expr.op == "add" else 1)
        folded, rest = unit, []
        for part in flat:
            if part.op == "num" and part.args[0].numerator.bit_length() < 5_000:
                folded = folded + part.args[0] if expr.op == "add" else folded * part.args[0]
            else:
                rest.append(part)
        rest.sort(key=repr)
        if folded != unit or not rest:
            rest.insert(0, Expr("num", (folded, None)))
        return rest[0] if len(rest) == 1 else Expr(expr.op, tuple(rest))
    return Expr(expr.op, parts)
