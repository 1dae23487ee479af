"""Names and commands: variables with subscripts, applied functions, fractions, roots, sums and products."""

from __future__ import annotations

from fractions import Fraction

from verifiers.mathematics.brackets import Brackets
from verifiers.mathematics.cursor import plain, product
from verifiers.mathematics.expr import (
    MINUS_ONE,
    Expr,
    const,
    num,
    sym,
)
from verifiers.mathematics.tokens import NumberToken, Token
from verifiers.mathematics.words import FRACTION_WORDS, NUMBER_WORDS

_FUNCTION_LETTERS = frozenset({"f", "g", "h", "F", "G", "H", "Phi", "phi", "psi", "Psi", "mho"})
_DROPPED = {
    "angle",
    "triangle",
    "displaylimits",
    "therefore",
    "because",
    "neg",
    "smash",
    "operatorname",
    "prime",
    "bigg",
}
_WRAPPERS = {
    "boxed", "fbox", "overline", "bar", "vec", "hat", "tilde", "dot", "overrightarrow", "underline", "widehat", "underset",
    "overset", "mathop", "ensuremath", "mathchoice", "overparen", "cancel", "not", "widetilde", "stackrel",
}  # fmt: skip
_MARKS = {"overline", "bar", "dot", "ddot", "tilde", "widetilde"}
FRACTIONS = {"frac", "dfrac", "tfrac", "cfrac", "dsfrac", "sfrac", "nicefrac", "fracc"}
_BINOMIALS = {"binom", "dbinom", "tbinom"}
_BRACKETS = {
    "lfloor": ("rfloor", "floor"),
    "lceil": ("rceil", "ceil"),
    "lvert": ("rvert", "abs"),
    "lVert": ("rVert", "abs"),
    "Vert": ("Vert", "abs"),
    "vert": ("vert", "abs"),
}
STARTING_COMMANDS = (
    FRACTIONS | _BINOMIALS | _WRAPPERS | _MARKS | _DROPPED | set(_BRACKETS) - {"vert", "Vert"}
    | {"sqrt", "surd", "complement", "sum", "prod", "langle", "emptyset", "varnothing", "mathbb:R"}
)  # fmt: skip


class Functions(Brackets):
    """The rules that start at a letter or a command."""

    def number_word(self, value: int) -> Expr:
        """A number in words: "forty-two", "two thirds"."""
        ahead = 1 if self.at("-") else 0
        after = self.peek(ahead)
        unit = NUMBER_WORDS.get(after.value.lower(), 0) if after.kind == "text" else 0
        if value >= 20 and value % 10 == 0 and 1 <= unit <= 9:
            self.position += ahead + 1
            value += unit
        ahead = 1 if self.at("-") else 0
        after = self.peek(ahead)
        if after.kind == "text" and (parts := FRACTION_WORDS.get(after.value.lower())):
            self.position += ahead + 1
            return num(Fraction(value, parts))
        return num(value)

    def named(self, name: str) -> Expr:
        """A letter with its subscript, as a constant, a variable or the function it is applied as."""
        if self.at("_"):
            self.next()
            below = self.subscript()
            if name in {"C", "A"} and below.isdigit() and self.at("^"):
                return self.choices(name, below)
            name = f"{name}_{below}"
        elif name in {"e", "i"} and name not in self.bound:
            return const(name)
        if name == "C" and name not in self.functions and self.peek(-1).kind == "name" and self.at("("):
            return self.combination(name)
        return self.application(name)

    def choices(self, name: str, below: str) -> Expr:
        """`C_7^3` and `A_7^3`: combinations and permutations, where the numbers allow it."""
        self.next()
        exponent = self.script()
        if len(below) > 6 or exponent.op != "num" or not 0 <= exponent.args[0] <= int(below):
            return Expr("pow", (sym(f"{name}_{below}"), exponent))
        chosen = Expr("fn", ("binom", num(int(below)), exponent))
        return chosen if name == "C" else Expr("mul", (chosen, Expr("fact", (exponent,))))

    def combination(self, name: str) -> Expr:
        """`C(n, k)`; with one argument the letter is a variable."""
        start = self.position
        inside = self.group("(")
        if name == "C" and inside.op == "tup" and len(inside.args) == 4:
            return Expr("fn", ("binom", inside.args[2], inside.args[3]))
        self.position = start
        return sym(name)

    def application(self, name: str) -> Expr:
        if name in _FUNCTION_LETTERS and [self.peek(ahead).value for ahead in (0, 1, 2, 4, 5)] == [
            "^",
            "{",
            "-",
            "}",
            "(",
        ]:
            self.position += 5
            inside = self.group("(")
            return Expr("call", (name + "^-1", *(inside.args[2:] if inside.op == "tup" else (inside,))))
        if not self.at("("):
            return sym(name)
        letter = name.rstrip("'").partition("_")[0]
        if letter not in _FUNCTION_LETTERS and letter not in self.functions and not name.endswith("'"):
            return sym(name)
        inside = self.group("(")
        arguments = inside.args[2:] if inside.op == "tup" else (inside,)
        return Expr("call", (name, *arguments))

    def subscript(self) -> str:
        """The text of a subscript, as part of a name."""
        if not self.at("{"):
            return plain(self.next())
        parts, level = [], 0
        while True:
            token = self.next()
            if token.kind == "end":
                self.fail("} is missing")
            if token.kind == "op" and token.value in "{}":
                level += 1 if token.value == "{" else -1
                if level == 0:
                    return "".join(parts)
            else:
                parts.append(plain(token))

    def command(self, name: str) -> Expr:
        if name in FRACTIONS:
            above, below = self.argument(), self.argument()
            return Expr("mul", (above, Expr("inv", (below,))))
        if name in _BINOMIALS:
            return Expr("fn", ("binom", self.argument(), self.argument()))
        if name == "sqrt":
            index = self.root_index()
            return Expr("root", (index, self.argument()))
        if name == "surd":
            return Expr("root", (num(2), self.factor_after_surd()))
        if name in {"sum", "prod"}:
            return self.fold(name)
        if name in {"langle"}:
            items = self.items_until("rangle")
            return Expr("tup", ("(", ")", *items))
        if name in _BRACKETS:
            closing, function = _BRACKETS[name]
            value = self.expression()
            if not (self.peek().kind == "cmd" and self.peek().value == closing):
                self.fail(f"\\{closing} is missing")
            self.next()
            return Expr("fn", (function, value))
        if name == "overrightarrow":
            inside = self.argument()
            letters = inside.args if inside.op == "mul" else (inside,)
            return sym("→" + "".join(str(part.args[0]) for part in letters if part.op == "sym"))
        if name in _MARKS:
            inside = self.argument()
            return sym(f"{name}:{inside.args[0]}") if inside.op == "sym" else inside
        if name in _WRAPPERS:
            return self.argument()
        if name in _DROPPED:
            return self.factor()
        if name in {"emptyset", "varnothing"}:
            return Expr("set", ())
        if name.startswith("mathbb:"):
            return self.number_set(name.partition(":")[2])
        if name in {"ldots", "cdots", "dots", "dotsb", "dotsc", "vdots", "ddots"}:
            return sym("…")
        if name == "complement":  # \complement_U A
            within = self.subscript() if self.at("_") and self.next() else ""
            return sym(f"∁{within}{plain(self.next())}")
        if name == "square":
            return sym("□")
        self.position -= 1
        return self.fail(f"\\{name} is not understood")

    def number_set(self, name: str) -> Expr:
        while self.at("^", "_"):
            mark = self.next().value
            script = self.subscript() if self.at("{") else plain(self.next())
            name += mark + script
        return Expr("mathbb", (name,))

    def factor_after_surd(self) -> Expr:
        return self.primary() if not self.at("{") else self.group("{")

    def root_index(self) -> Expr:
        if not self.at("["):
            return num(2)
        self.next()
        index = num(2) if self.at("]") else self.expression()
        self.expect("]")
        return index

    def argument(self) -> Expr:
        """An argument of a command: a group, or one token (of a number its first digit)."""
        token = self.peek()
        if token.kind == "op" and token.value == "{":
            return self.group("{")
        if token.kind == "num" and len(token.value.digits) > 1 and token.value.digits.isdigit():
            first, rest = token.value.digits[0], token.value.digits[1:]
            self.tokens[self.position] = Token("num", NumberToken(Fraction(int(rest)), None, rest), False)
            return num(int(first))
        if token.kind == "fn":
            return self.factor()
        self.descend()
        value = self.primary()
        self.depth -= 1
        return value

    def function(self, name: str) -> Expr:
        """A named function: `\\sin^2 x`, `\\log_2 x`, `sqrt(x)`, `\\max(a, b)`, `\\sum_{k=1}^{n}`."""
        if name in {"sum", "prod"}:
            return self.fold(name)
        if name == "sqrt" and self.at("["):
            index = self.root_index()
            return Expr("root", (index, self.argument()))
        base = power = None
        for _ in range(2):
            if self.at("_"):
                self.next()
                base = self.script()
            elif self.at("^"):
                self.next()
                power = self.script()
        arguments = self.function_arguments()
        if name == "log" and base is not None:
            value = Expr("fn", ("log", arguments[0], base))
        elif name in {"sqrt", "cbrt"}:
            value = Expr("root", (num(2 if name == "sqrt" else 3), arguments[0]))
        else:
            value = Expr("fn", (name, *arguments))
        if power is None:
            return value
        if power == MINUS_ONE and name in {"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh"}:
            return Expr("fn", ("arc" + name, *arguments))
        return Expr("pow", (value, power))

    def function_arguments(self) -> tuple[Expr, ...]:
        if self.at("(", "[", "{"):
            inside = self.group(self.peek().value)
            if inside.op == "tup":
                return inside.args[2:]
            return inside.args[1:] if inside.op == "list" else (inside,)
        self.descend()
        factors = [self.signed_factor()]
        while self.starts_factor(factors) and self.peek().kind != "fn" and not self.at("(", "[", "\\{"):
            factors.append(self.juxtaposed(factors))
        if self.at("/") and self.peek(1).kind == "num":  # \sin \pi/3
            self.next()
            factors.append(Expr("inv", (self.factor(),)))
        self.depth -= 1
        return (product(factors),)

    def fold(self, name: str) -> Expr:
        """A sum or product over an index with bounds."""
        index, low, high = None, None, None
        for _ in range(2):
            if self.at("_"):
                self.next()
                index, low = self.lower_bound()
            elif self.at("^"):
                self.next()
                high = self.script()
        if index is None or low is None or high is None:
            self.fail(f"the bounds of the {name} are missing")
        added = index not in self.bound
        self.bound.add(index)
        body = self.term()
        if added:
            self.bound.discard(index)
        return Expr("fold", (name, index, low, high, body))

    def lower_bound(self) -> tuple[str, Expr]:
        if not self.at("{"):
            self.fail("the lower bound is missing")
        self.next()
        token = self.next()
        if token.kind not in {"name", "const"} or not self.at("="):
            self.fail("the lower bound is not of the form k=1")
        self.next()
        low = self.expression()
        self.expect("}")
        return token.value, low
