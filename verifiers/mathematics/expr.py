"""The syntax tree of an answer: one small immutable node type, its constructors and its walks.

Scalars: `num` (Fraction, digits after the point or None), `sym` (name), `const` (pi, e, i, inf), `add`, `mul`, `div`,
`pow`, `root` (index, radicand), `fn` (name, argument ..), `fact`, `pm` (left, right: left ± right), `pct`, `deg`,
`ratio`, `mixed`. Around them: `list` (bare), `tup` (opening, closing, item ..), `set`, `builder` (variable, condition),
`rel` (operators, member ..), `union`, `inter`, `diff`, `matrix` (row ..), `cases`, `qty` (value, unit), `text` (words).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple


class Expr(NamedTuple):
    """One node: what it is, and its parts (nodes, or plain values in the leaves)."""

    op: str
    args: tuple[Any, ...]


class MathSyntaxError(ValueError):
    """The text is not mathematics that this parser reads; the message says where it stopped."""


class TooLargeError(MathSyntaxError):
    """The text is longer or deeper than an answer may be."""


def num(value: int | Fraction, places: int | None = None) -> Expr:
    """A number; `places` is the count of digits after its decimal point where it was written with one."""
    return Expr("num", (Fraction(value), places))


def sym(name: str) -> Expr:
    """A variable."""
    return Expr("sym", (name,))


def const(name: str) -> Expr:
    """One of the constants pi, e, i, inf."""
    return Expr("const", (name,))


def negative(value: Expr) -> Expr:
    """-value, folded into a literal."""
    if value.op == "num":
        return Expr("num", (-value.args[0], value.args[1]))
    return Expr("mul", (MINUS_ONE, value))


ZERO, ONE, MINUS_ONE = num(0), num(1), num(-1)
INFINITY = const("inf")

_LEAVES = {"num", "sym", "const", "text"}


def walk(expr: Expr) -> Iterator[Expr]:
    """Every node, the root first."""
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        if node.op not in _LEAVES:
            stack.extend(part for part in node.args if isinstance(part, Expr))


def free_symbols(*exprs: Expr) -> list[str]:
    """The variables, sorted; the index of a sum or product is not free."""
    names: set[str] = set()
    for expr in exprs:
        names |= _free(expr)
    return sorted(names)


def _free(expr: Expr) -> set[str]:
    if expr.op == "sym":
        return {expr.args[0]}
    if expr.op in _LEAVES:
        return set()
    if expr.op == "fold":  # (sum or prod, index, low, high, body)
        return _free(expr.args[2]) | _free(expr.args[3]) | (_free(expr.args[4]) - {expr.args[1]})
    names: set[str] = {"call:" + expr.args[0]} if expr.op == "call" else set()
    for part in expr.args:
        if isinstance(part, Expr):
            names |= _free(part)
    return names


def substitute(expr: Expr, names: dict[str, Expr]) -> Expr:
    """`expr` with variables replaced."""
    if expr.op == "sym":
        return names.get(expr.args[0], expr)
    if expr.op in _LEAVES:
        return expr
    return Expr(expr.op, tuple(substitute(part, names) if isinstance(part, Expr) else part for part in expr.args))


def contains(expr: Expr, *ops: str) -> bool:
    """Whether a node of one of these kinds occurs."""
    return any(node.op in ops for node in walk(expr))


def split_plus_minus(expr: Expr) -> tuple[Expr, ...]:
    """The two readings of an expression with ±, upper signs and lower signs; the expression alone without one."""
    if not contains(expr, "pm"):
        return (expr,)
    return _choose(expr, 0), _choose(expr, 1)


def _choose(expr: Expr, side: int) -> Expr:
    if expr.op in _LEAVES:
        return expr
    parts = tuple(_choose(part, side) if isinstance(part, Expr) else part for part in expr.args)
    if expr.op == "pm":  # (left, right, upper sign)
        plus = (expr.args[2] > 0) == (side == 0)
        right = parts[1] if plus else negative(parts[1])
        return right if parts[0] == ZERO else Expr("add", (parts[0], right))
    return Expr(expr.op, parts)
