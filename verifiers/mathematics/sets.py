"""Sets of real numbers: intervals, inequalities, set-builders and finite sets as pieces with exact endpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import cmp_to_key
from typing import NamedTuple

from verifiers.mathematics.expr import INFINITY, ZERO, Expr, free_symbols, negative, num, split_plus_minus
from verifiers.mathematics.identity import close, constant_value
from verifiers.mathematics.numeric import context

MINUS_INFINITY = negative(INFINITY)
MAX_PIECES = 64
MAX_INTEGERS = 100
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}


class Piece(NamedTuple):
    """One interval; a single number is the closed one from itself to itself."""

    low: Expr
    low_closed: bool
    high: Expr
    high_closed: bool


class NotASetError(ValueError):
    """The expression is no set of real numbers that this module reads."""


REALS = (Piece(MINUS_INFINITY, False, INFINITY, False),)


def pieces(expr: Expr) -> tuple[Piece, ...]:
    """The set as pieces: merged and in order where all endpoints are numbers; raises `NotASetError`."""
    found = _read(expr, None)
    if len(found) > MAX_PIECES:
        raise NotASetError("too many pieces")
    return (
        _merged(found) if all(_is_number(end) for piece in found for end in (piece.low, piece.high)) else tuple(found)
    )


def is_set_like(expr: Expr) -> bool:
    """Whether the expression can only be meant as a set of reals (a pair in round brackets may be a point)."""
    if expr.op in {"union", "inter", "diff", "builder", "mathbb"}:
        return True
    if expr.op == "tup":
        return len(expr.args) == 4 and (expr.args[0], expr.args[1]) not in {("(", ")"), ("[", "]")}
    if expr.op == "rel":
        return any(relation in {"<", "<=", ">", ">=", "!=", "in"} for relation in expr.args[0])
    if expr.op == "list" and expr.args[0] != "braces":
        return any(is_set_like(part) and part.op != "tup" for part in expr.args[1:])
    return expr == Expr("set", ())


def same_pieces(gold: tuple[Piece, ...], answer: tuple[Piece, ...], same: Callable[[Expr, Expr], bool]) -> bool:
    """Whether two sets have the same pieces, in any order."""
    rest = list(answer)
    for piece in gold:
        found = next((other for other in rest if _same_piece(piece, other, same)), None)
        if found is None:
            return False
        rest.remove(found)
    return not rest


def _same_piece(gold: Piece, answer: Piece, same: Callable[[Expr, Expr], bool]) -> bool:
    return (
        (gold.low_closed == answer.low_closed or _is_infinite(gold.low))
        and (gold.high_closed == answer.high_closed or _is_infinite(gold.high))
        and same(gold.low, answer.low)
        and same(gold.high, answer.high)
    )


def _is_infinite(expr: Expr) -> bool:
    return expr in {INFINITY, MINUS_INFINITY}


def _is_number(expr: Expr) -> bool:
    if free_symbols(expr):
        return False
    value = constant_value(expr)
    return value is not None and context().im(value) == 0


def _read(expr: Expr, variable: Expr | None) -> list[Piece]:
    op, args = expr
    if op == "tup" and len(args) == 4:
        if _is_number(args[2]) and _is_number(args[3]) and _order(args[2], args[3]) > 0:
            raise NotASetError("ends in the wrong order")
        return [Piece(args[2], args[0] == "[", args[3], args[1] == "]")]
    if op == "set":
        return [Piece(value, True, value, True) for item in args for value in split_plus_minus(item)]
    if op == "mathbb":
        return _number_set(args[0])
    if op == "union":
        return [piece for part in args for piece in _read(part, variable)]
    if op == "inter":
        return _intersection([_read(part, variable) for part in args])
    if op == "diff":
        return _intersection([_read(args[0], variable), *(_complement(_read(part, variable)) for part in args[1:])])
    if op == "builder":
        subject = args[0]
        if subject.op == "rel" and subject.args[0] == ("in",):
            return _intersection([_read(subject.args[2], None), _read(args[1], subject.args[1])])
        return _read(args[1], subject)
    if op == "rel":
        return _relation(expr, variable)
    if op == "list" and args[0] in {"or", "and", ","}:
        return _combined(expr, variable)
    if op == "text" and args[0].lower() in {"all real numbers", "all reals", "all real numbers x", "reals"}:
        return list(REALS)
    raise NotASetError(op)


def _number_set(name: str) -> list[Piece]:
    if name == "R":
        return list(REALS)
    if name in {"R^+", "R_+", "R_{+}", "R_>0", "R_{>0}"}:
        return [Piece(ZERO, False, INFINITY, False)]
    if name in {"R^-", "R_-", "R_<0"}:
        return [Piece(MINUS_INFINITY, False, ZERO, False)]
    raise NotASetError(name)


def _combined(expr: Expr, variable: Expr | None) -> list[Piece]:
    """Conditions joined by or / and; a comma joins as "and", or as "or" where that would be empty."""
    kind, *items = expr.args
    if kind != "," and all(item.op == "tup" for item in items):
        return [piece for item in items for piece in _read(item, None)]
    if len({name for item in items if item.op == "rel" for name in free_symbols(item)}) > 1 and variable is None:
        raise NotASetError("conditions on more than one variable")
    if not any(item.op in {"rel", "builder", "union"} for item in items):
        raise NotASetError("a list")
    subject = variable
    parts = []
    for item in items:
        if parts and items[0].op == "rel" and items[0].args[0] == ("!=",) and not free_symbols(item):
            item = Expr("rel", (("!=",), items[0].args[1], item))  # x \neq 1, 2
        if item.op != "rel" and item.op not in {"union", "tup", "set", "builder", "mathbb"}:
            raise NotASetError("a list")
        parts.append(_read(item, subject))
    if kind == "or":
        return [piece for part in parts for piece in part]
    try:
        both = _intersection(parts)
    except NotASetError:
        both = []
    return both if both or kind == "and" else [piece for part in parts for piece in part]


def _relation(expr: Expr, variable: Expr | None) -> list[Piece]:
    relations, *members = expr.args
    if relations == ("in",):
        if members[1].op == "mathbb" and members[1].args[0] not in {"R", "R^+", "R_+"}:
            raise NotASetError("integers")
        return _read(members[1], None)
    if relations == ("notin",):
        return _complement(_read(members[1], None))
    if (
        relations[0] == "="
        and len(relations) == 1
        and members[1].op in {"tup", "union", "builder", "set", "diff", "inter", "mathbb"}
    ):
        return _read(members[1], None)
    if any(relation not in _FLIPPED for relation in relations):
        raise NotASetError("a relation")
    if len(members) == 2 and relations[0] in {"<", "<=", ">", ">="}:
        for inner, bound, relation in (
            (members[0], members[1], relations[0]),
            (members[1], members[0], _FLIPPED[relations[0]]),
        ):
            if inner.op == "pow" and inner.args[1] == num(2) and inner.args[0].op == "sym" and not free_symbols(bound):
                return _absolute(inner.args[0], relation, Expr("root", (num(2), bound)))
            if inner.op == "fn" and inner.args[0] == "abs" and not free_symbols(bound):
                return _absolute(inner.args[1], relation, bound)
    index = _subject(members, variable)
    low, low_closed, high, high_closed = MINUS_INFINITY, False, INFINITY, False
    for position, relation in enumerate(relations):
        left, right = members[position], members[position + 1]
        if position + 1 == index:  # bound relation subject
            bound, relation = left, _FLIPPED[relation]
        elif position == index:
            bound = right
        else:
            raise NotASetError("a chain of more than one subject")
        if relation == "=":
            return [Piece(value, True, value, True) for value in split_plus_minus(bound)]
        if relation == "!=":
            return _complement([Piece(value, True, value, True) for value in split_plus_minus(bound)])
        if relation in {">", ">="}:
            low, low_closed = bound, relation == ">="
        else:
            high, high_closed = bound, relation == "<="
    return [Piece(low, low_closed, high, high_closed)]


def _absolute(inner: Expr, relation: str, bound: Expr) -> list[Piece]:
    """`|x - a| < b` and its like, for a variable less a number."""
    if inner.op == "sym":
        shift = ZERO
    elif inner.op == "add" and inner.args[0].op == "sym" and not free_symbols(*inner.args[1:]):
        shift = negative(Expr("add", (*inner.args[1:], ZERO)))
    else:
        raise NotASetError("an absolute value")
    value = constant_value(bound)
    if value is None or context().im(value) != 0 or value < 0:
        raise NotASetError("a bound that is not positive")
    low, high = (Expr("add", (shift, end)) if shift != ZERO else end for end in (negative(bound), bound))
    closed = relation in {"<=", ">="}
    if relation in {"<", "<="}:
        return [Piece(low, closed, high, closed)]
    return [Piece(MINUS_INFINITY, False, low, closed), Piece(high, closed, INFINITY, False)]


def integers(builder: Expr) -> Expr | None:
    """`{x in Z | -1 <= x <= 2}` written out, if it is bounded and has at most `MAX_INTEGERS` members."""
    if builder.op != "builder":
        return None
    variable, condition = builder.args
    conditions = list(condition.args[1:]) if condition.op == "list" and condition.args[0] == "and" else [condition]
    domains = [
        part
        for part in (variable, *conditions)
        if part.op == "rel" and part.args[0] == ("in",) and part.args[2].op == "mathbb"
    ]
    if len(domains) != 1 or not domains[0].args[2].args[0].startswith(("Z", "N")):
        return None
    name, rest = domains[0].args[1], [part for part in conditions if part not in domains]
    try:
        found = _merged(_intersection([_read(part, name) for part in rest])) if rest else ()
    except NotASetError:
        return None
    if len(found) != 1:
        return None
    ends = [constant_value(end) for end in (found[0].low, found[0].high)]
    mp = context()
    if any(end is None or not mp.isfinite(end) or abs(end) > 10**9 for end in ends):
        return None
    first, last = int(mp.ceil(ends[0])), int(mp.floor(ends[1]))
    if domains[0].args[2].args[0] != "Z" and first < 1:
        return None
    first += first == ends[0] and not found[0].low_closed
    last -= last == ends[1] and not found[0].high_closed
    return Expr("set", tuple(num(k) for k in range(first, last + 1))) if last - first < MAX_INTEGERS else None


def _subject(members: list[Expr], variable: Expr | None) -> int:
    """Which member of a chain the inequalities speak of."""
    if variable is not None and variable in members:
        return members.index(variable)
    if len(members) == 3:
        if not free_symbols(members[1]):
            raise NotASetError("the middle of the chain is a number")
        return 1
    symbolic = [index for index, member in enumerate(members) if free_symbols(member)]
    if len(symbolic) == 1 and members[symbolic[0]].op in {"sym", "call", "fn", "text"}:
        return symbolic[0]
    plain = [index for index, member in enumerate(members) if member.op == "sym"]
    if len(plain) == 1 and len(members) == 2:
        return plain[0]
    raise NotASetError("no one variable")


def _order(left: Expr, right: Expr) -> int:
    if left == right:
        return 0
    first, second = constant_value(left), constant_value(right)
    if first is None or second is None:
        raise NotASetError("endpoints that have no order")
    mp = context()
    if mp.im(first) != 0 or mp.im(second) != 0:
        raise NotASetError("complex endpoints")
    return 0 if close(first, second, 50) else (-1 if mp.re(first) < mp.re(second) else 1)


def _merged(found: list[Piece]) -> tuple[Piece, ...]:
    kept = [
        piece
        for piece in found
        if (order := _order(piece.low, piece.high)) < 0 or (order == 0 and piece.low_closed and piece.high_closed)
    ]
    kept.sort(key=cmp_to_key(lambda one, two: _order(one.low, two.low) or (two.low_closed - one.low_closed)))
    merged: list[Piece] = []
    for piece in kept:
        last = merged[-1] if merged else None
        if last is not None and (
            (gap := _order(piece.low, last.high)) < 0 or (gap == 0 and (piece.low_closed or last.high_closed))
        ):
            order = _order(piece.high, last.high)
            longer = piece if order > 0 else last
            closed = (piece.high_closed or last.high_closed) if order == 0 else longer.high_closed
            merged[-1] = last._replace(high=longer.high, high_closed=closed)
        else:
            merged.append(piece)
    return tuple(merged)


def _complement(found: list[Piece]) -> list[Piece]:
    gaps, low, low_closed = [], MINUS_INFINITY, False
    for piece in _merged(found) if len(found) > 1 else found:
        gaps.append(Piece(low, low_closed, piece.low, not piece.low_closed))
        low, low_closed = piece.high, not piece.high_closed
    gaps.append(Piece(low, low_closed, INFINITY, False))
    return [gap for gap in gaps if gap.low != gap.high and not (gap.high == MINUS_INFINITY or gap.low == INFINITY)]


def _intersection(parts: list[list[Piece]]) -> list[Piece]:
    found = parts[0]
    for part in parts[1:]:
        if found == list(REALS) or part == list(REALS):
            found = part if found == list(REALS) else found
            continue
        crossed = []
        for one in found:
            for two in part:
                low_order, high_order = _order(one.low, two.low), _order(one.high, two.high)
                low, low_closed = (one.low, one.low_closed) if low_order > 0 else (two.low, two.low_closed)
                high, high_closed = (one.high, one.high_closed) if high_order < 0 else (two.high, two.high_closed)
                if low_order == 0:
                    low_closed = one.low_closed and two.low_closed
                if high_order == 0:
                    high_closed = one.high_closed and two.high_closed
                crossed.append(Piece(low, low_closed, high, high_closed))
        found = list(_merged(crossed))
    return found
