"""Gold against answer: text first, then exact numbers, then by the kind of the two trees."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal, NamedTuple

from verifiers.mathematics.comparison import Comparison
from verifiers.mathematics.expr import (
    Expr,
    MathSyntaxError,
    TooLargeError,
)
from verifiers.mathematics.notation import MAX_CHARS, normalise
from verifiers.mathematics.numeric import start_budget
from verifiers.mathematics.options import MathOptions
from verifiers.mathematics.parser import Answer, parse, unwrapped
from verifiers.mathematics.scalars import is_scalar
from verifiers.mathematics.text import is_prose

_SPACE = re.compile(r"\\[,;:! ](?!\d)|(?<!\d)\s+|\s+(?!\d)|\\left(?![a-z])|\\right(?![a-z])|~")
_QUICK = re.compile(r"([+-]?)(?:(\d{1,40})|\\[dt]?frac\{(-?\d{1,40})\}\{(\d{1,40})\}|(\d{1,40})/(\d{1,40}))")
_CHOICE = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\(?([A-F])\)?\}?")
_CHOICE_AND_TEXT = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?(?:(?=\()\(|(?=[A-F][).:]))([A-F])[).:]?\)?[\s}~\\]+(\S.*)", re.DOTALL
)
_OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])(?:[A-F]|or|and)(?![A-Za-z])")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\\[dt]?frac\{\d+\}\{\d+\}|\d+(?:\.\d+)?(?:/\d+)?)(?![\w.]*\d)")
_RANGE = re.compile(r"\b(?:between|from|to|least|most|more|less|than|not|no|or|if|when|unless|except)\b", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"\d+,\d{1,2}")


class Outcome(NamedTuple):
    """What the comparison says: `error` means that the gold can't be read, `unparsable` that the answer can't."""

    status: Literal["correct", "wrong", "unparsable", "error"]
    reason: str


def equivalent(gold: str, answer: str, options: MathOptions | None = None) -> Outcome:
    """Whether `answer` is the same mathematical answer as `gold`; never raises, and is bounded in time and memory."""
    options = options or MathOptions()
    start_budget()
    if len(answer) > MAX_CHARS:
        return Outcome("unparsable", f"the answer is longer than {MAX_CHARS} characters")
    one, two = _squeezed(gold), _squeezed(answer)
    if not two:
        return Outcome("unparsable", "the answer is empty")
    if one == two:
        return Outcome("correct", "the same text")
    quick = _quick_value(one)
    if quick is not None and (other := _quick_value(two)) is not None:
        return _outcome(quick == other, "exact numbers")
    gold_answer, gold_error = read_answer(gold)
    found, error = read_answer(answer)
    if gold_answer is None:
        return Outcome("error", f"the gold can't be read: {gold_error}")
    if found is None:
        return Outcome("unparsable", f"the answer can't be read: {error}")
    if Comparison(options, gold_answer, found).run():
        return Outcome("correct", "equivalent")
    return _outcome(_other_readings(gold, answer, gold_answer, found, options), "compared by value")


def _outcome(same: bool, how: str) -> Outcome:
    return Outcome("correct" if same else "wrong", how)


def _squeezed(text: str) -> str:
    text = text.strip()
    if len(text) > 2 and text[0] == "$" and text[-1] == "$":
        text = text.strip("$")
    return _SPACE.sub("", text) if not text.isalnum() else text


def _quick_value(text: str) -> Fraction | None:
    match = _QUICK.fullmatch(text)
    if match is None:
        return None
    sign, whole, above, below, top, bottom = match.groups()
    if whole is not None:
        value = Fraction(int(whole))
    else:
        divisor = int(below or bottom)
        if divisor == 0:
            return None
        value = Fraction(int(above or top), divisor)
    return -value if sign == "-" else value


def read_answer(text: str, *, thousands: bool = True) -> tuple[Answer | None, str]:
    """The parsed answer; words that are no formula are a text; else None and the reason."""
    try:
        return parse(text, thousands=thousands), ""
    except TooLargeError as exc:
        return None, str(exc)
    except MathSyntaxError as exc:
        reason = str(exc)
    if is_prose(text):
        plain = unwrapped(normalise(text))
        return Answer(Expr("text", (plain,)), frozenset(), plain), reason
    return None, reason


def _same_choice(gold: str, answer: str) -> bool:
    """`(C) 12` for the choice C, where no other choice is named."""
    letter = _CHOICE.fullmatch(gold.strip())
    found = _CHOICE_AND_TEXT.fullmatch(answer.strip())
    return bool(letter and found and letter[1] == found[1] and not _OTHER_CHOICE.search(found[2]))


def _same_numbers(gold: Answer, answer: Answer, options: MathOptions) -> bool:
    """A gold sentence with two numbers or more against a list of just these, in their order."""
    asked = _NUMBER.findall(gold.text)
    said = Comparison(options, gold, answer).elements(answer.tree)[1]
    if _RANGE.search(gold.text) or len(asked) < 2 or len(asked) != len(said) or len(asked) > 20:
        return False
    pairs = [(read_answer(number)[0], value) for number, value in zip(asked, said, strict=True)]
    return all(
        one is not None and is_scalar(two) and Comparison(options, one, answer).same(one.tree, two)
        for one, two in pairs
    )


def _other_readings(gold: str, answer: str, one: Answer, two: Answer, options: MathOptions) -> bool:
    """A comma that groups digits, or that is a decimal point, read the other way where the kinds say so."""
    if _same_choice(gold, answer):
        return True
    if one.tree.op == "text" and two.tree.op in {"list", "tup"}:
        return _same_numbers(one, two, options)
    lists = one.tree.op in {"list", "set", "tup"}, two.tree.op in {"list", "set", "tup"}
    if lists[0] != lists[1]:
        plain, text = (two, answer) if lists[0] else (one, gold)
        if plain.tree.op == "num" and "," in text:
            again, _ = read_answer(text, thousands=False)
            if again is not None and again.tree.op == "list":
                return Comparison(options, one if lists[0] else again, again if lists[0] else two).run()
    if (
        options.decimal_comma
        and is_scalar(one.tree)
        and two.tree.op in {"list", "qty"}
        and _DECIMAL_COMMA.search(two.text)
    ):
        again, _ = read_answer(_DECIMAL_COMMA.sub(lambda match: match.group().replace(",", "."), two.text))
        return again is not None and again.tree.op in {"num", "qty", "mul"} and Comparison(options, one, again).run()
    return False
