"""Collections against collections: lists, sets, tuples and matrices, member by member."""

from __future__ import annotations

from collections.abc import Sequence

from verifiers.mathematics import relations
from verifiers.mathematics.expr import (
    Expr,
    split_plus_minus,
)
from verifiers.mathematics.options import MathOptions
from verifiers.mathematics.scalars import is_scalar
from verifiers.mathematics.text import meaning

MAX_ITEMS = 200


class Members:
    """The comparison of collections; `same` compares two members."""

    def __init__(self, options: MathOptions) -> None:
        self.options = options

    def same(self, gold: Expr, answer: Expr) -> bool:
        raise NotImplementedError

    def elements(self, expr: Expr) -> tuple[list[Expr | None], list[Expr]]:
        """Names and values of a collection's members, ± written out; one value is a collection of one."""
        if expr.op == "list":
            items: Sequence[Expr] = expr.args[1:]
        elif expr.op == "set":
            items = expr.args
        elif expr.op == "tup":
            items = expr.args[2:]
        else:
            items = (expr,)
        names: list[Expr | None] = []
        values: list[Expr] = []
        for item in items:
            reading = relations.read(item)
            value = reading.value if reading.value is not None else item
            inner: Sequence[Expr] = (value,)
            if value.op in {"list", "set"} and value.op != expr.op:
                inner = value.args[1:] if value.op == "list" else value.args
            for part in inner:
                for branch in split_plus_minus(part):
                    names.append(reading.name)
                    values.append(branch)
        return names, values

    def named_values(self, expr: Expr) -> dict[Expr, Expr] | None:
        """The members by name, if each has its own."""
        names, values = self.elements(expr)
        plain = [
            Expr("text", (meaning(name.args[0]),)) if name.op == "text" else name for name in names if name is not None
        ]
        return dict(zip(plain, values, strict=True)) if len(plain) == len(values) == len(set(plain)) else None

    def same_collection(self, gold: Expr, answer: Expr) -> bool:
        gold, answer = _as_letters(gold, answer), _as_letters(answer, gold)
        kinds = {gold.op, answer.op}
        if "tup" in kinds and "set" in kinds:
            return False
        if not kinds <= {"list", "set", "tup"} and not all(
            is_scalar(part) or part.op in {"list", "set", "tup"} for part in (gold, answer)
        ):
            return False
        if kinds == {"tup"}:
            return self.same_tuple(gold, answer)
        if "tup" in kinds:
            return self.tuple_or_list(gold, answer)
        return self.same_list(gold, answer)

    def same_tuple(self, gold: Expr, answer: Expr) -> bool:
        if len(gold.args) != len(answer.args):
            return False
        if len(gold.args) == 4 and gold.args[:2] != answer.args[:2]:
            return False
        return all(
            self.same(relations.read(one).value or one, relations.read(two).value or two)
            for one, two in zip(gold.args[2:], answer.args[2:], strict=True)
        )

    def tuple_or_list(self, gold: Expr, answer: Expr) -> bool:
        """A point given without its brackets, or by the names of its coordinates, in order."""
        one, two = self.elements(gold)[1], self.elements(answer)[1]
        if len(one) != len(two) or len(one) < 2 or any(part.op in {"tup", "list"} for part in (*one, *two)):
            return False
        if "list" not in {gold.op, answer.op}:
            return False
        return all(self.same(left, right) for left, right in zip(one, two, strict=True))

    def same_list(self, gold: Expr, answer: Expr) -> bool:
        """Lists and sets: by name where both name their members, else in any order."""
        by_gold, by_answer = self.named_values(gold), self.named_values(answer)
        if by_gold and by_answer and len(by_gold) > 1 and not (self.are_roots(by_gold) and self.are_roots(by_answer)):
            if set(by_gold) == set(by_answer):
                return all(self.same(value, by_answer[name]) for name, value in by_gold.items())
            if all(name.op != "text" for name in (*by_gold, *by_answer)) and not (
                self.has_equation(gold) or self.has_equation(answer)
            ):
                return False
        if (
            self.all_equations(gold)
            and self.all_equations(answer)
            and (self.has_equation(gold) or self.has_equation(answer))
        ):
            return self.matched(list(gold.args[1:]), list(answer.args[1:]))
        one, two = self.elements(gold)[1], self.elements(answer)[1]
        if (
            gold.op != "list" and is_scalar(gold) and len(one) == 1 < len(two)
        ):  # one value in several forms: "15\\frac{39}{40}, or \\frac{639}{40}"
            return len(two) <= 3 and answer.op == "list" and all(self.same(gold, value) for value in two)
        if "set" in {gold.op, answer.op} and len(one) != len(two):
            one, two = self.distinct(one), self.distinct(two)
        if len(one) != len(two) or len(one) > MAX_ITEMS:
            return False
        ordered = all(self.same(left, right) for left, right in zip(one, two, strict=True))
        named = self.has_own_names(by_gold) != self.has_own_names(by_answer)
        if ordered or named or (not self.options.unordered_lists and gold.op == answer.op == "list"):
            return ordered
        return self.matched(one, two) or (
            any(part.op == "rel" for part in (*gold.args, *answer.args) if isinstance(part, Expr))
            and gold.op == answer.op == "list"
            and any(
                relations.read(part) == relations.Reading(None, None) for part in (*gold.args[1:], *answer.args[1:])
            )
            and self.matched(list(gold.args[1:]), list(answer.args[1:]))
        )

    def all_equations(self, expr: Expr) -> bool:
        return expr.op == "list" and all(relations.is_equality(part) for part in expr.args[1:])

    def has_equation(self, expr: Expr) -> bool:
        """Whether a member is an equation that gives no value to a name."""
        return any(relations.read(part) == relations.Reading(None, None) for part in expr.args[1:])

    def has_own_names(self, values: dict[Expr, Expr] | None) -> bool:
        """Whether the members are variables of their own (x, y), so that a bare list must keep their order."""
        return bool(values) and not self.are_roots(values) and all(name.op != "text" for name in values)

    @staticmethod
    def are_roots(values: dict[Expr, Expr]) -> bool:
        """Whether the names are x_1, x_2, ..: the roots of an equation, whose numbering means nothing."""
        return {str(name.args[0]) for name in values} == {f"x_{index}" for index in range(1, len(values) + 1)}

    def distinct(self, values: list[Expr]) -> list[Expr]:
        kept: list[Expr] = []
        for value in values[:MAX_ITEMS]:
            if not any(self.same(value, other) for other in kept):
                kept.append(value)
        return kept

    def matched(self, gold: list[Expr], answer: list[Expr], same: relations.Same | None = None) -> bool:
        """Each gold member with an answer member of its own."""
        rest = list(answer)
        for item in gold:
            found = next((index for index, other in enumerate(rest) if (same or self.same)(item, other)), None)
            if found is None:
                return False
            rest.pop(found)
        return not rest

    def same_matrix(self, gold: Expr, answer: Expr) -> bool:
        """Cell by cell; a vector in round or square brackets is a row or a column."""
        one, two = self.rows(gold), self.rows(answer)
        if one is None or two is None:
            return False
        if "tup" in {gold.op, answer.op} and 1 in {len(one), len(two)}:
            one, two = ([tuple(cell for row in rows for cell in row)] for rows in (one, two))
        if [len(row) for row in one] != [len(row) for row in two]:
            return False
        return all(
            self.same(a, b) for left, right in zip(one, two, strict=True) for a, b in zip(left, right, strict=True)
        )

    def rows(self, expr: Expr) -> list[tuple[Expr, ...]] | None:
        """Rows of a matrix, or of brackets of brackets; brackets alone are one column."""
        if expr.op == "matrix":
            return [row.args for row in expr.args]
        if expr.op == "tup":
            parts = expr.args[2:]
            if all(part.op == "tup" for part in parts):
                return [part.args[2:] for part in parts]
            return [(part,) for part in parts]
        return None


def _as_letters(expr: Expr, other: Expr) -> Expr:
    """`ABD` against a list of letters: the choices, not a product."""
    if (
        other.op not in {"list", "set"}
        or expr.op != "mul"
        or any(part.op != "sym" for part in other.args if isinstance(part, Expr))
    ):
        return expr
    capitals = all(part.op == "sym" and len(part.args[0]) == 1 and part.args[0].isupper() for part in expr.args)
    return Expr("list", (",", *expr.args)) if capitals else expr
