r"""`numeric`: the stated answer is exactly the gold number; nothing else in the text is ever taken for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Rational, Real
from typing import Any

from verifiers.extract import final_answer
from verifiers.registry import register
from verifiers.verdict import GoldAudit, TaskLike, Verdict

# Bounds are checked before any arithmetic, so that no text can make it slow: 256 digits and 10**400 at most.
MAX_NUMBER_CHARS = 256
MAX_EXPONENT = 400
MAX_GOLD_BITS = 4096

_SIGN_AND_CURRENCY = re.compile(r"([+-]?)\s*(?:\\?\$)?\s*([+-]?)\s*(.+)", re.DOTALL)
_DECIMAL = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]+))?")
_FRACTION = re.compile(r"([0-9]+)\s*/\s*([0-9]+)|\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")


class NotANumberError(ValueError):
    """The text is not one number in a form that `parse_number` documents; the message says why."""


def _clip(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _strip_decoration(text: str) -> str:
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text.removesuffix(".").rstrip().replace("\N{MINUS SIGN}", "-").replace("{,}", ",")


def parse_number(text: str) -> Fraction:
    r"""The value of one number: `42`, `-3`, `1,234`, `.5`, `1e3`, `7/2`, `\frac{7}{2}`, `1{,}234`, `$5`, `$7$`, `5.`

    Raises `NotANumberError` for anything else, longer than `MAX_NUMBER_CHARS` or with an exponent above `MAX_EXPONENT`.
    """
    if len(text) > MAX_NUMBER_CHARS:
        raise NotANumberError(f"{len(text)} characters is too long for a number (at most {MAX_NUMBER_CHARS})")
    body = _strip_decoration(text)
    if not body:
        raise NotANumberError("it is empty")
    match = _SIGN_AND_CURRENCY.fullmatch(body)
    if match is None or (match[1] and match[2]):
        raise NotANumberError("it is not a number")
    value = _parse_magnitude(match[3])
    return -value if "-" in (match[1], match[2]) else value


def _parse_magnitude(text: str) -> Fraction:
    if match := _FRACTION.fullmatch(text):
        numerator, denominator = int(match[1] or match[3]), int(match[2] or match[4])
        if denominator == 0:
            raise NotANumberError("it divides by zero")
        return Fraction(numerator, denominator)
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match[1] or match[2]):
        raise NotANumberError("it is not a number")
    exponent = int(match[3] or 0)
    if abs(exponent) > MAX_EXPONENT:
        raise NotANumberError(f"its exponent is beyond {MAX_EXPONENT}")
    fraction_digits = match[2] or ""
    digits = int(match[1].replace(",", "") + fraction_digits)
    shift = exponent - len(fraction_digits)
    return Fraction(digits * 10**shift) if shift >= 0 else Fraction(digits, 10**-shift)


def parse_gold(gold: Any) -> Fraction:
    """The value of a gold answer: a number, or text as in `parse_number`; of text only what follows `####` counts.

    A float stands for its shortest decimal form (0.1 is 1/10). Raises `NotANumberError`.
    """
    if isinstance(gold, str):
        return parse_number(gold.rpartition("####")[2].strip())
    if isinstance(gold, bool):
        raise NotANumberError("it is a truth value")
    if isinstance(gold, Rational):
        value = Fraction(int(gold.numerator), int(gold.denominator))
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_GOLD_BITS:
            raise NotANumberError(f"it needs more than {MAX_GOLD_BITS} bits")
        return value
    if isinstance(gold, Real | Decimal):
        return parse_number(str(gold))
    raise NotANumberError(f"it is of type {type(gold).__name__}")


@register("numeric")
@dataclass(frozen=True)
class Numeric:
    r"""1 if the final answer (`verifiers.extract.final_answer`) is a number equal to `task.answer`, else 0.

    `wrong` is another number, `unparsable` no stated answer or one that is not a number, `error` an unusable gold.
    """

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        try:
            gold = parse_gold(task.answer)
        except NotANumberError as exc:
            return Verdict(score=0.0, status="error", reason=f"the gold answer is unusable: {exc}")
        stated = final_answer(completion)
        if stated is None:
            return Verdict(
                score=0.0, status="unparsable", reason=r"no <answer>..</answer> and no \boxed{} after the thinking"
            )
        shown = _clip(stated.strip())
        try:
            value = parse_number(stated.strip())
        except NotANumberError as exc:
            return Verdict(
                score=0.0, status="unparsable", reason=f"the stated answer {shown!r}: {exc}", extracted=shown
            )
        extracted = stated.strip()
        if value == gold:
            return Verdict(score=1.0, status="correct", reason=f"{shown} equals the gold answer", extracted=extracted)
        reason = f"{shown} is not the gold answer {_clip(str(gold))}"
        return Verdict(score=0.0, status="wrong", reason=reason, extracted=extracted)

    def prepare(self, task: TaskLike) -> GoldAudit:
        """Whether the gold is one number."""
        try:
            gold = parse_gold(task.answer)
        except NotANumberError as exc:
            missing = task.answer is None or (isinstance(task.answer, str) and not task.answer.strip())
            return GoldAudit(status="missing" if missing else "unparsable", reason=str(exc))
        return GoldAudit(status="ok", reason="one number", parsed=_clip(str(gold)))


numeric = Numeric()
