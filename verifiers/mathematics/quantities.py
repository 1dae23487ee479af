"""A value with what follows it: a unit, a label, a remark in brackets, a modulus, a smaller unit."""

from __future__ import annotations

from verifiers.mathematics.expr import Expr, MathSyntaxError, num
from verifiers.mathematics.grammar import Grammar
from verifiers.mathematics.units import parse_unit
from verifiers.mathematics.words import NUMBER_WORDS, SCALES, word_set

_CLAIMS = frozenset(
    [
        "is",
        "are",
        "was",
        "were",
        "has",
        "have",
        "will",
        "can",
        "does",
        "do",
        "but",
        "not",
        "no",
        "never",
        "wrong",
        "incorrect",
        "impossible",
        "or",
        "than",
    ]
)
STOP_WORDS = word_set(
    "otherwise else "
    "for where when if with as such that because since given from to at by on 当 其中 时 且 为 则 each respectively"
)
SEPARATOR_WORDS = {
    "and": "and", "or": "or", "和": "and", "或": "or", "或者": "or", "与": "and", "及": "and", "以及": "and", "且": "and",
    "或者是": "or", "i.e.": "and",
}  # fmt: skip
SEPARATOR_COMMANDS = {"quad": ",", "qquad": ",", "land": "and", "lor": "or", "wedge": "and", "vee": "or"}


class Quantities(Grammar):
    """The rules for one value of an answer."""

    def at_separator(self) -> bool:
        token = self.peek()
        if token.kind == "op":
            return token.value in {",", ";", "."} or (token.value == "&" and self.peek(1).kind == "text")
        if token.kind == "cmd":
            return token.value in SEPARATOR_COMMANDS
        return token.kind == "row" or (token.kind == "text" and token.value.lower() in SEPARATOR_WORDS)

    def at_qualifier(self) -> bool:
        """A word that opens a condition ("where k is an integer"), or a bracketed one."""
        token = self.peek()
        if token.kind == "text":
            return token.value.partition(" ")[0].lower() in STOP_WORDS
        if self.position > 0 and self.at("(") and self.opens_condition():
            return True
        return (
            self.position > 0 and token.kind == "op" and token.value in {"(", "["} and self.peek(1).kind == "text"
            and self.peek(1).value.partition(" ")[0].lower() in STOP_WORDS
        )  # fmt: skip

    def quantity(self) -> Expr:
        """A value with the unit or label that follows it."""
        if self.peek().kind == "text" and not self.can_start_value():
            return Expr("text", (self.words(),))
        value = self.expression()
        if self.peek().kind == "cmd" and self.peek().value == "bmod":
            modulus = self.modulus()
            return Expr("fn", ("mod", value, modulus))
        if (modulus := self.modulus()) is not None:
            return Expr("modulo", (value, modulus))
        if self.at("\\$", "€", "£", "¥"):
            return Expr("qty", (value, "$" if self.next().value == "\\$" else self.peek(-1).value))
        if self.peek().kind == "text" and not self.at_separator() and not self.at_qualifier():
            return self.compound(self.with_unit(value))
        if self.at("(") and self.peek(1).kind == "text" and not self.at_qualifier():
            return self.annotated(value)
        if value.op == "mul" and len(value.args) == 2 and value.args[1].op == "tup" and value.args[0].op == "sym":
            return Expr("rel", (("=",), *value.args))  # P(2, 3), the point
        if value.op == "deg" and self.peek().kind == "name" and self.peek().value in {"C", "F"}:
            return Expr("qty", (value.args[0], "deg" + self.next().value))
        return value

    def can_start_value(self) -> bool:
        token = self.peek()
        return self.is_letter_text(token.value) or token.value == "a" or token.value.lower() in NUMBER_WORDS

    def words(self) -> str:
        """Text tokens in a row."""
        words = []
        while self.peek().kind == "text" and not (words and (self.at_separator() or self.at_qualifier())):
            words.append(self.next().value)
        return " ".join(words)

    def modulus(self) -> Expr | None:
        """`(mod 7)`, `\\pmod{7}`."""
        token = self.peek()
        if token.kind == "cmd" and token.value in {"pmod", "bmod", "mod"}:
            self.next()
            return self.argument() if self.at("{") else self.expression()
        if self.at("(") and self.peek(1).value == "mod":
            self.position += 2
            value = self.expression()
            self.expect(")")
            return value
        if token.kind == "fn" and token.value == "mod":
            self.next()
            return self.expression()
        return None

    def with_unit(self, value: Expr) -> Expr:
        parts: list[str] = []
        scale = SCALES.get(self.peek().value.lower())
        if scale:
            self.next()
            value = Expr("mul", (value, num(scale)))
        while True:
            token = self.peek()
            if token.kind == "text" and not (self.at_separator() and token.value != "per") and not self.at_qualifier():
                parts.append(self.next().value)
            elif parts and token.kind == "op" and token.value in {"/", "*"} and self.peek(1).kind in {"text", "name"}:
                parts += [self.next().value, str(self.next().value)]
            elif parts and token.kind == "cmd" and token.value == "cdot" and self.peek(1).kind == "text":
                self.next()
            elif parts and self.at("^"):
                self.next()
                power = self.script()
                if power.op != "num":
                    self.fail("a unit has no such power")
                parts.append(f"^{power.args[0]}")
            elif parts and self.at("(") and self.peek(1).kind in {"text", "name"} and self.peek(2).value == ")":
                self.position += 1
                parts.append(str(self.next().value))
                self.next()
            else:
                break
        if not parts:
            return value
        return _attach_unit(value, " ".join(parts).replace(" ^", "^"))

    def compound(self, value: Expr) -> Expr:
        """`2 hours 30 minutes`, `5 feet and 6 inches`: a smaller unit of the same kind that follows is added."""
        unit = parse_unit(value.args[1]) if value.op == "qty" else None
        ahead = 1 if self.peek().kind == "text" and self.peek().value == "and" else 0
        if unit is None or unit.label or self.peek(ahead).kind != "num":
            return value
        start = self.position
        self.position += ahead
        self.descend()
        rest = self.quantity()
        self.depth -= 1
        smaller = parse_unit(rest.args[1]) if rest.op == "qty" else None
        if smaller is None or smaller.dimensions != unit.dimensions or smaller.factor >= unit.factor:
            self.position = start
            return value
        return Expr(
            "qty",
            (
                Expr("add", (value.args[0], Expr("mul", (rest.args[0], num(smaller.factor / unit.factor))))),
                value.args[1],
            ),
        )

    def annotated(self, value: Expr) -> Expr:
        """A unit or a remark in brackets after a value; a remark is dropped."""
        self.next()
        words = []
        while not self.at(")"):
            token = self.next()
            if token.kind not in {"text", "name", "num"} and token.value not in {"-", "/", "^"}:
                self.fail("the bracket after the value is no remark")
            words.append(token.value.digits if token.kind == "num" else str(token.value))
        self.next()
        unit = parse_unit(" ".join(words))
        return value if unit is None or unit.label else Expr("qty", (value, " ".join(words)))


def _attach_unit(value: Expr, words: str) -> Expr:
    lowered = words.lower()
    if lowered in {"percent", "pct", "percentage", "per cent", "percents"}:
        return Expr("pct", (value,))
    if lowered in {"degrees", "degree", "deg", "度"}:
        return Expr("deg", (value,))
    if lowered in {"th", "st", "nd", "rd"}:
        return value
    if value.op == "deg" and words in {"C", "F", "Celsius", "Fahrenheit"}:
        return Expr("qty", (value.args[0], "deg" + words[0]))
    unit = parse_unit(words)
    if unit is not None and unit.label and (value.op == "sym" or _CLAIMS & set(unit.label.split())):
        raise MathSyntaxError(f"{words!r} after a letter")
    return value if unit is None else Expr("qty", (value, words))
