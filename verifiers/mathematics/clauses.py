"""Whole answers: lists, relations, labels and trailing conditions around the values of `quantities`."""

from __future__ import annotations

import re

from verifiers.mathematics.expr import Expr, MathSyntaxError, free_symbols, sym
from verifiers.mathematics.quantities import SEPARATOR_COMMANDS, SEPARATOR_WORDS, STOP_WORDS, Quantities
from verifiers.mathematics.tokens import Token

_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "le": "<=", "leq": "<=", "leqslant": "<=",
    "leqq": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "geqq": ">=", "lt": "<", "gt": ">", "ne": "!=",
    "neq": "!=", "approx": "~", "doteq": "~", "simeq": "~", "thickapprox": "~", "equiv": "===", "in": "in",
    "notin": "notin", "subset": "subset",
    "subseteq": "subset", "sim": "sim", "parallel": "parallel", "perp": "perp", "cong": "cong", "to": "to",
    "rightarrow": "to", "longrightarrow": "to", "mapsto": "to", "mid": "mid", "less": "<", "propto": "propto",
}  # fmt: skip
_SAYS = (" is", " are", "为", "是", " equals")
_THEREFORE = {"therefore", "thus", "hence", "so", "answer", "then"}
_INTEGER_PARAMETER = re.compile(r"integer|整数|natural|whole|constant|arbitrary|常数", re.IGNORECASE)


class AnswerGrammar(Quantities):
    """The clauses of an answer."""

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__(tokens)
        self.parameters: set[str] = set()

    def answer(self) -> Expr:
        """The whole token list: one clause, or clauses between separators."""
        kinds, items = [","], []
        while True:
            kinds += self.separators()
            if self.peek().kind == "end" and self.position >= len(self.tokens):
                break
            if self.at_qualifier():
                self.qualifier()
                continue
            items.append(self.clause())
            if self.position < len(self.tokens) and not self.at_separator() and not self.at_qualifier():
                self.fail(f"{self.peek().value!r} is not expected here")
        items = self.without_domains(items)
        if not items:
            raise MathSyntaxError("there is no value in it")
        if len(items) == 1:
            return items[0]
        return Expr("list", ("or" if "or" in kinds else "and" if "and" in kinds else ",", *items))

    def separators(self) -> list[str]:
        kinds = []
        while self.at_separator():
            token = self.next()
            value = str(token.value).lower()
            kinds.append(SEPARATOR_WORDS.get(value) or SEPARATOR_COMMANDS.get(token.value) or ",")
        return kinds

    def clause(self) -> Expr:
        """A relation chain, perhaps after a label ("Paolo: 18") or a quantifier."""
        if self.peek().kind == "cmd" and self.peek().value in {"forall", "exists"}:
            name = self.next().value
            bound = self.clause()
            self.separators()
            return Expr("quantified", (name, bound, self.clause()))
        if self.is_definition():
            self.functions.add(self.peek().value)
        label = self.label()
        if label is not None:
            value = self.clause()
            return Expr("rel", (("=",), Expr("text", (label,)), value))
        members, relations = [], []
        if (relation := self.relation()) is not None:  # ">= 5" says it of a variable that it leaves out
            if relation in {"=", "~"}:
                return self.clause()
            members, relations = [sym("·"), self.quantity()], [relation]
        members = members or [self.quantity()]
        while relation := self.relation():
            relations.append(relation)
            members.append(self.quantity())
        if not relations:
            return members[0]
        return Expr("rel", (tuple(relations), *members))

    def is_definition(self) -> bool:
        """`p(x) = ..`: a name applied to names, then an equals sign."""
        index = 1
        if self.peek().kind != "name":
            return False
        if self.peek(index).value == "_":
            index += 2
        if not (self.peek(index).kind == "op" and self.peek(index).value == "("):
            return False
        index += 1
        while self.peek(index).kind == "name" or (self.peek(index).kind == "op" and self.peek(index).value == ","):
            index += 1
        after = self.peek(index + 1)
        return self.peek(index).value == ")" and after.kind == "op" and after.value == "="

    def label(self) -> str | None:
        """Words before a colon or equals sign, taken as the name of the value."""
        if self.peek().kind != "text" or self.peek().value.lower() in STOP_WORDS:
            return None
        words = []
        for ahead in range(8):
            token = self.peek(ahead)
            if token.kind == "op" and token.value in {":", "="}:
                self.position += ahead + 1
                return " ".join(words)
            if (
                token.kind == "text"
                and f" {token.value.lower()}".endswith(_SAYS)
                and self.peek(ahead + 1).kind not in {"text", "end"}
            ):
                self.position += ahead + 1
                return " ".join([*words, token.value])
            if token.kind == "op" and token.value == "," and " ".join(words).lower() in _THEREFORE:
                self.position += ahead + 1
                return "therefore"
            if token.kind not in {"text", "num", "name"}:
                return None
            words.append(getattr(token.value, "digits", str(token.value)))
        return None

    def relation(self) -> str | None:
        token = self.peek()
        if token.kind == "op" and token.value in _RELATIONS:
            self.next()
            return _RELATIONS[token.value]
        if token.kind == "op" and token.value == "!" and self.peek(1).value == "=":
            self.position += 2
            return "!="
        if token.kind == "text" and token.value == "in" and self.peek(1).kind in {"op", "cmd"}:
            self.next()
            return "in"
        if token.kind == "cmd" and token.value in _RELATIONS and not (token.value == "mid" and self.builder):
            self.next()
            return _RELATIONS[token.value]
        if token.kind == "cmd" and token.value == "not" and self.peek(1).value in {"=", "in"}:
            self.position += 2
            return "!=" if self.peek(-1).value == "=" else "notin"
        return None

    def qualifier(self) -> None:
        """Skip the condition; the letters of one that speaks of integers are parameters."""
        if self.position == 0:
            self.fail("a condition without a value before it")
        rest = self.tokens[self.position :]
        said = " ".join(str(token.value) for token in rest if token.kind in {"text", "cmd"})
        if _INTEGER_PARAMETER.search(said) or re.search(r"mathbb:[ZN]", said):
            self.parameters |= {token.value for token in rest if token.kind == "name"}
        self.position = len(self.tokens)

    def without_domains(self, items: list[Expr]) -> list[Expr]:
        """Drop `k \\in \\mathbb{Z}` after what it speaks of, noting its variable."""
        kept: list[Expr] = []
        for item in items:
            if kept and item.op == "rel" and item.args[0] == ("in",) and item.args[2].op in {"mathbb", "sym"}:
                if item.args[2].args[0][0] in "ZN":
                    self.parameters.update(free_symbols(item.args[1]))
                if item.args[1].op == "sym" and item.args[1].args[0] in free_symbols(*kept):
                    continue
                if set(free_symbols(item.args[1])) <= set(free_symbols(*kept)):
                    continue
            kept.append(item)
        return kept

    def item(self) -> Expr:
        return self.clause()

    def conditions(self) -> Expr:
        kinds, items = [], [self.clause()]
        while self.at_separator():
            kinds += self.separators()
            if self.at("\\}", "}"):
                break
            items.append(self.clause())
        for item in items:
            if (
                item.op == "rel"
                and item.args[0] == ("in",)
                and item.args[2].op == "mathbb"
                and item.args[2].args[0][0] in "ZN"
            ):
                self.parameters.update(free_symbols(item.args[1]))
        if len(items) == 1:
            return items[0]
        return Expr("list", ("or" if "or" in kinds else "and", *items))

    def cell(self) -> Expr:
        if self.at_qualifier() or self.peek().value in {"otherwise", "else"}:
            if self.peek().value not in {"otherwise", "else"}:
                self.next()
            else:
                return Expr("text", (self.next().value,))
        value = self.clause()
        while self.at_separator() and self.peek().kind != "row":
            kinds = self.separators()
            if self.at("&") or self.peek().kind in {"row", "end"}:
                break
            if not self.at_qualifier():
                value = Expr("list", (kinds[-1], value, self.clause()))
        return value
