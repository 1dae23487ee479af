"""Text to tokens: one regular expression, linear in the length."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from verifiers.mathematics.expr import MathSyntaxError, TooLargeError
from verifiers.mathematics.words import CONSTANTS, FUNCTIONS, GREEK, SAME_LETTER, split_letters

MAX_TOKENS = 3_000
MAX_DIGITS = 2_000
MAX_FOLDED_EXPONENT = 400


class Token(NamedTuple):
    """`kind` is num, name, const, fn, cmd, text, op, begin, end or row; `spaced` says that white space came before."""

    kind: str
    value: Any
    spaced: bool


class NumberToken(NamedTuple):
    """A literal: its value, the digits after its point (None without one), and its digits as written."""

    value: Fraction
    places: int | None
    digits: str


def shown(token: Token) -> str:
    """The token as it was written, for a message."""
    return token.value.digits if isinstance(token.value, NumberToken) else str(token.value)


_JOIN = r"(?:\{,\}|\\!,|,\\!\s?|\\,)"
_SKIP = (
    r"(?P<skip>\s+|~|\\[,;:!>()\[\]] ?|\$|\\ |\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?(?=[^.]|$)|\\(?:displaystyle|"
    r"textstyle|scriptstyle|limits|nolimits|nonumber|rm|bf|it|color\{\w+\}|hfill|thinspace|enspace|noindent|"
    r"boldsymbol|mathstrut|hspace\*?\{[^{}]*\}|vspace\{[^{}]*\}|phantom(?:\{[^{}]*\})?|label\{[^{}]*\}|tag\{[^{}]*\})(?![a-zA-Z]))"
)
_TEXT = (
    r"\\(?P<font>text(?:rm|bf|it|tt|sf|normal|up|sc)?|mathrm|mathbf|mathit|mathsf|mathtt|mathbb|mathcal|mathscr|mathfrak|"
    r"bm|mbox|hbox|operatorname\*?|emph|pmb|Bbb)(?![a-zA-Z])\s*(?:\{(?P<inner>(?:[^{}]|\{[^{}]*\})*)\}|(?P<letter>[A-Za-z]))"
)
_REST = (
    r"\\begin\s*\{(?P<begin>\w+)\*?\}(?:\s*\[\w\])?(?:(?<=array\})\s*\{[^{}]*\})?|\\end\s*\{(?P<end>\w+)\*?\}|(?P<row>\\\\(?:\[\d+\w*\])?)|"
    r"\\(?P<command>[a-zA-Z]+)|(?P<escaped>\\[{}$%#&|_])|(?P<letters>[A-Za-z]+)|"
    r"(?P<op>\*\*|<=|>=|!=|==|:=|=>|\.\.\.|[-+*/^_=<>()\[\]{}|,;:!'\"%&$.?#@\\€£¥])|(?P<cjk>[\u3400-\u9fff]+)"
)


def _number_pattern(comma: str) -> str:
    whole = rf"\d{{1,3}}(?:{comma}\d{{3}})+(?![\d])|\d{{1,3}}(?: \d{{3}})+(?!\d)|\d+"
    return (
        r"(?P<repeat>\d*\.(?P<lead>\d*)(?:\\(?:overline|bar)\s*\{(?P<over>\d+)\}|\\(?:bar|overline) ?(?P<over1>\d)|"
        r"\\dot\s*\{?(?P<dot>\d)\}?(?:(?P<mid>\d*)\\dot\s*\{?(?P<dot2>\d)\}?)?|\((?P<paren>\d+)\)|"
        r"(?P<dots>(?<=\d\d)(?:\.\.\.|\\[lc]?dots)(?![a-z]))))|"
        rf"(?P<number>(?:{whole})(?:\.(?!\.)(?:\d+|(?=\s*[\^\\)}}\]=+*/-])))?|\.\d+)(?:[eE](?P<exponent>[+-]?\d+)(?![\d.]))?"
    )


_OUTSIDE = re.compile("|".join((_SKIP, _number_pattern(rf"(?:,|{_JOIN})"), _TEXT, _REST)))
_INSIDE = re.compile("|".join((_SKIP, _number_pattern(_JOIN), _TEXT, _REST)))
_OPENING, _CLOSING = {"(", "[", "\\{"}, {")", "]", "\\}"}
_UNITS_OR_PRODUCTS = frozenset({"mg", "ft", "km", "cm", "mm", "kg", "ml", "mL", "hr"})
_CONJUNCTION = re.compile(r"\s*\b(and|or)\b\s*")
_ENGLISH_TEXT = re.compile(r"[A-Za-z']+(?:[ .]{1,2}[A-Za-z']+)*\.?")


def tokenize(text: str, *, thousands: bool = True, upright: bool = False) -> list[Token]:
    """The tokens of normalised text; a comma groups digits only outside brackets, and only with `thousands`;
    in `upright` text the names of units are never products of letters.

    Raises `MathSyntaxError` at a character that has no place in mathematics, `TooLargeError` beyond `MAX_TOKENS`.
    """
    tokens: list[Token] = []
    position, depth, spaced = 0, 0, False
    end = len(text)
    while position < end:
        match = (_OUTSIDE if thousands and depth <= 0 else _INSIDE).match(text, position)
        if match is None:
            raise MathSyntaxError(f"{text[position : position + 20]!r} is no mathematics")
        position = match.end()
        kind = match.lastgroup
        if kind == "skip":
            spaced = True
            continue
        _add(tokens, match, spaced, upright)
        spaced = False
        if len(tokens) > MAX_TOKENS:
            raise TooLargeError(f"more than {MAX_TOKENS} tokens is too long for an answer")
        shape = match["op"] or match["escaped"]
        if shape in _OPENING:
            depth += 1
        elif shape in _CLOSING:
            depth -= 1
    return _minutes(tokens)


def _minutes(tokens: list[Token]) -> list[Token]:
    """`min` that is applied to nothing is the unit, and a function's name before =, : or a word is a word."""
    for index, token in enumerate(tokens):
        if token.kind == "fn" and token.value == "min":
            after = tokens[index + 1].value if index + 1 < len(tokens) else ""
            if after not in {"(", "{", "_", "[", "\\{"}:
                tokens[index] = Token("text", "min", token.spaced)
        elif token.kind == "fn" and index + 1 < len(tokens) and tokens[index + 1].value in {"=", ":"}:
            tokens[index] = Token("text", token.value, token.spaced)
        elif token.kind == "fn" and index + 1 < len(tokens) and _is_long_word(tokens[index + 1]):
            tokens[index] = Token("text", token.value, token.spaced)  # the sum is, the max of
    return tokens


def _is_long_word(token: Token) -> bool:
    return token.kind == "text" and len(token.value) > 1


def _add(tokens: list[Token], match: re.Match[str], spaced: bool, upright: bool) -> None:
    if (number := match["number"]) is not None:
        _add_number(tokens, number, match["exponent"], spaced)
    elif match["repeat"] is not None:
        tokens.append(Token("num", _repeating(match), spaced))
    elif (command := match["command"]) is not None:
        tokens.append(_command(command, spaced))
    elif (letters := match["letters"]) is not None:
        pieces = split_letters(letters)
        if (
            not upright
            and len(letters) == 2
            and pieces[0][0] == "text"
            and letters in _UNITS_OR_PRODUCTS
            and not _ends_value(tokens)
        ):
            pieces = tuple(("name", letter) for letter in letters)
        for index, (kind, value) in enumerate(pieces):
            tokens.append(Token(kind, value, spaced and index == 0))
    elif match["font"] is not None:
        _add_text(tokens, match["font"], match["inner"] if match["letter"] is None else match["letter"], spaced)
    elif (op := match["op"] or match["escaped"]) is not None:
        tokens.append(Token("op", {"**": "^", "==": "=", ":=": "="}.get(op, op), spaced))
    elif (environment := match["begin"] or match["end"]) is not None:
        tokens.append(Token("begin" if match["begin"] else "end", environment, spaced))
    elif match["row"] is not None:
        tokens.append(Token("row", "\\\\", spaced))
    else:
        tokens.append(Token("text", match["cjk"], spaced))


def _ends_value(tokens: list[Token]) -> bool:
    """Whether what came before is a value that a unit may follow."""
    if not tokens:
        return False
    last = tokens[-1]
    return last.kind in {"num", "const", "name", "text"} or (
        last.kind == "op" and last.value in {")", "}", "/", "^", "]"}
    )


def _add_number(tokens: list[Token], number: str, exponent: str | None, spaced: bool) -> None:
    digits = number if number.isdigit() else re.sub(r"[^\d.]", "", number)
    if len(digits) > MAX_DIGITS:
        raise TooLargeError(f"a number of {len(digits)} digits is too long (at most {MAX_DIGITS})")
    whole, point, fraction = digits.partition(".")
    value = Fraction(int(whole + fraction or "0"), 10 ** len(fraction)) if point else Fraction(int(whole))
    places = len(fraction) if fraction else None
    power = int(exponent) if exponent and len(exponent) < 12 else 0
    if exponent and abs(power) <= MAX_FOLDED_EXPONENT and len(exponent) < 12:
        value = value * 10**power if power >= 0 else value / 10**-power
        places = (places or 0) - power if fraction else None
    tokens.append(Token("num", NumberToken(value, places, digits), spaced))
    if exponent and (abs(power) > MAX_FOLDED_EXPONENT or len(exponent) >= 12):
        if len(exponent) > 40:
            raise TooLargeError("an exponent of more than 40 digits is too long")
        tokens.append(Token("op", "*", False))
        tokens.append(Token("num", NumberToken(Fraction(10), None, "10"), False))
        tokens.append(Token("op", "^", False))
        tokens.append(Token("op", "{", False))
        tokens.append(Token("num", NumberToken(Fraction(int(exponent)), None, exponent), False))
        tokens.append(Token("op", "}", False))


def _repeating(match: re.Match[str]) -> NumberToken:
    whole, lead = match["repeat"].partition(".")[0], match["lead"]
    if match["dots"]:
        return _continued(whole, lead)
    block = match["over"] or match["over1"] or match["paren"] or match["dot"]
    if match["dot2"]:
        block += match["mid"] + match["dot2"]
    if len(lead) + len(block) > MAX_DIGITS:
        raise TooLargeError("a repeating decimal is too long")
    value = int(whole or "0") + Fraction(int(lead or "0"), 10 ** len(lead))
    value += Fraction(int(block), 10 ** len(lead) * (10 ** len(block) - 1))
    return NumberToken(Fraction(value), None, match["repeat"])


def _continued(whole: str, digits: str) -> NumberToken:
    """`0.333...`: repeating where the end of the digits repeats three times (a longer block twice), else a decimal."""
    for period in range(1, len(digits) // 2 + 1):
        block = digits[-period:]
        times = 3 if period == 1 else 2
        if len(digits) >= times * period and digits.endswith(block * times):
            lead = digits[: -period * times]
            value = int(whole or "0") + Fraction(int(lead or "0"), 10 ** len(lead))
            value += Fraction(int(block), 10 ** len(lead) * (10**period - 1))
            return NumberToken(Fraction(value), None, digits)
    return NumberToken(Fraction(int((whole or "0") + digits), 10 ** len(digits)), len(digits), digits)


def _command(command: str, spaced: bool) -> Token:
    if command in CONSTANTS:
        return Token("const", CONSTANTS[command], spaced)
    if command in FUNCTIONS and command not in {"sqrt", "binom", "sum", "prod", "int", "lim"}:
        return Token("fn", command, spaced)
    if command in GREEK:
        return Token("name", SAME_LETTER.get(command, command), spaced)
    return Token("cmd", command, spaced)


def _add_text(tokens: list[Token], font: str, inner: str, spaced: bool) -> None:
    """A word, a letter in another font, or mathematics inside a text command, which is read as such."""
    words = inner.strip()
    if font in {"mathbb", "Bbb"} or (
        font in {"mathbf", "mathrm"} and words in {"R", "Z", "N", "Q", "C"} and font == "mathbf"
    ):
        tokens.append(Token("cmd", "mathbb:" + words, spaced))
    elif words == "sec" and tokens and (tokens[-1].kind == "num" or tokens[-1].value == "/"):
        tokens.append(Token("text", words, spaced))  # the unit
    elif font.startswith("operatorname") or words in FUNCTIONS:
        name = words.replace(" ", "").replace("\\", "")
        tokens.append(Token("fn" if name in FUNCTIONS else "text", name, spaced))
    elif not words:
        return
    elif (
        len(words) == 1
        and words.isalpha()
        and font in {"mathcal", "mathscr", "mathfrak", "mathbf", "bm", "pmb", "mathit"}
    ):
        tokens.append(Token("name", words, spaced))
    elif _ENGLISH_TEXT.fullmatch(words):
        parts = _CONJUNCTION.split(words)
        tokens.extend(Token("text", part.rstrip("."), True) for part in parts if part)
    else:
        for index, token in enumerate(tokenize(words.replace("$", " "), upright=True)):
            as_text = token.kind == "name" and len(token.value) == 1
            tokens.append(Token("text" if as_text else token.kind, token.value, token.spaced or index == 0))
