"""Whole answers: lists, relations, labels and trailing conditions around the values of `quantities`."""

from __future__ import annotations

import re

from verifiers.mathematics.expr import Expr, MathSyntaxError, TooLargeError, free_symbols, sym
from verifiers.mathematics.quantities import SEPARATOR_COMMANDS, SEPARATOR_WORDS, STOP_WORDS, Quantities
from verifiers.mathematics.tokens import Token, shown
from verifiers.mathematics.words import word_set

_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "le": "<=", "leq": "<=", "leqslant": "<=",
    "leqq": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "geqq": ">=", "lt": "<", "gt": ">", "ne": "!=",
    "neq": "!=", "approx": "~", "doteq": "~", "simeq": "~", "thickapprox": "~", "equiv": "===", "in": "in",
    "notin": "notin", "subset": "subset",
    "subseteq": "subset", "supset": "supset",
    "supseteq": "supset", "sim": "sim", "parallel": "parallel", "perp": "perp", "cong": "cong", "to": "to",
    "rightarrow": "to", "longrightarrow": "to", "mapsto": "to", "mid": "mid", "less": "<", "propto": "propto",
}  # fmt: skip
_SAYS = (" is", " are", "为", "是", " equals")
_THEREFORE = {"therefore", "thus", "hence", "so", "answer", "then"}
# What a value may be the value of, without an equals sign: "maximum 5, minimum 1", "width 3 and length 4".
_QUANTITIES = word_set(
    "the maximum minimum max min value width length height area perimeter volume radius diameter side speed distance sum "
    "product difference total price cost age mean median mode range of is are only exactly "
    " approximately about roughly"
)
_FILLERS = word_set("the of is are value")
_INTEGER_PARAMETER = re.compile(r"integer|整数|natural|whole|constant|arbitrary|常数", re.IGNORECASE)


class AnswerGrammar(Quantities):
    """The clauses of an answer."""

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__(tokens)
        self.parameters: set[str] = set()

    def answer(self) -> Expr:
        """The whole token list: one clause, or clauses between separators."""
        kinds, items, cases = [","], [], []
        while True:
            kinds += self.separators()
            if self.peek().kind == "end" and self.position >= len(self.tokens):
                break
            if self.at_qualifier():
                second = kinds[-1] == "and" and self.position > 0 and self.peek(-1).kind == "text"
                if (second or all(item.op == "text" for item in items)) and any(
                    token.kind == "num" for token in self.tokens[self.position :]
                ):
                    self.fail("a number in a sentence")  # "decreased by 4%"
                end = self.case_end()
                if cases or end is not None:
                    cases.append(Expr("row", (items.pop(), self.condition(end or len(self.tokens)))))
                else:
                    self.qualifier()
                continue
            items.append(self.clause())
            if self.position < len(self.tokens) and not self.at_separator() and not self.at_qualifier():
                self.fail(f"{shown(self.peek())!r} is not expected here")
        if cases:
            if items:
                self.fail("a value without its condition")
            return Expr("cases", tuple(cases))
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
        depth = self.depth
        self.descend()
        value = self.bare_clause()
        self.depth = depth
        return value

    def bare_clause(self) -> Expr:
        if self.peek().kind == "cmd" and self.peek().value in {"forall", "exists"}:
            name = self.next().value
            bound = self.clause()
            self.separators()
            return Expr("quantified", (name, bound, self.clause()))
        if self.peek().kind == "cmd" and self.peek().value in {"neg", "lnot"} and self.peek(2).value == ":":
            self.position += 3  # \\neg p: ..
            return self.clause()
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
        if relations == ["supset"]:
            return Expr("rel", (("subset",), *members[::-1]))
        if relations == ["==="] and members[0].op == "call" and members[1].op != "modulo":
            relations = ["="]  # f(x) \\equiv 0
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
            said = set(" ".join(words).lower().split())
            if token.kind != "text" and said <= _QUANTITIES and said - _FILLERS:
                self.position += ahead
                return " ".join(words)
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

    def case_end(self) -> int | None:
        """Where the condition at the cursor ends, if another value with a condition follows: "5 if .., 7 if .."."""
        start, end = self.position, None
        found = False
        for index in range(start + 1, len(self.tokens)):
            self.position = index
            if self.at_separator():
                end = index
            elif end is not None and end + 1 < index and self.at_qualifier():
                found = True
                break
        self.position = start
        return end if found else None

    def cell_end(self) -> int:
        """Where the cell at the cursor ends."""
        depth = 0
        for index in range(self.position, len(self.tokens)):
            token = self.tokens[index]
            depth += (token.kind == "begin") - (token.kind == "end")
            if depth < 0 or (depth == 0 and (token.kind == "row" or (token.kind == "op" and token.value == "&"))):
                return index
        return len(self.tokens)

    def condition(self, end: int) -> Expr:
        """The condition from the cursor to `end`: a clause, or words."""
        first = self.next()
        opening = first.value.partition(" ")[2] or (first.value if first.value in {"otherwise", "else"} else "")
        rest = self.tokens[self.position : end]
        self.position = end
        if opening or not rest:
            return Expr("text", (" ".join([opening, *(shown(token) for token in rest)]).strip(),))
        try:
            return AnswerGrammar(rest).answer()
        except TooLargeError:
            raise
        except MathSyntaxError:
            return Expr("text", (" ".join(shown(token) for token in rest),))

    def without_domains(self, items: list[Expr]) -> list[Expr]:
        """Drop `k \\in \\mathbb{Z}` after what it speaks of, noting its variable."""
        kept: list[Expr] = []
        for item in items:
            if kept and item.op == "rel" and item.args[0] == ("in",) and item.args[2].op in {"mathbb", "sym"}:
                if item.args[2].args[0].startswith(("Z", "N")):
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
                and item.args[2].args[0].startswith(("Z", "N"))
            ):
                self.parameters.update(free_symbols(item.args[1]))
        if len(items) == 1:
            return items[0]
        return Expr("list", ("or" if "or" in kinds else "and", *items))

    def cell(self) -> Expr:
        if self.at_qualifier() or self.peek().value in {"otherwise", "else"}:
            return self.condition(self.cell_end())
        value = self.clause()
        while self.at_separator() and self.peek().kind != "row":
            kinds = self.separators()
            if self.at("&") or self.peek().kind in {"row", "end"}:
                break
            if not self.at_qualifier():
                self.descend()
                value = Expr("list", (kinds[-1], value, self.clause()))
        return value
