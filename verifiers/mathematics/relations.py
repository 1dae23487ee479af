"""Equations up to scale and solved for a variable, inequalities up to direction, definitions up to names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from verifiers.mathematics.expr import ONE, ZERO, Expr, contains, free_symbols, negative, num, substitute, sym
from verifiers.mathematics.identity import _points as points
from verifiers.mathematics.identity import close, excess_digits, same_expression
from verifiers.mathematics.numeric import Evaluator, OutOfDomainError, TooBigError, context

Same = Callable[[Expr, Expr], bool]
_DIGITS = 50
MAX_POINTS = 12
NEEDED = 3
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!=", "===": "==="}


class Reading(NamedTuple):
    """An equality chain as `name = value`; either may be missing, and `false` says that the chain contradicts itself."""

    name: Expr | None
    value: Expr | None
    false: bool = False


def is_equality(expr: Expr) -> bool:
    """Whether the expression is a chain of = and ≈."""
    return expr.op == "rel" and all(relation in {"=", "~"} for relation in expr.args[0])


def read(expr: Expr) -> Reading:
    """A value, or the chain read as `name = working = value`; what follows an ≈ is dropped."""
    if not is_equality(expr):
        return Reading(None, expr)
    relations, *members = expr.args
    if len(relations) > 0 and "~" in relations:
        cut = relations.index("~")
        if cut == 0 and not _is_name(members[0]):
            return Reading(None, members[0])
        if cut > 0:
            members, relations = members[: cut + 1], relations[:cut]
    if len(members) > 2 and all(member.op == "sym" for member in members[:-1]) and len(set(members)) == len(members):
        count = len(members) - 1  # x = y = z = 1
        return Reading(Expr("tup", ("(", ")", *members[:-1])), Expr("tup", ("(", ")", *[members[-1]] * count)))
    if _is_name(members[0]):
        return Reading(members[0], members[-1])
    if len(members) == 2 and _is_name(members[1]) and not free_symbols(members[0]):
        return Reading(members[1], members[0])
    if all(not free_symbols(member) for member in members):
        if members[-1].op == "qty" and all(member.op != "qty" for member in members[:-1]):  # 9 * 5 = 45 cm
            true = all(same_expression(members[-1].args[0], member) for member in members[:-1])
            return Reading(None, members[-1] if true else None, not true)
        true = all(same_expression(members[0], member) for member in members[1:])
        return Reading(None, members[-1] if true else None, not true)
    if all(same_expression(members[0], member) for member in members[1:]):
        return Reading(None, members[-1])
    return Reading(None, None)


def _is_name(expr: Expr) -> bool:
    """What stands on the left of a definition: a variable, words, f(x), (x, y), A:B, f'(x), x y of capitals (AB)."""
    if expr.op in {"sym", "text"}:
        return expr != sym("…")
    if expr.op == "call":
        return all(part.op in {"sym", "num", "const"} for part in expr.args[1:])
    if expr.op in {"tup", "ratio", "set", "inter", "union"}:
        return all(_is_name(part) for part in expr.args if isinstance(part, Expr))
    if expr.op == "mul" and expr.args[0] in {sym("Delta"), sym("d")}:
        return len(expr.args) == 2 and expr.args[1].op == "sym"
    if expr.op == "mul" and len(expr.args) == 2 and expr.args[1].op == "inv" and expr.args[0].op == "mul":
        return _is_name(expr.args[0]) and _is_name(expr.args[1].args[0])  # dy/dx
    if expr.op == "mul":
        return all(part.op == "sym" and part.args[0].isupper() and len(part.args[0]) == 1 for part in expr.args)
    return expr.op == "fn" and expr.args[0] in {"min", "max", "sup"} and all(_is_name(part) for part in expr.args[1:])


def same_definition(gold: Reading, answer: Reading, same: Same) -> bool:
    """`f(z) = z` and `f(x) = x`: equal after the arguments are renamed."""
    one, two = gold.name, answer.name
    if one is None or two is None or gold.value is None or answer.value is None:
        return False
    if one.op != "call" or two.op != "call" or len(one.args) != len(two.args):
        return False
    if one.args[1:] == two.args[1:] or any(part.op != "sym" for part in (*one.args[1:], *two.args[1:])):
        return same(gold.value, answer.value)
    fresh = {old.args[0]: sym(f"·{index}") for index, old in enumerate(one.args[1:])}
    other = {old.args[0]: sym(f"·{index}") for index, old in enumerate(two.args[1:])}
    return same(substitute(gold.value, fresh), substitute(answer.value, other))


def same_sequence(gold: Reading, answer: Reading, same: Same) -> bool:
    """`a_n = 1/n` and `a_k = 1/k`: equal after the index is renamed."""
    one, two = gold.name, answer.name
    if one is None or two is None or gold.value is None or answer.value is None or one.op != "sym" or two.op != "sym":
        return False
    (letter, _, index), (other, _, renamed) = one.args[0].partition("_"), two.args[0].partition("_")
    if letter != other or not (len(index) == len(renamed) == 1 and (index + renamed).isalpha()):
        return False
    return same(gold.value, substitute(answer.value, {renamed: sym(index)}))


def difference(expr: Expr) -> Expr | None:
    """Left minus right of an equation of two members."""
    if expr.op != "rel" or len(expr.args) != 3 or contains(expr, "cases"):
        return None
    return Expr("add", (expr.args[1], negative(expr.args[2])))


def same_equation(gold: Expr, answer: Expr) -> bool:
    """Whether two equations have the same solutions: proportional sides, or the same solution for a variable."""
    one, two = difference(gold), difference(answer)
    if one is None or two is None:
        return False
    names = free_symbols(one, two)
    if not names or free_symbols(one) != free_symbols(two):
        return False
    if _proportional(one, two, names) is not None:
        return True
    return any(_same_solution(one, two, name, names) for name in names)


def _value(expr: Expr, names: list[str], point: tuple[Any, ...]) -> Any:
    """The value at one point, or None where there is none."""
    mp = context()
    mp.dps = _DIGITS
    env = {name: mp.mpf(value.numerator) / value.denominator for name, value in zip(names, point, strict=True)}
    try:
        value = Evaluator(env, _DIGITS)(expr)
    except (OutOfDomainError, TooBigError):
        return None
    return value if mp.isfinite(value) and not excess_digits(value) else None  # a term may be lost in a huge value


def _proportional(one: Expr, two: Expr, names: list[str]) -> int | None:
    """The sign of the constant factor between two functions, or None if there is none."""
    first: tuple[Any, Any] | None = None
    count = 0
    for point in points(len(names))[:MAX_POINTS]:
        left = _value(one, names, point)
        right = _value(two, names, point) if left is not None else None
        if left is None or right is None or (left == 0 and right == 0):
            continue
        if left == 0 or right == 0:
            return None
        if first is not None and not close(left * first[1], right * first[0], _DIGITS - 15):
            return None
        first = first or (left, right)
        count += 1
        if count > NEEDED:
            return 1 if context().re(first[0] / first[1]) > 0 else -1
    return None


def solves(equation: Expr, value: Expr) -> bool:
    """Whether `variable = value` is the equation, for a variable in which it is linear and that `value` lacks."""
    side = difference(equation)
    if side is None:
        return False
    unknown = [name for name in free_symbols(equation) if name not in free_symbols(value)]
    if not unknown:
        return False
    for name in unknown:
        names = free_symbols(equation, value)
        if not _is_linear(side, name, names):
            continue
        if _vanishes(substitute(side, {name: value}), side, names):
            return True
    return False


def _vanishes(expr: Expr, scale: Expr, names: list[str]) -> bool:
    """Whether a function is zero at the points, measured against the size of another."""
    mp = context()
    count = 0
    for point in points(len(names))[:MAX_POINTS]:
        value = _value(expr, names, point)
        size = _value(scale, names, point) if value is not None else None
        if value is None or size is None:
            continue
        if abs(value) > (1 + abs(size)) * mp.mpf(10) ** (15 - _DIGITS):
            return False
        count += 1
        if count > NEEDED:
            return True
    return False


def _is_linear(side: Expr, name: str, names: list[str]) -> bool:
    """Whether a function is linear in one variable, by second differences at three points of the others."""
    mp = context()
    forms = [substitute(side, {name: point}) for point in (ZERO, ONE, num(2), num(5))]
    count = 0
    for point in points(len(names))[:MAX_POINTS]:
        low, one, two, five = (_value(form, names, point) for form in forms)
        if low is None or one is None or two is None or five is None:
            continue
        slope = one - low
        size = (abs(low) + abs(slope)) * mp.mpf(10) ** (15 - _DIGITS)
        if slope == 0 or abs(two - low - 2 * slope) > size or abs(five - low - 5 * slope) > size:
            return False
        count += 1
        if count >= NEEDED:
            return True
    return False


def _same_solution(one: Expr, two: Expr, name: str, names: list[str]) -> bool:
    if not (_is_linear(one, name, names) and _is_linear(two, name, names)):
        return False
    at_zero, at_one = substitute(one, {name: ZERO}), substitute(one, {name: ONE})
    slope = Expr("add", (at_one, negative(at_zero)))
    solution = negative(Expr("mul", (at_zero, Expr("inv", (slope,)))))
    return _vanishes(substitute(two, {name: solution}), two, names)


def same_chain(gold: Expr, answer: Expr, same: Same) -> bool:
    """Relation chains member by member, read in either direction; two members also up to a positive factor."""
    (ops, *members), (other_ops, *others) = gold.args, answer.args
    for relations, values in ((other_ops, others), _reversed(other_ops, others)):
        if relations == ops and all(same(one, two) for one, two in zip(members, values, strict=True)):
            return True
    if len(ops) != 1 or len(other_ops) != 1 or ops[0] not in _FLIPPED or other_ops[0] not in _FLIPPED:
        return False
    one, two = difference(gold), difference(answer)
    names = free_symbols(gold, answer)
    if one is None or two is None or not names:
        return False
    sign = _proportional(one, two, names)
    return sign is not None and (ops[0] == other_ops[0] if sign > 0 else ops[0] == _FLIPPED[other_ops[0]])


def _reversed(ops: tuple[str, ...], members: list[Expr]) -> tuple[tuple[str, ...] | None, list[Expr]]:
    if any(relation not in _FLIPPED for relation in ops):
        return None, members
    return tuple(_FLIPPED[relation] for relation in reversed(ops)), members[::-1]
