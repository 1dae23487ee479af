"""When a decimal stands for a value that it does not equal: by the digits that were written."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from verifiers.mathematics.exact import rational, written
from verifiers.mathematics.expr import Expr, const, free_symbols, num
from verifiers.mathematics.identity import constant_value
from verifiers.mathematics.numeric import context
from verifiers.mathematics.options import MathOptions

MAX_BITS = 4_000


def literal(expr: Expr) -> tuple[Fraction, int] | None:
    """Value and places of a written decimal (`-0.25`, `6.67%`, `2.5\\times10^{3}`), else None; places may be negative."""
    op, args = expr
    if op == "num":
        return None if args[1] is None else (args[0], args[1])
    if op in {"pct", "deg"} and (inner := literal(args[0])):
        return (inner[0] / 100, inner[1] + 2) if op == "pct" else inner
    if op == "mul" and len(args) == 2:
        for decimal, power in (args, args[::-1]):
            found, factor = literal(decimal), rational(power)
            if found is None or factor is None:
                continue
            if (shift := _power_of_ten(factor)) is not None:
                return found[0] * factor, found[1] - shift
    return None


def _power_of_ten(value: Fraction) -> int | None:
    if abs(value) == 1:
        return 0
    text = written(value.numerator if value.denominator == 1 else value.denominator).lstrip("-")
    if text.strip("0") != "1" or not text.startswith("1") or (value.denominator != 1 and abs(value.numerator) != 1):
        return None
    return len(text) - 1 if value.denominator == 1 else 1 - len(text)


def significant_digits(value: Fraction, places: int) -> int:
    """How many significant digits a decimal with that many places has."""
    return len(written(abs(int(value * Fraction(10) ** places)))) if value else 0


def agrees_by_digits(gold: Expr, answer: Expr, options: MathOptions) -> bool:
    """Whether one side is a decimal to which the other rounds.

    A gold decimal (with `gold_digits` significant digits or more) stands for what rounds to it; a decimal answer stands
    for a gold without a finite decimal (with `rounded_digits` or more). Two decimals of the same length must be equal, and
    one that is longer than the gold rounds to it only if the gold has more than `gold_digits`.
    """
    if free_symbols(gold, answer):
        return False
    gold_literal, answer_literal = literal(gold), literal(answer)
    if gold_literal is not None:
        value, places = gold_literal
        if not options.gold_digits or significant_digits(value, places) < options.gold_digits:
            return False
        # an answer that is a decimal itself must be the longer one, and the gold have digits to spare
        if answer_literal and (answer_literal[1] <= places or significant_digits(value, places) <= options.gold_digits):
            return False
        if gold.op == "deg" and answer.op != "deg":
            answer = Expr("mul", (answer, num(180), Expr("inv", (const("pi"),))))
        return _rounds_to(answer, value, places)
    if answer_literal is None or not options.rounded_digits or _is_finite_decimal(gold):
        return False
    if answer.op == "deg" and gold.op != "deg":
        gold = Expr("mul", (gold, num(180), Expr("inv", (const("pi"),))))
    value, places = answer_literal
    if significant_digits(value, places) < options.rounded_digits:
        return False
    return _rounds_to(gold, value, places, cut=significant_digits(value, places) >= 2 * options.rounded_digits)


def _is_finite_decimal(expr: Expr) -> bool:
    value = rational(expr)
    if value is None:
        return False
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _rounds_to(expr: Expr, value: Fraction, places: int, *, cut: bool = False) -> bool:
    """|expr - value| is at most half a unit of the last place, or (`cut`) the decimal is the value cut off there."""
    half = Fraction(1, 2) / Fraction(10) ** places
    exact = rational(expr)
    if exact is None:
        exact = _as_fraction(constant_value(expr))
    if exact is None:
        return False
    beyond = exact - value
    if cut and 0 <= (beyond if value > 0 else -beyond) < 2 * half:
        return True
    return abs(beyond) <= half


def _as_fraction(value: Any) -> Fraction | None:
    """A real floating-point value as it is, if it is of moderate size."""
    mp = context()
    if value is None or mp.im(value) != 0 or not mp.isfinite(value) or abs(mp.mag(value)) > MAX_BITS:
        return None
    sign, mantissa, exponent, _ = mp.re(value)._mpf_
    return Fraction(-mantissa if sign else mantissa) * Fraction(2) ** exponent
