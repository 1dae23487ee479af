"""A cursor over the tokens of an answer, and what every rule of the grammar asks of it."""

from __future__ import annotations

from typing import NoReturn

from verifiers.mathematics.expr import (
    Expr,
    MathSyntaxError,
    TooLargeError,
    const,
    sym,
)
from verifiers.mathematics.tokens import Token

MAX_DEPTH = 100  # a bracket counts twice: as an expression and as a primary
END = Token("end", "", False)


class Cursor:
    """The tokens, the place in them, the depth of nesting, and the names that have a meaning of their own here."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0
        self.builder = 0
        self.bound: set[str] = set()
        self.functions: set[str] = set()

    def peek(self, ahead: int = 0) -> Token:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else END

    def next(self) -> Token:
        token = self.peek()
        self.position += 1
        return token

    def at(self, *values: str, kind: str = "op") -> bool:
        token = self.peek()
        return token.kind == kind and token.value in values

    def expect(self, *values: str) -> Token:
        if not self.at(*values):
            self.fail(f"{' or '.join(values)} is missing")
        return self.next()

    def fail(self, why: str) -> NoReturn:
        raise MathSyntaxError(f"{why} at token {self.position + 1} of {len(self.tokens)}")

    def descend(self) -> None:
        """One level deeper; raises `TooLargeError` beyond `MAX_DEPTH`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLargeError(f"nested deeper than {MAX_DEPTH} levels")

    def is_word(self, token: Token) -> bool:
        return token.kind == "text" and not self.is_letter_text(token.value)

    def is_letter_text(self, value: str) -> bool:
        return len(value) == 1 and value.isascii() and value.isalpha() and value != "a"

    def opens_condition(self) -> bool:
        """Whether the bracket at the cursor holds a condition on a letter, as in `2n-1 (n \\in \\mathbb{N})`."""
        for ahead in range(1, 12):
            kind, value, _ = self.peek(ahead)
            if kind == "end" or value in {")", "("}:
                return False
            if (
                kind == "cmd" and value in {"in", "ne", "neq", "ge", "geq", "le", "leq", "geqslant", "leqslant"}
            ) or value in {"<", ">", "<=", ">="}:
                return True
        return False

    # the rules that call each other across the classes below
    def expression(self) -> Expr:
        raise NotImplementedError

    def sum(self) -> Expr:
        raise NotImplementedError

    def term(self) -> Expr:
        raise NotImplementedError

    def factor(self) -> Expr:
        raise NotImplementedError

    def signed_factor(self) -> Expr:
        raise NotImplementedError

    def primary(self) -> Expr:
        raise NotImplementedError

    def script(self) -> Expr:
        raise NotImplementedError

    def starts_factor(self, factors: list[Expr]) -> bool:
        raise NotImplementedError

    def juxtaposed(self, factors: list[Expr]) -> Expr:
        raise NotImplementedError


def product(factors: list[Expr]) -> Expr:
    return factors[0] if len(factors) == 1 else Expr("mul", tuple(factors))


def letter(name: str, bound: set[str]) -> Expr:
    return const(name) if name in {"e", "i"} and name not in bound else sym(name)


def plain(token: Token) -> str:
    if token.kind == "end":
        raise MathSyntaxError("a subscript is missing")
    return token.value.digits if token.kind == "num" else str(token.value).replace(" ", "")
