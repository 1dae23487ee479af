"""Recursive descent over the tokens of one expression: sums, products, and powers and marks after a factor.

Every rule consumes tokens or raises, so the time is linear; the depth of nesting is bounded by `cursor.MAX_DEPTH`.
"""

from __future__ import annotations

from fractions import Fraction

from verifiers.mathematics.brackets import CLOSERS
from verifiers.mathematics.cursor import letter, product
from verifiers.mathematics.expr import (
    ONE,
    ZERO,
    Expr,
    TooLargeError,
    const,
    negative,
    num,
    sym,
)
from verifiers.mathematics.functions import FRACTIONS, STARTING_COMMANDS, Functions
from verifiers.mathematics.tokens import NumberToken, shown
from verifiers.mathematics.units import is_unit
from verifiers.mathematics.words import NUMBER_WORDS, SCALES

MAX_POSTFIX = 12
_MULTIPLY = {"cdot", "times", "ast", "star", "bullet"}
_DIVIDE = {"div", "colon"}
_SET_OPERATIONS = {
    "cup": "union",
    "bigcup": "union",
    "cupdot": "union",
    "cap": "inter",
    "bigcap": "inter",
    "setminus": "diff",
    "backslash": "diff",
    "smallsetminus": "diff",
}


class Grammar(Functions):
    """The rules of one expression."""

    def expression(self) -> Expr:
        """A sum of terms, with set operations around it."""
        depth = self.depth
        self.descend()
        value = self.sum()
        while self.peek().kind == "cmd" and (operation := _SET_OPERATIONS.get(self.peek().value)):
            self.next()
            right = self.sum()
            if value.op != operation:
                self.descend()
            value = (
                Expr(operation, (*value.args, right))
                if value.op == operation != "diff"
                else Expr(operation, (value, right))
            )
        if self.peek().kind == "cmd" and self.peek().value in {"over", "choose"}:
            binomial = self.next().value == "choose"
            below = self.sum()
            value = Expr("fn", ("binom", value, below)) if binomial else Expr("mul", (value, Expr("inv", (below,))))
        self.depth = depth
        return value

    def sum(self) -> Expr:
        terms = [self.term()]
        while True:
            token = self.peek()
            if token.kind == "op" and token.value in "+-":
                self.next()
                right = self.term()
                if (
                    terms[-1].op in {"set", "builder", "mathbb", "tup"}
                    and right.op == "set"
                    and token.value == "-"
                    and len(terms) == 1
                ):
                    terms = [Expr("diff", (terms[0], right))]
                else:
                    terms.append(right if token.value == "+" else negative(right))
            elif token.kind == "cmd" and token.value in {"pm", "mp"}:
                self.next()
                left = terms[0] if len(terms) == 1 else Expr("add", tuple(terms))
                terms = [Expr("pm", (left, self.term(), 1 if token.value == "pm" else -1))]
                self.descend()
            else:
                break
        return terms[0] if len(terms) == 1 else Expr("add", tuple(terms))

    def term(self) -> Expr:
        sign = self.sign()
        if self.peek().kind == "cmd" and self.peek().value in {"pm", "mp"}:
            upper = 1 if self.next().value == "pm" else -1
            self.descend()
            value = self.term()
            self.depth -= 1
            return Expr("pm", (ZERO, value, upper * sign))
        factors = [self.factor()]
        ratio: list[Expr] = []
        while True:
            token = self.peek()
            if token.kind == "op" and token.value == ":" and not self.builder:
                self.next()
                ratio.append(product(factors))
                factors = [self.signed_factor()]
            elif token.kind == "text" and token.value == "to" and self.peek(1).kind == self.peek(-1).kind == "num":
                self.next()
                ratio.append(product(factors))
                factors = [self.signed_factor()]
            elif (token.kind == "op" and token.value in {"*", "/"}) or (
                token.kind == "cmd" and token.value in _MULTIPLY | _DIVIDE
            ):
                if token.value in {"*", "cdot"} and self.peek(1).kind == "text":
                    break
                self.next()
                divides = token.value == "/" or token.value in _DIVIDE
                right = self.signed_factor()
                factors.append(Expr("inv", (right,)) if divides else right)
            elif self.starts_factor(factors):
                factors.append(self.juxtaposed(factors))
            else:
                break
        value = product(factors)
        if ratio:
            value = Expr("ratio", (*ratio, value))
        return value if sign > 0 else negative(value)

    def sign(self) -> int:
        sign = 1
        while self.at("+", "-"):
            if self.next().value == "-":
                sign = -sign
        return sign

    def signed_factor(self) -> Expr:
        sign = self.sign()
        return self.factor() if sign > 0 else negative(self.factor())

    def starts_factor(self, factors: list[Expr]) -> bool:
        """Whether the next token multiplies the last factor by standing beside it."""
        kind, value, _ = self.peek()
        if kind in {"name", "const", "fn", "begin"}:
            return not (value in {"C", "F"} and factors[-1].op == "deg")
        if kind == "num":
            return self.peek(-1).kind != "num" or (factors[-1].op == "num" and self.is_plain_mixed())
        if kind == "op":
            if value == "|":
                return not self.bars and not self.builder
            if value == "(" and (self.is_word(self.peek(1)) or self.opens_condition()):
                return False
            return value in {"(", "[", "{", "\\{"}
        if kind == "text":
            return self.is_letter_text(value) and not (factors and self.is_unit_text(factors[-1], value))
        return kind == "cmd" and value in STARTING_COMMANDS

    def is_unit_text(self, last: Expr, value: str) -> bool:
        """Whether a word of one letter after this factor is its unit."""
        if last.op == "deg":
            return value in {"C", "F"}
        return last.op in {"num", "mul", "pow", "inv", "sym", "const", "root"} and is_unit(value)

    def is_plain_mixed(self) -> bool:
        """`2 1/2`: white space, an integer, a slash, an integer."""
        return (
            self.peek().spaced and self.peek(1).kind == "op" and self.peek(1).value == "/" and self.peek(2).kind == "num"
            and self.peek(-1).kind == "num" and self.peek(-1).value.digits.isdigit() and self.peek().value.digits.isdigit()
        )  # fmt: skip

    def juxtaposed(self, factors: list[Expr]) -> Expr:
        """The factor that follows without a sign; an integer before a proper fraction makes a mixed number."""
        last = factors[-1]
        whole = (
            last.op == "num" and last.args[1] is None and last.args[0].denominator == 1 and self.peek(-1).kind == "num"
        )
        if self.peek().kind == "num" and last.op == "num":
            if not self.is_plain_mixed():
                self.fail("a number follows a number")
            above, below = self.next().value.value, (self.next(), self.next())[1].value.value
            if not 0 < above < below or len(factors) > 1:
                self.fail("this is no mixed number")
            factors.pop()
            return num(last.args[0] + above / below)
        is_fraction = self.peek().kind == "cmd" and self.peek().value in FRACTIONS
        right = self.factor()
        if is_fraction and whole and len(factors) == 1:
            marked = right.op in {"pct", "deg"}
            proper = _proper_fraction(right.args[0] if marked else right)
            if proper:
                factors.pop()
                mixed = num(last.args[0] + proper)
                return Expr(right.op, (mixed,)) if marked else mixed
        if last.op == "deg" and right.op == "arc":
            factors.pop()
            return Expr("deg", (Expr("add", (last.args[0], right.args[0])),))
        return right

    def factor(self) -> Expr:
        """A primary with what stands after it: power, factorial, degree, percent, prime."""
        value = self.primary()
        for _ in range(MAX_POSTFIX):
            token = self.peek()
            if token.kind == "op" and token.value == "^":
                self.next()
                value = self.power(value)
            elif (
                token.kind == "op"
                and token.value == "!"
                and not (self.peek(1).kind == "op" and self.peek(1).value == "=")
            ):
                self.next()
                double = self.at("!") and not self.peek().spaced
                if double:
                    self.next()
                value = Expr("fn", ("fac2", value)) if double else Expr("fact", (value,))
            elif token.kind == "op" and token.value in {"%", "\\%"}:
                self.next()
                value = Expr("pct", (value,))
            elif token.kind == "op" and token.value == "'":
                value = self.primes(value)
            elif token.kind == "cmd" and token.value in {"degree", "circ"}:
                self.next()
                value = Expr("deg", (value,))
            elif token.kind == "op" and token.value == "_" and value.op == "pow" and value.args[0].op == "sym":
                self.next()  # v^2_0 is (v_0)^2
                value = Expr("pow", (sym(f"{value.args[0].args[0]}_{self.subscript()}"), value.args[1]))
            elif token.kind == "op" and token.value == "_" and value.op in {"num", "tup", "call", "fn"}:
                self.next()
                value = self.based(value)
            else:
                return value
        raise TooLargeError(f"more than {MAX_POSTFIX} marks after one factor")

    def primes(self, value: Expr) -> Expr:
        count = 0
        while self.at("'"):
            self.next()
            count += 1
        if value.op == "num":
            return Expr("arc", (num(value.args[0] / 60**count),)) if count <= 2 else self.fail("too many primes")
        if value.op == "sym":
            return self.application(value.args[0] + "'" * count)
        return Expr("call", ("'" * count, value))

    def based(self, value: Expr) -> Expr:
        """`204_5`: the digits read in that base."""
        digits = self.tokens[self.position - 2].value
        base = self.script()
        if value.op != "num" or not isinstance(digits, NumberToken) or base.op not in {"num", "text"}:
            self.fail("this subscript is not understood")
        radix = NUMBER_WORDS.get(base.args[0], 0) if base.op == "text" else int(base.args[0])
        whole, _, fraction = digits.digits.partition(".")
        known = (whole + fraction).isdecimal() and 2 <= radix <= 36
        if not known or any(int(digit) >= radix for digit in whole + fraction):
            self.fail("these are no digits of that base")
        exact = Fraction(int(whole + fraction, radix), radix ** len(fraction))
        sign = -1 if value.args[0] < 0 else 1
        return Expr("based", (num(sign * exact), radix, num(value.args[0])))

    def power(self, base: Expr) -> Expr:
        if self.peek().kind == "cmd" and self.peek().value == "circ":
            self.next()
            return Expr("deg", (base,))
        if self.at("'"):
            return base
        if (
            base.op == "num"
            and self.at("{")
            and f"{self.peek(1).value}{self.peek(2).value}" in {"th", "st", "nd", "rd"}
        ):
            self.position += 3
            self.expect("}")
            return base
        if self.peek().kind == "text" and self.peek().value in {"th", "st", "nd", "rd", "o", "T"}:
            return base if self.next().value not in {"o", "T"} else Expr("deg", (base,))
        exponent = self.script()
        if exponent == Expr("deg", (ONE,)) or (exponent == sym("o") and base.op == "num"):
            return Expr("deg", (base,))
        if exponent.op == "text" and exponent.args[0] in {"th", "st", "nd", "rd"}:
            return base
        if exponent.op == "prime":
            return self.application(base.args[0] + "'" * exponent.args[0]) if base.op == "sym" else base
        return Expr("pow", (base, exponent))

    def script(self) -> Expr:
        """What stands after ^ or _: a braced group, or one factor (with its sign, and powers to the right)."""
        if not self.at("{"):
            self.descend()
            sign = self.sign()
            value = self.text_factor() if self.peek().kind == "text" else self.primary()
            if self.at("^"):
                self.next()
                value = self.power(value)
            self.depth -= 1
            return value if sign > 0 else negative(value)
        start = self.position
        self.next()
        token, after = self.peek(), self.peek(1)
        if token.kind == "cmd" and token.value in {"circ", "degree"} and after.value == "}":
            self.position += 2
            return Expr("deg", (ONE,))
        if (token.kind == "op" and token.value == "'") or (token.kind == "cmd" and token.value == "prime"):
            count = 0
            while not self.at("}"):
                count += 1
                if self.next().kind == "end":
                    self.fail("} is missing")
            self.next()
            return Expr("prime", (count,))
        if token.kind == "text" and after.kind == "op" and after.value == "}":
            self.position += 2
            return (
                Expr("text", (token.value,))
                if not self.is_letter_text(token.value)
                else letter(token.value, self.bound)
            )
        self.position = start
        return self.group("{")

    def text_factor(self) -> Expr:
        word = self.next().value
        if word.lower() in NUMBER_WORDS:
            return num(NUMBER_WORDS[word.lower()])
        return letter(word, self.bound) if self.is_letter_text(word) or word == "a" else Expr("text", (word,))

    def primary(self) -> Expr:
        """One operand; every way to nest operands passes here, so that their depth is counted here."""
        self.descend()
        value = self.operand()
        self.depth -= 1
        return value

    def operand(self) -> Expr:
        token = self.next()
        kind, value = token.kind, token.value
        if kind == "num":
            return Expr("num", (value.value, value.places))
        if kind == "name":
            return self.named(value)
        if kind == "const":
            return const(value) if value not in self.bound else sym(value)
        if kind == "fn":
            return self.function(value)
        if kind == "op" and value in CLOSERS:
            self.position -= 1
            return self.group(value)
        if kind == "op" and value == "|" and not self.builder:
            return self.absolute()
        if kind == "op" and value in {"\\$", "€", "£", "¥"}:
            unit = "$" if value == "\\$" else value
            sign = self.sign()
            amount = self.term()
            if self.peek().kind == "text" and self.peek().value.lower() in SCALES:
                amount = Expr("mul", (amount, num(SCALES[self.next().value.lower()])))
            return Expr("qty", (amount if sign > 0 else negative(amount), unit))
        if kind == "op" and value == "...":
            return sym("…")
        if kind == "begin":
            return self.environment(value)
        if kind == "cmd":
            return self.command(value)
        if kind == "text" and value.lower() in NUMBER_WORDS:
            return self.number_word(NUMBER_WORDS[value.lower()])
        if kind == "text" and (self.is_letter_text(value) or value == "a"):
            return self.named(value)
        self.position -= 1
        return self.fail(f"{shown(token)!r} can't start a value" if kind != "end" else "a value is missing")


def _proper_fraction(value: Expr) -> Fraction | None:
    if value.op != "mul" or len(value.args) != 2 or value.args[0].op != "num" or value.args[1].op != "inv":
        return None
    above, below = value.args[0], value.args[1].args[0]
    if below.op != "num" or above.args[0].denominator != 1 or below.args[0].denominator != 1:
        return None
    return above.args[0] / below.args[0] if 0 < above.args[0] < below.args[0] else None
