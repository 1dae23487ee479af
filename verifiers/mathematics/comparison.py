"""One comparison of two parsed answers, by their kinds and up to the names of parameters."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

from verifiers.mathematics import relations, sets
from verifiers.mathematics.exact import rational
from verifiers.mathematics.expr import (
    Expr,
    contains,
    free_symbols,
    negative,
    split_plus_minus,
    substitute,
    sym,
    walk,
)
from verifiers.mathematics.forms import simplified
from verifiers.mathematics.identity import same_expression
from verifiers.mathematics.members import MAX_ITEMS, Members
from verifiers.mathematics.options import MathOptions
from verifiers.mathematics.parser import Answer
from verifiers.mathematics.scalars import SCALARS, family_shift, is_scalar, same_family, same_scalar
from verifiers.mathematics.text import meaning, same_words, same_yes_or_no

_INTEGRATION_CONSTANTS = {"C", "c", "K", "C_1", "c_1"}
_NUMBERED_CONSTANT = re.compile(r"[CcK]_\d")
MAX_CONSTANTS = 4
_PARAMETERS = {"k", "n", "m", "l", "j", "t", "N", "K", "M", "s", "p"}
_CURVE_PARAMETERS = _PARAMETERS | {"lambda", "mu", "r", "u", "v", "alpha"}
_STRUCTURAL = frozenset({"cases", "row", "quantified", "modulo", "prime"})


class Comparison(Members):
    """The rules that need both whole answers: dispatch by kind, names, parameters."""

    def __init__(self, options: MathOptions, gold: Answer, answer: Answer) -> None:
        super().__init__(options)
        self.gold = gold
        self.answer = answer
        self.pairs = 0

    def run(self) -> bool:
        gold, answer = simplified(self.gold.tree), simplified(self.answer.tree)
        if gold == answer:
            return True
        if (verdict := same_yes_or_no(self.gold.text, self.answer.text)) is not None:
            return verdict
        if self.same(gold, answer):
            return True
        renamed = self.renamed(gold, answer)
        return renamed is not None and (self.same(gold, renamed[0]) or self.same_families(gold, renamed[0], renamed[1]))

    def same(self, gold: Expr, answer: Expr) -> bool:
        if gold == answer:
            return True
        if gold == sym("R") and answer.op in {"mathbb", "tup", "text"}:
            gold = Expr("mathbb", ("R",))
        self.pairs += 1
        if self.pairs > 4 * MAX_ITEMS:
            return False
        if is_scalar(gold) and is_scalar(answer):
            return same_scalar(gold, answer, self.options)
        if gold.op == "text" or answer.op == "text":
            return self.same_text(gold, answer)
        if gold.op == "clock" or answer.op == "clock":
            return self.same_clock(gold, answer)
        if relations.is_equality(gold) or relations.is_equality(answer):
            return self.same_equality(gold, answer)
        if gold.op == "matrix" or answer.op == "matrix":
            return self.same_matrix(gold, answer)
        if "cases" in {gold.op, answer.op} and (is_scalar(gold) or is_scalar(answer)):
            return self.same_piecewise(gold, answer)
        if "modulo" in {gold.op, answer.op} and {gold.op, answer.op} <= {"modulo"} | SCALARS:
            return self.same_residue(gold, answer)
        if gold.op in _STRUCTURAL or answer.op in _STRUCTURAL:
            return self.same_structure(gold, answer)
        if gold.op == answer.op == "rel" and "===" in gold.args[0]:
            return relations.same_chain(gold, answer, self.same)
        if sets.is_set_like(gold) or sets.is_set_like(answer):
            return self.same_set(gold, answer)
        return self.same_collection(gold, answer)

    def same_piecewise(self, gold: Expr, answer: Expr) -> bool:
        """A definition by cases against one expression: at its single points, and elsewhere by value."""
        definition, other = (gold, answer) if gold.op == "cases" else (answer, gold)
        rest = []
        for row in definition.args:
            condition = row.args[-1]
            if len(row.args) == 2 and relations.is_equality(condition):
                name, point = relations.read(condition)[:2]
                if name is None or name.op != "sym" or point is None:
                    return False
                if not same_expression(row.args[0], substitute(other, {name.args[0]: point})):
                    return False
            else:
                rest.append(row)
        return same_expression(
            *((Expr("cases", tuple(rest)), other) if definition is gold else (other, Expr("cases", tuple(rest))))
        )

    def same_residue(self, gold: Expr, answer: Expr) -> bool:
        """`1 \\pmod 4` and `5 \\pmod 4`; the residue alone as it is."""
        one, two = (part.args if part.op == "modulo" else (part, None) for part in (gold, answer))
        if one[1] is not None and two[1] is not None:
            step = Expr("mul", (Expr("add", (one[0], negative(two[0]))), Expr("inv", (one[1],))))
            quotient = rational(step)
            return self.same(one[1], two[1]) and (
                self.same(one[0], two[0]) or (quotient is not None and quotient.denominator == 1)
            )
        return self.same(one[0], two[0])

    def same_text(self, gold: Expr, answer: Expr) -> bool:
        if gold.op == answer.op == "text":
            return same_words(gold.args[0], answer.args[0])
        words, other = (gold, answer) if gold.op == "text" else (answer, gold)
        if re.fullmatch(r"[A-H]{2,6}", words.args[0]) and other.op in {"list", "mul"}:  # choices
            letters = [
                part.args[0] if part.op in {"sym", "text"} else "" for part in other.args if isinstance(part, Expr)
            ]
            return sorted(words.args[0]) == sorted(letters)
        if other.op == "list" and all(part.op == "text" for part in other.args[1:]):
            joined = " ".join(part.args[0] for part in other.args[1:])
            return same_words(*((words.args[0], joined) if words is gold else (joined, words.args[0])))
        said = meaning(words.args[0])
        if said == "none":
            return other == Expr("set", ())
        if said == "inf":
            return other == Expr("const", ("inf",))
        try:
            known = sets.pieces(Expr("text", (said,)))
            return sets.same_pieces(known, sets.pieces(other), self.same)
        except sets.NotASetError:
            pass
        if relations.is_equality(other):
            reading = relations.read(other)
            return (
                reading.value is not None
                and reading.value.op == "text"
                and same_words(
                    gold.args[0] if words is gold else reading.value.args[0],
                    answer.args[0] if words is answer else reading.value.args[0],
                )
            )
        letters = [part.args[0] for part in walk(other) if part.op == "sym"]
        if other.op in {"mul", "sym"} and all(part.op in {"sym", "const"} for part in walk(other) if part is not other):
            plain = "".join(str(part.args[0]) for part in (other.args if other.op == "mul" else (other,)))
            return bool(letters) and plain.lower() == said
        return False

    def same_clock(self, gold: Expr, answer: Expr) -> bool:
        if gold.op == answer.op == "clock":
            return bool(_seconds(gold) & _seconds(answer)) and len({gold.args[0], answer.args[0]} - {""}) < 2
        one, two = (Expr("ratio", part.args[1:]) if part.op == "clock" else part for part in (gold, answer))
        return is_scalar(one) and is_scalar(two) and same_scalar(one, two, self.options)

    def same_equality(self, gold: Expr, answer: Expr) -> bool:
        one, two = relations.read(gold), relations.read(answer)
        if one.false or two.false:
            return False
        if one.name is not None and two.name is not None:
            if (
                one.value is not None
                and two.value is not None
                and self.same_names(one.name, two.name)
                and self.same(one.value, two.value)
            ):
                return True
            if relations.same_definition(one, two, self.same) or relations.same_sequence(one, two, self.same):
                return True
            return self.simple_equation(gold, answer)
        if one.value is not None and two.value is not None and self.same_named(one, two):
            return True
        if relations.is_equality(gold) and relations.is_equality(answer):
            return self.simple_equation(gold, answer)
        if relations.is_equality(gold) and is_scalar(answer):
            return relations.solves(gold, answer)
        return False

    def simple_equation(self, gold: Expr, answer: Expr) -> bool:
        if contains(gold, "pm") or contains(answer, "pm"):  # y = \\pm 2x is two lines
            one, two = split_plus_minus(gold), split_plus_minus(answer)
            return len(one) == len(two) and self.matched(list(one), list(two))
        return all(is_scalar(part) for expr in (gold, answer) for part in expr.args[1:]) and relations.same_equation(
            gold, answer
        )

    def same_named(self, one: relations.Reading, two: relations.Reading) -> bool:
        """A named value against a bare one; the name may also be a tuple of names for a list of named values."""
        assert one.value is not None
        assert two.value is not None
        if self.same(one.value, two.value):
            return True
        for named, bare, gold_named in ((one, two, True), (two, one, False)):
            if (
                named.name is None
                or bare.value is None
                or named.value is None
                or named.name.op != "tup"
                or bare.value.op != "list"
            ):
                continue
            values = self.named_values(bare.value)
            names = list(named.name.args[2:])
            if (
                values is None
                or named.value.op != "tup"
                or set(values) != set(names)
                or len(names) != len(named.value.args) - 2
            ):
                continue
            ordered = [values[name] for name in names]
            pairs = zip(named.value.args[2:], ordered, strict=True)
            return all(self.same(left, right) if gold_named else self.same(right, left) for left, right in pairs)
        return False

    def same_names(self, gold: Expr, answer: Expr) -> bool:
        if gold.op == "text" or answer.op == "text":
            return True
        if gold.op == "tup" and answer.op == "tup":
            return len(gold.args) == len(answer.args)
        if gold.op == answer.op == "call":
            return gold == answer
        return (
            gold == answer
            or {gold.op, answer.op} == {"sym", "call"}
            or (gold.op == "mul" and answer.op == "mul" and sorted(gold.args) == sorted(answer.args))
        )

    def same_set(self, gold: Expr, answer: Expr) -> bool:
        try:
            return sets.same_pieces(sets.pieces(gold), sets.pieces(answer), self.same)
        except sets.NotASetError:
            pass
        if gold.op == answer.op == "rel":
            return relations.same_chain(gold, answer, self.same)
        if (gold.op == "rel" and answer.op == "list" and all(relation in {"<", "<="} for relation in gold.args[0])) or (
            gold.op == "rel" and answer.op == "list" and all(relation in {">", ">="} for relation in gold.args[0])
        ):
            members, items = gold.args[1:], answer.args[1:]
            return len(members) == len(items) > 2 and all(part.op == "sym" for part in members) and members == items
        if gold.op == "rel" and gold.args[0] == ("in",):
            return self.same(
                gold.args[2], answer.args[2] if answer.op == "rel" and answer.args[0] == ("in",) else answer
            )
        if answer.op == "rel" and answer.args[0] == ("in",):
            return self.same(gold, answer.args[2])
        if gold.op == answer.op:
            return self.same_structure(gold, answer)
        return False

    def same_structure(self, gold: Expr, answer: Expr) -> bool:
        """The same form, part by part; the rows of a piecewise definition and the parts of a list in any order."""
        if gold.op != answer.op or len(gold.args) != len(answer.args):
            return False
        if gold.op == answer.op == "builder" and gold.args[0].op == answer.args[0].op == "sym":
            name = answer.args[0].args[0]
            return self.same(gold.args[1], substitute(answer.args[1], {name: gold.args[0]}))
        if gold.op in {"cases", "union", "list"}:
            parts = [[part for part in expr.args if isinstance(part, Expr)] for expr in (gold, answer)]
            return self.matched(parts[0], parts[1])
        return all(
            self.same(one, two) if isinstance(one, Expr) and isinstance(two, Expr) else one == two
            for one, two in zip(gold.args, answer.args, strict=True)
        )

    def renamed(self, gold: Expr, answer: Expr) -> tuple[Expr, str] | None:
        """The answer with its integer parameter under the gold's name."""
        left, right = self.variables(gold), self.variables(answer)
        only_gold, only_answer = left - right, right - left
        numbered = {name for name in left if _NUMBERED_CONSTANT.fullmatch(name)}
        if len(numbered) > 1 and len(left) == len(right) and left - numbered <= right:
            return self.renamed_constants(gold, answer, sorted(numbered), sorted(right - (left - numbered)))
        if not only_gold and not only_answer:
            shared = (self.gold.parameters | self.answer.parameters | _PARAMETERS) & left & right
            return (answer, min(shared)) if len(shared) == 1 else None
        if len(only_gold) != 1 or len(only_answer) != 1:
            return None
        (old,), (new,) = only_answer, only_gold
        constants = _INTEGRATION_CONSTANTS | (
            {"k", "A"} if len(left) > 1 and _INTEGRATION_CONSTANTS & {old, new} else set()
        )
        if {old, new} <= constants and is_scalar(relations.read(answer).value or answer):
            return substitute(answer, {old: sym(new)}), new
        one, two = relations.read(gold), relations.read(answer)
        same_name = one.name is not None and one.name == two.name
        curve = gold.op == answer.op == "tup" and len(left) == len(right) == 1
        by_gold, by_answer = (self.named_values(part) if part.op == "list" else None for part in (gold, answer))
        same_names = by_gold is not None and by_answer is not None and set(by_gold) == set(by_answer)
        if (same_name or same_names or curve) and {old, new} <= _CURVE_PARAMETERS:
            return substitute(answer, {old: sym(new)}), new
        declared = old in self.answer.parameters or new in self.gold.parameters
        periodic = (
            old in _PARAMETERS and new in _PARAMETERS and contains_period(gold, new) and contains_period(answer, old)
        )
        if not declared and not periodic:
            return None
        return substitute(answer, {old: sym(new)}), new

    def renamed_constants(self, gold: Expr, answer: Expr, old: list[str], new: list[str]) -> tuple[Expr, str] | None:
        """The answer with its arbitrary constants (C_1, C_2, or A, B) under the gold's names, in the order that fits."""
        if len(old) > MAX_CONSTANTS or not set(new) <= {"A", "B", "C", "D", *old}:
            return None
        for order in itertools.permutations(old):
            other = substitute(answer, {name: sym(to) for name, to in zip(new, order, strict=True)})
            if self.same(gold, other):
                return other, old[0]
        return None

    def variables(self, expr: Expr) -> set[str]:
        """The free variables of the values, without the names that they are given."""
        return set(free_symbols(*self.elements(relations.read(expr).value or expr)[1]))

    def same_families(self, gold: Expr, answer: Expr, parameter: str) -> bool:
        """Every value of one side is a family of the other: shifted by whole periods."""
        if parameter not in self.gold.parameters | self.answer.parameters and not contains_period(gold, parameter):
            return False
        if gold.op == answer.op == "tup":  # an interval moves as a whole
            shifts = [
                family_shift(one, two, parameter) for one, two in zip(gold.args[2:], answer.args[2:], strict=False)
            ]
            return (
                gold.args[:2] == answer.args[:2] and len(shifts) == 2 and None not in shifts and shifts[0] == shifts[1]
            )
        left, right = self.elements(gold)[1], self.elements(answer)[1]
        if not left or len(left) != len(right) or not all(is_scalar(item) for item in (*left, *right)):
            return False
        return self.matched(
            left, right, lambda one, two: same_scalar(one, two, self.options) or same_family(one, two, parameter)
        )


def _seconds(clock: Expr) -> set[Fraction]:
    """The times of day that a clock shows, in seconds: with neither a.m. nor p.m. as on a 24-hour clock."""
    half, hours, *rest = clock.args
    smaller = sum(part.args[0] * scale for part, scale in zip(rest, (60, 1), strict=False))
    if half:
        return {(hours.args[0] % 12 + (12 if half == "p" else 0)) * 3600 + smaller, hours.args[0] * 3600 + smaller}
    return {hours.args[0] * 3600 + smaller}


def contains_period(expr: Expr, parameter: str) -> bool:
    """Whether the parameter multiplies π or degrees somewhere, or the answer declares it."""
    for node in walk(expr):
        if node.op in {"mul", "deg"} and parameter in free_symbols(node) and (node.op == "deg" or contains_pi(node)):
            return True
    return False


def contains_pi(expr: Expr) -> bool:
    return any(node == Expr("const", ("pi",)) or node.op == "deg" for node in walk(expr))
