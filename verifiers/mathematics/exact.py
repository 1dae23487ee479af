"""Exact rational values, and residues for those that are too large to write out."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

from verifiers.mathematics.expr import Expr

MAX_BITS = 40_000
MAX_DECIMAL_BITS = 14_000
MAX_FACTORIAL = 3_000
MAX_FOLD_TERMS = 1_000
MAX_RESIDUE_FACTORIAL = 50_000
MAX_DEGREE = 10**9
_PRIMES = (2305843009213693951, 2305843009213693921, 2305843009213693907)


def written(number: int) -> str:
    """The digits of a whole number; hexadecimal ones, which Python does not limit, beyond some 4,200 of them."""
    return str(number) if number.bit_length() <= MAX_DECIMAL_BITS else hex(number)


class NotRationalError(ValueError):
    """The expression has no exact rational value that is small enough to write out."""


@lru_cache(maxsize=64)
def rational(expr: Expr) -> Fraction | None:
    """The exact value of a rational constant within the bounds of this module, else None."""
    try:
        return _value(expr, {}, [MAX_FOLD_TERMS])
    except (NotRationalError, ZeroDivisionError):
        return None


def _checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise NotRationalError("too many digits")
    return value


def _value(expr: Expr, env: dict[str, Fraction], budget: list[int]) -> Fraction:
    op, args = expr
    if op == "num":
        return args[0]
    if op == "add":
        total = _value(args[0], env, budget)
        for part in args[1:]:
            total = total + _value(part, env, budget)
        return _checked(total)
    if op == "mul":
        product = _value(args[0], env, budget)
        for part in args[1:]:
            product = _checked(product * _value(part, env, budget))
        return product
    if op == "inv":
        return 1 / _value(args[0], env, budget)
    if op == "pow":
        return _power(_value(args[0], env, budget), _value(args[1], env, budget))
    if op == "sym" and args[0] in env:
        return env[args[0]]
    rule = _RULES.get(op)
    if rule is None:
        raise NotRationalError(op)
    return rule(expr, env, budget)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _root(_power(base, Fraction(exponent.numerator)), exponent.denominator)
    count = exponent.numerator
    if abs(base) == 1 or base == 0 or count == 0:
        if base == 0 and count <= 0:
            raise NotRationalError("zero to a power that is not positive")
        return Fraction(1) if count % 2 == 0 and base != 0 else base
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(count) > MAX_BITS or bits * abs(count) > MAX_BITS:
        raise NotRationalError("too large a power")
    return base**count


def _root(value: Fraction, index: int) -> Fraction:
    """The exact root of a perfect power; of a negative number only at index 3, 5, .."""
    if not 2 <= index <= 64 or value < 0:
        raise NotRationalError("no rational root")
    above, below = _integer_root(value.numerator, index), _integer_root(value.denominator, index)
    if above**index != value.numerator or below**index != value.denominator:
        raise NotRationalError("no rational root")
    return Fraction(above, below)


def _integer_root(value: int, index: int) -> int:
    if index == 2:
        return math.isqrt(value)
    if value < 2:
        return value
    guess = 1 << -(-value.bit_length() // index)
    while True:
        better = ((index - 1) * guess + value // guess ** (index - 1)) // index
        if better >= guess:
            return guess
        guess = better


def _factorial(expr: Expr, env: dict[str, Fraction], budget: list[int]) -> Fraction:
    count = _value(expr.args[0], env, budget)
    if count.denominator != 1 or not 0 <= count <= MAX_FACTORIAL:
        raise NotRationalError("no factorial that is small enough")
    return Fraction(math.factorial(int(count)))


def _function(expr: Expr, env: dict[str, Fraction], budget: list[int]) -> Fraction:
    name, *arguments = expr.args
    if name == "mod" and len(arguments) == 2:
        return _modulo(arguments[0], _value(arguments[1], env, budget))
    if name not in {"abs", "floor", "ceil", "binom", "max", "min", "gcd", "lcm", "sgn", "sign", "det"} or name == "det":
        raise NotRationalError(name)
    values = [_value(part, env, budget) for part in arguments]
    if name == "abs":
        return abs(values[0])
    if name == "floor":
        return Fraction(math.floor(values[0]))
    if name == "ceil":
        return Fraction(math.ceil(values[0]))
    if name in {"max", "min"}:
        return max(values) if name == "max" else min(values)
    if name in {"sgn", "sign"}:
        return Fraction((values[0] > 0) - (values[0] < 0))
    if any(value.denominator != 1 for value in values):
        raise NotRationalError(name)
    whole = [int(value) for value in values]
    if name == "binom":
        if len(whole) != 2 or not 0 <= whole[0] <= MAX_FACTORIAL or not -1 <= whole[1] <= MAX_FACTORIAL:
            raise NotRationalError("no binomial that is small enough")
        return Fraction(math.comb(whole[0], whole[1])) if whole[1] >= 0 else Fraction(0)
    return Fraction(math.gcd(*whole) if name == "gcd" else math.lcm(*whole))


def _modulo(expr: Expr, modulus: Fraction) -> Fraction:
    if modulus.denominator != 1 or not 1 <= modulus < 10**30:
        raise NotRationalError("no such modulus")
    try:
        return Fraction(_residue(expr, int(modulus)))
    except ValueError as exc:
        raise NotRationalError("not invertible") from exc


def _fold(expr: Expr, env: dict[str, Fraction], budget: list[int]) -> Fraction:
    name, index, low, high, body = expr.args
    first, last = _value(low, env, budget), _value(high, env, budget)
    if first.denominator != 1 or last.denominator != 1 or last - first > budget[0]:
        raise NotRationalError("too many terms")
    total = Fraction(0 if name == "sum" else 1)
    budget[0] -= max(int(last - first), 0)
    for k in range(int(first), int(last) + 1):
        term = _value(body, {**env, index: Fraction(k)}, budget)
        total = _checked(total + term if name == "sum" else total * term)
    return total


def _ratio(expr: Expr, env: dict[str, Fraction], budget: list[int]) -> Fraction:
    if len(expr.args) != 2:
        raise NotRationalError("a ratio of three")
    return _value(expr.args[0], env, budget) / _value(expr.args[1], env, budget)


def _root_rule(expr: Expr, env: dict[str, Fraction], budget: list[int]) -> Fraction:
    index, radicand = _value(expr.args[0], env, budget), _value(expr.args[1], env, budget)
    if index.denominator != 1 or index < 1:
        raise NotRationalError("no such root")
    if radicand < 0 and index % 2 == 1:
        return -_root(-radicand, int(index)) if index > 1 else radicand
    return _root(radicand, int(index)) if index > 1 else radicand


_RULES = {
    "fact": _factorial,
    "fn": _function,
    "fold": _fold,
    "ratio": _ratio,
    "root": _root_rule,
    "pct": lambda expr, env, budget: _value(expr.args[0], env, budget) / 100,
    "based": lambda expr, env, budget: _value(expr.args[0], env, budget),
}


_NO_VARIABLES: dict[str, int] = {}


def same_residues(left: Expr, right: Expr, names: Sequence[str] = ()) -> bool | None:
    """Whether two rational constants or functions agree modulo three large primes; None: not computable.

    Functions are probed at random residues of their variables: two that differ, of degree d, agree at one point with a
    probability below d / 2^61 (Schwartz-Zippel), whatever the size of their values.
    """
    draw = random.Random(61)
    try:
        for prime in _PRIMES:
            point = {name: draw.randrange(2, prime) for name in names}
            if _residue(left, prime, point) != _residue(right, prime, point):
                return False
    except (NotRationalError, ValueError):
        return None
    return True


def _residue(expr: Expr, prime: int, point: Mapping[str, int] = _NO_VARIABLES) -> int:
    op, args = expr
    if op == "sym" and args[0] in point:
        return point[args[0]]
    if op == "num":
        return args[0].numerator * pow(args[0].denominator, -1, prime) % prime
    if op == "add":
        return sum(_residue(part, prime, point) for part in args) % prime
    if op == "mul":
        product = 1
        for part in args:
            product = product * _residue(part, prime, point) % prime
        return product
    if op == "inv":
        return pow(_residue(args[0], prime, point), -1, prime)
    if op == "pow":
        exponent = rational(args[1])
        if exponent is None or exponent.denominator != 1:
            raise NotRationalError("no integer power")
        if point and abs(exponent) > MAX_DEGREE:
            raise NotRationalError("too large a degree")
        return pow(_residue(args[0], prime, point), int(exponent), prime)
    if op == "fact":
        count = rational(args[0])
        if count is None or count.denominator != 1 or not 0 <= count <= MAX_RESIDUE_FACTORIAL:
            raise NotRationalError("no small factorial")
        product = 1
        for k in range(2, int(count) + 1):
            product = product * k % prime
        return product
    raise NotRationalError(op)
