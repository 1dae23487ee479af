"""One value against one value: units, percent, degrees, decimals, bases, ±, families with an integer parameter."""

from __future__ import annotations

from fractions import Fraction

from verifiers.mathematics.decimals import agrees_by_digits
from verifiers.mathematics.exact import rational
from verifiers.mathematics.expr import (
    MINUS_ONE,
    ONE,
    ZERO,
    Expr,
    contains,
    free_symbols,
    num,
    split_plus_minus,
    substitute,
)
from verifiers.mathematics.identity import constant_value, same_expression
from verifiers.mathematics.numeric import context
from verifiers.mathematics.options import MathOptions
from verifiers.mathematics.units import Unit, parse_unit

_TEMPERATURES = {"degC", "degF"}


def same_scalar(gold: Expr, answer: Expr, options: MathOptions) -> bool:
    """Whether the two values agree under the options."""
    if gold == answer:
        return True
    if gold.op == "qty" or answer.op == "qty":
        return _same_quantity(gold, answer, options)
    if contains(gold, "pm") or contains(answer, "pm"):
        return _same_branches(gold, answer, options)
    if gold.op == "based" and answer.op == "num" and gold.args[2] == answer:
        return True
    if gold.op == "ratio" or answer.op == "ratio":
        return _same_ratio(gold, answer, options)
    if same_expression(gold, answer) or agrees_by_digits(gold, answer, options):
        return True
    return _same_percent(gold, answer, options) or _same_degrees(gold, answer, options)


def _same_quantity(gold: Expr, answer: Expr, options: MathOptions) -> bool:
    left, right = _unit(gold), _unit(answer)
    if left is None or right is None:
        if options.missing_units == "refuse":
            return False
        bare_gold, bare_answer = _without_unit(gold), _without_unit(answer)
        return same_scalar(bare_gold, bare_answer, options) or _letter_unit(gold, answer, options)
    if isinstance(left, str) or isinstance(right, str):
        return left == right and same_scalar(gold.args[0], answer.args[0], options)
    if left.label or right.label:
        same_label = left.label == right.label
        return same_label and same_scalar(gold.args[0], answer.args[0], options)
    if left.dimensions != right.dimensions:
        return False
    if left.factor == right.factor:
        return same_scalar(gold.args[0], answer.args[0], options)
    scaled = Expr("mul", (answer.args[0], num(right.factor / left.factor)))
    return same_scalar(gold.args[0], scaled, options)


def _letter_unit(gold: Expr, answer: Expr, options: MathOptions) -> bool:
    """`5m` for `5\\text{ m}`, either way: the unit of one written as a bare letter by the other."""
    unit, product = (gold, answer) if gold.op == "qty" else (answer, gold)
    if product.op != "mul" or len(product.args) < 2 or product.args[-1].op != "sym":
        return False
    if product.args[-1].args[0] != unit.args[1].strip():
        return False
    rest = product.args[:-1]
    bare = rest[0] if len(rest) == 1 else Expr("mul", rest)
    return same_scalar(gold.args[0], bare, options) if unit is gold else same_scalar(bare, answer.args[0], options)


def _unit(expr: Expr) -> Unit | str | None:
    """The unit, the name of a temperature scale, or None for a bare value."""
    if expr.op == "deg":
        return None
    if expr.op != "qty":
        return None
    return expr.args[1] if expr.args[1] in _TEMPERATURES else parse_unit(expr.args[1])


def _without_unit(expr: Expr) -> Expr:
    return expr.args[0] if expr.op == "qty" else expr


def _same_branches(gold: Expr, answer: Expr, options: MathOptions) -> bool:
    """Both signs against both signs, in either order."""
    left, right = split_plus_minus(gold), split_plus_minus(answer)
    if len(left) != len(right):
        return False
    first, second = left
    return any(
        same_scalar(first, one, options) and same_scalar(second, two, options) for one, two in (right, right[::-1])
    )


def _same_ratio(gold: Expr, answer: Expr, options: MathOptions) -> bool:
    """Ratios up to scale; a ratio of two also as the quotient."""
    if gold.op == answer.op == "ratio":
        if len(gold.args) != len(answer.args):
            return False
        # cross products, so that no member is divided by
        return all(
            same_expression(Expr("mul", (gold.args[0], two)), Expr("mul", (answer.args[0], one)))
            for one, two in zip(gold.args[1:], answer.args[1:], strict=True)
        )
    if len((gold if gold.op == "ratio" else answer).args) != 2:
        return False
    return same_expression(gold, answer) or agrees_by_digits(gold, answer, options)


def _same_percent(gold: Expr, answer: Expr, options: MathOptions) -> bool:
    """`50` for `50%`; `50%` for `50`, but not for a gold that may be a share itself (at most 1)."""
    if options.percent != "loose" or (gold.op == "pct") == (answer.op == "pct"):
        return False
    bare = (gold if gold.op == "pct" else answer).args[0]
    if bare.op == "pct":
        return False
    if gold.op == "pct":
        return same_scalar(bare, answer, options)
    value = rational(gold)
    return value is not None and abs(value) > 1 and same_scalar(gold, bare, options)


def _same_degrees(gold: Expr, answer: Expr, options: MathOptions) -> bool:
    """`90` for `90°`, on either side; never radians as degrees."""
    if (gold.op == "deg") == (answer.op == "deg"):
        return False
    left, right = (gold.args[0], answer) if gold.op == "deg" else (gold, answer.args[0])
    return same_scalar(left, right, options)


def same_family(gold: Expr, answer: Expr, parameter: str) -> bool:
    """Whether two values linear in an integer parameter run over the same numbers: `-\\pi/6+2k\\pi`, `11\\pi/6+2k\\pi`."""
    return family_shift(gold, answer, parameter) is not None


def family_shift(gold: Expr, answer: Expr, parameter: str) -> int | None:
    """By how many steps two families with the same step differ, or None if they are not the same numbers."""
    values = []
    for expr in (gold, answer):
        if set(free_symbols(expr)) - {parameter}:
            return None
        at = [constant_value(substitute(expr, {parameter: point})) for point in (ZERO, ONE, MINUS_ONE)]
        if None in at:
            return None
        values.append(at)
    mp = context()
    steps = [at[1] - at[0] for at in values]
    if any(abs((at[0] - at[2]) - step) > mp.mpf(10) ** -50 for at, step in zip(values, steps, strict=True)):
        return None
    if steps[0] == 0 or abs(abs(steps[0]) - abs(steps[1])) > mp.mpf(10) ** -50:
        return None
    shift = (values[1][0] - values[0][0]) / steps[0]
    whole = mp.nint(mp.re(shift))
    return int(whole) if mp.im(shift) == 0 and abs(shift - whole) < mp.mpf(10) ** -50 else None


def is_scalar(expr: Expr) -> bool:
    """Whether the expression is one value (or two, with ±), rather than a collection, a relation or words."""
    return expr.op in SCALARS


SCALARS = frozenset(
    [
        "num",
        "sym",
        "const",
        "add",
        "mul",
        "inv",
        "pow",
        "root",
        "fn",
        "fact",
        "pct",
        "deg",
        "arc",
        "ratio",
        "based",
        "qty",
        "pm",
        "fold",
        "call",
    ]
)


HUNDREDTH = Fraction(1, 100)
