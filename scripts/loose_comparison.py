"""A comparison looser than any verifier's: it never decides a reward, only which verdicts a person should look at."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

RELATIVE_TOLERANCE = 1e-3
MAX_CHARS = 500
TAIL_CHARS = 300

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?|-?\.\d+")
_FRACTION = re.compile(r"(-?)\\?[dt]?frac\{?(-?\d{1,15})\}?\{?(\d{1,15})\}?|(-?)(\d{1,15})/(\d{1,15})")
_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|mbox|textbf|operatorname)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\(?:left|right|[,;:! ]|[()\[\]])|[\s$*`'\";:!?{}]|\.(?!\d)|\\\\|°|\^\\circ|\^\{\\circ\}")


def loosely_equal(gold: Any, stated: str) -> bool:
    """Whether `stated` could mean the gold: the same text without its dress, or a number within 0.1 %, or a percentage."""
    if not isinstance(gold, str | int | float) or isinstance(gold, bool):
        return False
    gold = str(gold).rpartition("####")[2]
    gold_text, text = normalized(gold), normalized(stated)
    if not gold_text or not text:
        return False
    if gold_text == text or text.endswith(("=" + gold_text, "is" + gold_text)):
        return True
    return any(_close(one, other) for one in _values(gold) for other in _values(stated))


def normalized(text: str) -> str:
    """Lower case, compatible characters as one, and without spaces, dollars, final marks and LaTeX's dress."""
    return _NOISE.sub("", _plain(text))


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text[:MAX_CHARS]).replace("\N{MINUS SIGN}", "-").lower()
    for _ in range(3):
        text = _WRAPPER.sub(r"\1", text)
    return text.replace("\\%", "%").replace("dfrac", "frac").replace("tfrac", "frac")


def last_number(completion: str) -> str | None:
    """The last number in the last `TAIL_CHARS` characters, wherever it stands."""
    numbers = _NUMBER.findall(completion[-TAIL_CHARS:])
    return numbers[-1] if numbers else None


def _values(text: str) -> list[float]:
    """What the text could mean as one number; of a percentage both readings."""
    text = "".join(_plain(text).split())
    fractions = [_quotient(match) for match in _FRACTION.finditer(text)]
    found = _NUMBER.findall(text)
    if fractions:
        values = fractions[:1] if len(fractions) == 1 else []
    else:
        values = [float(found[0].replace(",", ""))] if len(found) == 1 else []
    values = [value for value in values if math.isfinite(value)]
    return values + [value / 100 for value in values if "%" in text or "percent" in text]


def _quotient(match: re.Match[str]) -> float:
    sign, numerator, denominator = match.groups()[:3] if match[2] else match.groups()[3:]
    if int(denominator) == 0:
        return math.nan
    return (-1 if sign else 1) * int(numerator) / int(denominator)


def _close(one: float, other: float) -> bool:
    return one == other or abs(one - other) <= RELATIVE_TOLERANCE * max(abs(one), abs(other))
