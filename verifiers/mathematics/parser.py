"""Text to a parsed answer: what only presents it is taken off, times of day and digits above nine are read here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from verifiers.mathematics.clauses import AnswerGrammar
from verifiers.mathematics.expr import Expr, num, sym
from verifiers.mathematics.notation import normalise
from verifiers.mathematics.tokens import tokenize

_TIME = re.compile(
    r"(?:\\text\{\s*)?(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?\s*(?:\\text\{)?\s*(?:([ap])\.?\s?m\.?)?\s*\}?",
    re.IGNORECASE,
)
_HEX = re.compile(r"(?:\\text\{|\\mathrm\{)?([0-9A-Fa-f]*[A-Fa-f][0-9A-Fa-f]*)\}?_\{?(1[1-6])\}?")
_WRAPPING = re.compile(r"\\boxed\s*\{|\\text\s*\{|\\mathrm\s*\{|\\textbf\s*\{|\{")
_SENTENCE = re.compile(r"(?!.*\b(?:and|or)\b)[A-Za-z'’-]+(?: [A-Za-z'’-]+){2,}|[A-Za-z'’-]+(?: [A-Za-z'’-]+){4,}")
# "all integers n >= 3", "all real numbers x such that x > 0": the condition is the answer.
_SUCH_THAT = re.compile(
    r"(?:\\text\s*\{)?\s*(?:all|any|every)\s+(?:the\s+)?(?:(?:positive|natural|real|whole|non-?negative)\s+)?"
    r"(?:integers?|numbers?|reals|values\s+of)[\s}$]*(?:[a-zA-Z][\s$]*(?:such\s+that|with|satisfying)[\s$]*)?"
    r"(?=(?:[a-zA-Z]|-?\d+)\s*(?:[<>=≤≥≠]|\\(?:leq?|geq?|neq?|in)(?![a-z])|\\(?:leq|geq)slant))",
    re.IGNORECASE,
)
_DISPLAY = re.compile(r"\\(?:begin|end)\{(?:aligned|align\*?|equation\*?|gathered|split|center|math|displaymath)\}")


@dataclass(frozen=True)
class Answer:
    """A parsed answer: the tree, the variables that are declared to run over integers, and the text it came from."""

    tree: Expr
    parameters: frozenset[str]
    text: str


def unwrapped(text: str) -> str:
    """The text without the brackets that only present it: dollars, display brackets, one pair of braces, a full stop."""
    text = text.strip().strip('"').removesuffix("\\").removeprefix('\\"').strip()
    for _ in range(6):
        before = text
        if len(text) > 1 and text[0] == "$" and text[-1] == "$":
            inner = text.strip("$")
            text = inner.strip() if "$" not in inner else text
        elif (
            text.startswith(("\\(", "\\["))
            and text.endswith(("\\)", "\\]"))
            and "\\(" not in text[2:]
            and "\\[" not in text[2:]
        ):
            text = text[2:-2].strip()
        elif text.startswith("**") and text.endswith("**") and len(text) > 4:
            text = text[2:-2].strip()
        elif (opening := _WRAPPING.match(text)) and text.endswith("}") and _closes_at_end(text, opening.end()):
            inner = text[opening.end() : -1]
            if opening.group().startswith("{") and re.search(r"[,|]", inner) and not inner.startswith("\\"):
                return text
            if opening.group()[1:2] in {"t", "m"} and not re.fullmatch(r"[\d.,/\s-]+", inner):
                return text
            text = inner.strip()
        text = text.rstrip("., ;") if not text.endswith(("...", "\\,", "\\;")) else text
        if text == before:
            break
    return text


def _closes_at_end(text: str, start: int) -> bool:
    level = 1
    index = start
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 2
            continue
        level += (char == "{") - (char == "}")
        if level == 0:
            return index == len(text) - 1
        index += 1
    return False


def parse(text: str, *, thousands: bool = True) -> Answer:
    """The answer that `text` is, whole; raises `MathSyntaxError` where any of it is not understood."""
    return _parse(text, thousands)


@lru_cache(maxsize=64)
def _parse(text: str, thousands: bool) -> Answer:
    text = unwrapped(normalise(text))
    if _DISPLAY.search(text):
        text = _DISPLAY.sub(" ", text).replace("&", " ")
    text = _outward_brackets(_SUCH_THAT.sub("", text))
    if (match := _TIME.fullmatch(text)) and (match[2] or match[4]):
        return Answer(_clock(match), frozenset(), text)
    if match := _HEX.fullmatch(text):
        return Answer(
            Expr("based", (num(int(match[1], int(match[2]))), int(match[2]), sym(match[1]))), frozenset(), text
        )
    if _SENTENCE.fullmatch(text) and sum(len(word) > 2 for word in text.split()) > 1:
        return Answer(Expr("text", (text,)), frozenset(), text)
    grammar = AnswerGrammar(tokenize(text, thousands=thousands))
    tree = grammar.answer()
    return Answer(tree, frozenset(grammar.parameters), text)


def _outward_brackets(text: str) -> str:
    """`]0,1[` as `(0,1)`: square brackets in pairs, of which one that points outward is open."""
    if ("[" not in text and "]" not in text) or "\\sqrt[" in text:
        return text
    places = [index for index, char in enumerate(text) if char in "[]()"]
    if len(places) % 2 or (text[places[0]] != "]" and text[places[-1]] != "["):
        return text
    chars = list(text)
    for opening, closing in zip(places[::2], places[1::2], strict=True):
        chars[opening] = "(" if chars[opening] == "]" else chars[opening]
        chars[closing] = ")" if chars[closing] == "[" else chars[closing]
    return "".join(chars)


def _clock(match: re.Match[str]) -> Expr:
    hours, minutes, seconds = int(match[1]), int(match[2] or 0), match[3]
    items = (num(hours), num(minutes)) if seconds is None else (num(hours), num(minutes), num(int(seconds)))
    return Expr("clock", ((match[4] or "").lower(), *items))
