"""Brackets of every kind: groups, tuples, intervals, sets, set-builders, matrices and the rows of definitions."""

from __future__ import annotations

from verifiers.mathematics.cursor import END, Cursor
from verifiers.mathematics.expr import (
    Expr,
)

_MATRICES = {"matrix", "pmatrix", "bmatrix", "vmatrix", "Bmatrix", "Vmatrix", "smallmatrix", "array", "psmallmatrix"}
CLOSERS = {"(": (")", "]"), "[": ("]", ")"), "]": ("[", "]", ")"), "{": ("}",), "\\{": ("\\}", "}")}


class Brackets(Cursor):
    """The rules that start at an opening bracket."""

    def group(self, opening: str) -> Expr:
        """A bracketed value, tuple, interval or set; braces of TeX group without a mark."""
        self.next()
        saved = self.bars, self.builder
        self.bars = self.builder = 0
        if opening == "\\{" and self.is_builder():
            value = self.set_builder()
        else:
            items = self.items(CLOSERS[opening])
            value = self.bracketed(opening, items)
        self.bars, self.builder = saved
        return value

    def items(self, closers: tuple[str, ...]) -> list[Expr]:
        if self.at(*closers):
            return []
        items = [self.item()]
        while self.at(",", ";"):
            self.next()
            if self.at(*closers):
                break
            items.append(self.item())
        return items

    def item(self) -> Expr:
        """One member of a bracketed list; the answer grammar reads whole clauses there."""
        return self.expression()

    def bracketed(self, opening: str, items: list[Expr]) -> Expr:
        if (
            opening == "\\{"
            and self.peek().kind == "end"
            and len(items) == 1
            and items[0].op in {"cases", "list", "matrix"}
        ):
            closing = "\\}"  # a cases brace that \right. closes
        else:
            closing = self.expect(*CLOSERS[opening]).value
        if opening == "\\{":
            return Expr("set", tuple(items)) if not (len(items) == 1 and items[0].op in {"cases", "list"}) else items[0]
        if opening == "{":
            if not items:
                return Expr("set", ())
            return items[0] if len(items) == 1 else Expr("list", ("braces", *items))
        if not items:
            self.fail("the brackets are empty")
        if len(items) == 1 and (opening, closing) in {("(", ")"), ("[", "]")}:
            if items[0].op in {"rel", "list", "text"} and opening == "[":
                return Expr("tup", (opening, closing, items[0]))
            return items[0] if items[0].op != "num" else Expr("num", (items[0].args[0], items[0].args[1]))
        return Expr("tup", (opening, closing, *items))

    def is_builder(self) -> bool:
        """Whether the set that starts here is `{variable | condition}`."""
        level, bars = 0, []
        for index in range(self.position, len(self.tokens)):
            kind, value, _ = self.tokens[index]
            if kind == "cmd" and value == "mid" and level == 0:
                return True
            if kind != "op":
                continue
            if value in {"(", "[", "{", "\\{"}:
                level += 1
            elif value in {")", "]", "}", "\\}"}:
                level -= 1
                if level < 0:
                    break
            elif value == ":" and level == 0:
                return True
            elif value == "|" and level == 0:
                bars.append(index)
        return len(bars) % 2 == 1 and bars[0] > self.position

    def set_builder(self) -> Expr:
        self.builder = 1
        variable = self.item()
        if self.at("|", ":") or (self.peek().kind == "cmd" and self.peek().value == "mid"):
            self.next()
        else:
            self.fail("the bar of the set is missing")
        self.builder = 0
        conditions = self.conditions()
        self.expect("\\}", "}")
        return Expr("builder", (variable, conditions))

    def conditions(self) -> Expr:
        return self.item()

    def environment(self, name: str) -> Expr:
        """A matrix, or the rows of a piecewise definition or system."""
        rows: list[Expr] = []
        cells: list[Expr] = []
        while True:
            if self.peek().kind == "end":
                if self.peek() is END:
                    self.fail(f"\\end{{{name}}} is missing")
                self.next()
                break
            if self.peek().kind == "row":
                self.next()
                rows.append(Expr("row", tuple(cells)))
                cells = []
            elif self.at("&"):
                self.next()
            else:
                cells.append(self.cell())
        if cells:
            rows.append(Expr("row", tuple(cells)))
        rows = [row for row in rows if row.args]
        if name not in _MATRICES:
            rows = [_split_condition(row) for row in rows]
        system = name == "array" and all(cell.op == "rel" for row in rows for cell in row.args)
        if (name not in _MATRICES or system) and rows and all(len(row.args) == 1 for row in rows):
            return Expr("list", ("and", *(row.args[0] for row in rows))) if len(rows) > 1 else rows[0].args[0]
        if name not in _MATRICES:
            return Expr("cases", tuple(rows))
        if not rows or len({len(row.args) for row in rows}) != 1:
            self.fail("the rows of the matrix have different lengths")
        matrix = Expr("matrix", tuple(rows))
        return Expr("fn", ("det", matrix)) if name == "vmatrix" else matrix

    def cell(self) -> Expr:
        return self.item()

    def items_until(self, closing: str) -> list[Expr]:
        items = [self.expression()]
        while self.at(","):
            self.next()
            items.append(self.expression())
        if not (self.peek().kind == "cmd" and self.peek().value == closing):
            self.fail(f"\\{closing} is missing")
        self.next()
        return items

    def absolute(self) -> Expr:
        self.bars += 1
        value = self.expression()
        self.bars -= 1
        self.expect("|")
        return Expr("fn", ("abs", value))


def _split_condition(row: Expr) -> Expr:
    """The row `3, n = 1` of a piecewise definition as its value and its condition."""
    if len(row.args) != 1 or row.args[0].op != "list" or len(row.args[0].args) != 3:
        return row
    _, value, condition = row.args[0].args
    return Expr("row", (value, condition)) if condition.op == "rel" and value.op != "rel" else row
