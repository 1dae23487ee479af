"""Units: their dimensions and exact factors to SI, read from the words after a number."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from verifiers.mathematics.words import word_set

F = Fraction


class Unit(NamedTuple):
    """`dimensions`: sorted (base, exponent) pairs; `factor`: how many base units one is; `label`: words that are no unit."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction
    label: str = ""


_LENGTH = {
    "m": F(1), "meter": F(1), "metre": F(1), "cm": F(1, 100), "centimeter": F(1, 100), "centimetre": F(1, 100),
    "mm": F(1, 1000), "millimeter": F(1, 1000), "millimetre": F(1, 1000), "km": F(1000), "kilometer": F(1000),
    "kilometre": F(1000), "dm": F(1, 10), "decimeter": F(1, 10), "nm": F(1, 10**9), "nanometer": F(1, 10**9),
    "um": F(1, 10**6), "micron": F(1, 10**6), "in": F(254, 10000), "inch": F(254, 10000), "ft": F(3048, 10000),
    "foot": F(3048, 10000), "yd": F(9144, 10000), "yard": F(9144, 10000), "mi": F(1609344, 1000),
    "mile": F(1609344, 1000), "米": F(1), "厘米": F(1, 100), "毫米": F(1, 1000), "千米": F(1000), "公里": F(1000),
    "pc": F(30856775814913673), "AU": F(149597870700), "au": F(149597870700),
}  # fmt: skip
_MASS = {
    "g": F(1, 1000), "gram": F(1, 1000), "kg": F(1), "kilogram": F(1), "mg": F(1, 10**6), "milligram": F(1, 10**6),
    "t": F(1000), "ton": F(1000), "tonne": F(1000), "lb": F(45359237, 10**8), "pound": F(45359237, 10**8),
    "oz": F(45359237, 16 * 10**8), "ounce": F(45359237, 16 * 10**8), "克": F(1, 1000), "千克": F(1), "公斤": F(1),
    "吨": F(1000),
}  # fmt: skip
_TIME = {
    "s": F(1), "sec": F(1), "second": F(1), "ms": F(1, 1000), "millisecond": F(1, 1000), "min": F(60), "minute": F(60),
    "h": F(3600), "hr": F(3600), "hour": F(3600), "day": F(86400), "week": F(604800), "month": F(0), "year": F(0),
    "yr": F(0), "us": F(1, 10**6), "ns": F(1, 10**9), "秒": F(1), "分钟": F(60), "分": F(60), "小时": F(3600),
    "时": F(3600), "天": F(86400), "日": F(86400), "周": F(604800), "年": F(0), "月": F(0),
}  # fmt: skip
_MONEY = {
    "dollar": ("dollar", F(1)), "$": ("dollar", F(1)), "usd": ("dollar", F(1)),
    "cent": ("dollar", F(1, 100)), "¢": ("dollar", F(1, 100)),
    "yuan": ("yuan", F(1)), "rmb": ("yuan", F(1)), "¥": ("yuan", F(1)), "元": ("yuan", F(1)), "万元": ("yuan", F(10**4)),
    "euro": ("euro", F(1)), "€": ("euro", F(1)), "£": ("gbp", F(1)),
    "ruble": ("ruble", F(1)), "rupee": ("rupee", F(1)), "yen": ("yen", F(1)),
    "penny": ("dollar", F(1, 100)), "pence": ("gbp", F(1, 100)), "kopeck": ("ruble", F(1, 100)),
}  # fmt: skip
_DERIVED: dict[str, tuple[dict[str, int], Fraction]] = {
    "L": ({"length": 3}, F(1, 1000)), "l": ({"length": 3}, F(1, 1000)), "liter": ({"length": 3}, F(1, 1000)),
    "litre": ({"length": 3}, F(1, 1000)), "ml": ({"length": 3}, F(1, 10**6)), "mL": ({"length": 3}, F(1, 10**6)),
    "milliliter": ({"length": 3}, F(1, 10**6)), "升": ({"length": 3}, F(1, 1000)), "毫升": ({"length": 3}, F(1, 10**6)),
    "gallon": ({"volume_us": 1}, F(1)), "quart": ({"volume_us": 1}, F(1, 4)), "pint": ({"volume_us": 1}, F(1, 8)),
    "cup": ({"volume_us": 1}, F(1, 16)), "acre": ({"length": 2}, F(40468564224, 10**7)),
    "hectare": ({"length": 2}, F(10000)),
    "ha": ({"length": 2}, F(10000)), "mph": ({"length": 1, "time": -1}, F(1609344, 3600000)),
    "kmh": ({"length": 1, "time": -1}, F(1000, 3600)), "N": ({"mass": 1, "length": 1, "time": -2}, F(1)),
    "newton": ({"mass": 1, "length": 1, "time": -2}, F(1)), "J": ({"mass": 1, "length": 2, "time": -2}, F(1)),
    "joule": ({"mass": 1, "length": 2, "time": -2}, F(1)), "kJ": ({"mass": 1, "length": 2, "time": -2}, F(1000)),
    "W": ({"mass": 1, "length": 2, "time": -3}, F(1)), "watt": ({"mass": 1, "length": 2, "time": -3}, F(1)),
    "kW": ({"mass": 1, "length": 2, "time": -3}, F(1000)), "Pa": ({"mass": 1, "length": -1, "time": -2}, F(1)),
    "kPa": ({"mass": 1, "length": -1, "time": -2}, F(1000)), "Hz": ({"time": -1}, F(1)), "hertz": ({"time": -1}, F(1)),
    "kHz": ({"time": -1}, F(1000)), "MHz": ({"time": -1}, F(10**6)),
    "eV": ({"mass": 1, "length": 2, "time": -2}, F(1602176634, 10**28)),
    "K": ({"temperature": 1}, F(1)), "kelvin": ({"temperature": 1}, F(1)), "A": ({"current": 1}, F(1)),
    "V": ({"mass": 1, "length": 2, "time": -3, "current": -1}, F(1)),
    "volt": ({"mass": 1, "length": 2, "time": -3, "current": -1}, F(1)),
    "ohm": ({"mass": 1, "length": 2, "time": -3, "current": -2}, F(1)), "C": ({"time": 1, "current": 1}, F(1)),
    "mol": ({"amount": 1}, F(1)), "mole": ({"amount": 1}, F(1)), "bit": ({"bit": 1}, F(1)), "byte": ({"bit": 1}, F(8)),
    "rad": ({}, F(1)), "radian": ({}, F(1)),
    "erg": ({"mass": 1, "length": 2, "time": -2}, F(1, 10**7)), "dozen": ({}, F(12)),
    "平方米": ({"length": 2}, F(1)), "平方厘米": ({"length": 2}, F(1, 10**4)),
    "立方米": ({"length": 3}, F(1)), "立方厘米": ({"length": 3}, F(1, 10**6)),
}  # fmt: skip
_CALENDAR = {"month": F(1, 12), "year": F(1), "yr": F(1), "年": F(1), "月": F(1, 12)}
# Words that count nothing in particular: they say no more than the bare number.
_GENERIC = word_set(
    "unit way time total number possible different distinct of in the a an square cubic sq cu and each "
    "only exactly approximately about people person item piece value solution integer triple pair point "
    "element term digit 个 种 人 次 个数 条 only; total; area volume length long away apart high tall wide old "
    "later"
)
_FACTOR = re.compile(r"([A-Za-z]+|[\u3400-\u9fff]+|[$€£¥])(?:\^?\{?([+-]?\d)\}?)?")
_PLURALS = {"feet": "foot", "inches": "inch", "pence": "pence", "pennies": "penny", "cubes": "cube"}


def _lookup(word: str) -> tuple[dict[str, int], Fraction] | None:
    for name in dict.fromkeys(
        (word, word.lower() if len(word) > 2 else word, _singular(word), _singular(word.lower()))
    ):
        if name in _CALENDAR:
            return {"calendar": 1}, _CALENDAR[name]
        for base, table in (("length", _LENGTH), ("mass", _MASS), ("time", _TIME)):
            if name in table:
                return {base: 1}, table[name]
        if name in _MONEY:
            currency, factor = _MONEY[name]
            return {currency: 1}, factor
        if name in _DERIVED:
            return _DERIVED[name]
    return None


def _singular(word: str) -> str:
    if word in _PLURALS:
        return _PLURALS[word]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def is_unit(word: str) -> bool:
    """Whether one word is the name of a unit."""
    return _lookup(word) is not None


@lru_cache(maxsize=1024)
def parse_unit(words: str) -> Unit | None:
    r"""The unit that `words` name ("m/s^2", "square feet", "miles per hour"); a label for other words, None for no words.

    Words that only count ("units", "ways") are dropped.
    """
    text = words.replace(".", " ").replace("\\cdot", "*").replace("{", "").replace("}", "")
    text = re.sub(r"\bper\b|每", "/", text).strip()
    text = re.sub(r"-(?!\d)", " ", text)
    dimensions: dict[str, int] = {}
    factor, sign, power, unknown = F(1), 1, 1, []
    for piece in re.findall(r"[A-Za-z]+(?:\^?-?\d)?|[\u3400-\u9fff]+|[/*()$€£¥]", text):
        if piece == "/":
            sign = -1
        elif piece.lower() in {"square", "squared", "sq", "cubic", "cubed", "cu"}:
            if piece.endswith("d"):
                continue
            power = 2 if piece.lower().startswith("sq") else 3
        elif piece not in {"*", "(", ")"}:
            match = _FACTOR.fullmatch(piece)
            known = _lookup(match[1]) if match else None
            if match is None or known is None:
                if _singular(piece.lower()) not in _GENERIC:
                    unknown.append(_singular(piece.lower()))
                continue
            exponent = sign * power * int(match[2] or 1)
            factor *= known[1] ** exponent
            for base, count in known[0].items():
                dimensions[base] = dimensions.get(base, 0) + count * exponent
            power = 1
    if unknown and not dimensions:
        return Unit((), F(1), " ".join(unknown))
    if not dimensions and factor == 1:
        return None
    return Unit(tuple(sorted((base, count) for base, count in dimensions.items() if count)), factor)
