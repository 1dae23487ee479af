"""What the comparison of mathematics may overlook."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

MissingUnits = Literal["allow", "refuse"]
Percent = Literal["loose", "value"]


@dataclass(frozen=True)
class MathOptions:
    """The conventions of `equivalent`; the defaults are those that agree best with the labelled cases."""

    unordered_lists: bool = True  # a bare list may come in any order ("2, 5" for "5, 2"); tuples never
    missing_units: MissingUnits = "allow"  # "5" for "5 cm" and "5 cm" for "5"; two different units never agree
    percent: Percent = "loose"  # "50" for "50%" (and "50%" for "50"); "value" takes % as a factor 1/100 alone
    rounded_digits: int = 4  # significant digits from which a decimal stands for a value that has none; 0: never
    gold_digits: int = 2  # significant digits from which a decimal gold stands for what rounds to it; 0: never
    decimal_comma: bool = True  # "2,74" for a gold 2.74

    def __post_init__(self) -> None:
        for name, choices in (("missing_units", get_args(MissingUnits)), ("percent", get_args(Percent))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for name in ("rounded_digits", "gold_digits"):
            if not isinstance(getattr(self, name), int) or not 0 <= getattr(self, name) <= 50:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be an integer from 0 to 50")
        for field in fields(self):
            if isinstance(field.default, bool) and not isinstance(getattr(self, field.name), bool):
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}; it must be true or false")
