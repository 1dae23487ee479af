"""An answer brought to one form before it is compared: families, grouped solutions, scaled matrices."""

from __future__ import annotations

from verifiers.mathematics import relations, sets
from verifiers.mathematics.expr import Expr, sym


def simplified(expr: Expr) -> Expr:
    """Set-builders over the integers written out, and a number times a matrix multiplied."""
    if expr.op == "builder":
        expr = _family(expr)
        return sets.integers(expr) or expr
    if expr.op == "list":
        return _grouped(expr)
    if expr.op == "mul" and sum(part.op == "matrix" for part in expr.args) == 1:
        matrix = next(part for part in expr.args if part.op == "matrix")
        scale = tuple(part for part in expr.args if part.op != "matrix")
        rows = (Expr("row", tuple(Expr("mul", (*scale, cell)) for cell in row.args)) for row in matrix.args)
        return Expr("matrix", tuple(rows))
    return expr


def _grouped(expr: Expr) -> Expr:
    """`x=1, y=2 or x=2, y=1` as the list of the pairs (1, 2) and (2, 1)."""
    read = [relations.read(part) for part in expr.args[1:]]
    names = [_numbered(reading.name) for reading in read]
    values = [reading.value for reading in read]
    count = len(set(names))
    if not 2 <= count < len(names) or len(names) % count or None in names or None in values:
        return expr
    groups = range(0, len(names), count)
    if any(names[start : start + count] != names[:count] for start in groups) or names[0] in names[1:count]:
        return expr
    return Expr("list", (",", *(Expr("tup", ("(", ")", *values[start : start + count])) for start in groups)))


def _numbered(name: Expr | None) -> Expr | None:
    """`x_2` as x: the second solution's x."""
    if name is None or name.op != "sym":
        return name
    letter, _, index = name.args[0].partition("_")
    return sym(letter) if index.isdigit() else name


def _family(expr: Expr) -> Expr:
    """`\\{2k \\mid k \\in \\mathbb{Z}\\}` and `\\{x \\mid x = 2k, k \\in \\mathbb{Z}\\}` as the family 2k."""
    if expr.op != "builder":
        return expr
    variable, condition = expr.args
    conditions = condition.args[1:] if condition.op == "list" else (condition,)
    domains = [
        part for part in conditions if part.op == "rel" and part.args[0] == ("in",) and part.args[2].op == "mathbb"
    ]
    rest = [part for part in conditions if part not in domains]
    if len(domains) != 1 or domains[0].args[2].args[0] != "Z" or domains[0].args[1] == variable:
        return expr
    if not rest:
        return variable
    if len(rest) == 1 and rest[0].op == "rel" and rest[0].args[:2] == (("=",), variable):
        return rest[0].args[2]
    return expr
