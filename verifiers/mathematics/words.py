"""The names that mathematics spells with letters, and how a run of letters splits into them."""

from __future__ import annotations

import re
from functools import lru_cache


def word_list(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def word_set(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


FUNCTIONS = word_set(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech csch "
    "arcsinh arccosh arctanh asin acos atan asinh acosh atanh arsinh arcosh artanh tg ctg arctg arcctg "
    "cosec log ln lg exp sqrt cbrt abs sgn sign gcd lcm min max floor ceil det deg dim ker Re Im arg mod "
    "lim sup inf sum prod int binom Res erf cis"
)
CONSTANTS = {"pi": "pi", "infty": "inf", "infinity": "inf", "oo": "inf", "Infinity": "inf", "inf": "inf", "Inf": "inf"}
GREEK = word_set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa varkappa lambda mu nu "
    "xi omicron rho varrho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda "
    "Xi Pi Sigma Upsilon Phi Psi Omega ell hbar imath jmath aleph nabla partial wp Re Im mho"
)
SAME_LETTER = {"varepsilon": "epsilon", "varphi": "phi", "vartheta": "theta", "varrho": "rho", "varsigma": "sigma"}
SEPARATORS = frozenset({"and", "or", "AND", "OR", "And", "Or"})
NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        word_list(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
            "sixteen seventeen eighteen nineteen twenty"
        )
    )
}
NUMBER_WORDS |= {char: index for index, char in enumerate("零一二三四五六七八九十")}
NUMBER_WORDS |= {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
FRACTION_WORDS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4, "third": 3, "thirds": 3}
FRACTION_WORDS |= {
    word + end: value
    for value, word in enumerate(word_list("fourth fifth sixth seventh eighth ninth tenth"), start=4)
    for end in ("", "s")
}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_FUNCTION_PREFIX = re.compile(
    "("
    + "|".join(
        sorted([*FUNCTIONS - {"int", "inf", "arg", "mod", "deg", "lim", "Re", "Im"}, "pi"], key=len, reverse=True)
    )
    + ")"
)
_PLAIN_GREEK = word_set("alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi psi omega Omega")
_TWO_LETTER_WORDS = word_set(
    "or is to of in no No if at by as so we be it up an am pm do go my us he ft km cm mm kg mg ml mL hr sq cu"
)
_RUNS = "abcdefghijklmnopqrstuvwxyz"


@lru_cache(maxsize=4096)
def split_letters(run: str) -> tuple[tuple[str, str], ...]:
    """A run of letters as ("fn", name), ("const", name), ("name", letter) and ("text", word) pieces.

    A word stays whole ("even", "seconds"); what can't be one is a product ("xy", "ABC", "npi", "xsin").
    """
    if len(run) == 1:
        return (("name", run),)
    if run in CONSTANTS:
        return (("const", CONSTANTS[run]),)
    if run in FUNCTIONS:
        return (("fn", run),)
    if run in _PLAIN_GREEK:
        return (("name", run),)
    if run in SEPARATORS:
        return (("text", run.lower()),)
    if len(run) == 2:
        return (("text", run),) if run in _TWO_LETTER_WORDS else tuple(("name", letter) for letter in run)
    if pieces := _with_function(run):
        return pieces
    return tuple(("name", letter) for letter in run) if _is_product(run) else (("text", run),)


def _with_function(run: str) -> tuple[tuple[str, str], ...]:
    """`sinx`, `xsin`, `npi`: a function's or pi's name with at most two letters before and one after."""
    for match in _FUNCTION_PREFIX.finditer(run):
        before, after = run[: match.start()], run[match.end() :]
        if len(before) + len(after) > 2 or len(after) > 1 or (before and after):
            continue
        name = ("const", "pi") if match[1] == "pi" else ("fn", match[1])
        return (*(("name", letter) for letter in before), name, *(("name", letter) for letter in after))
    return ()


def _is_product(run: str) -> bool:
    if len(run) > 4:
        return False
    if run.isupper() or run in _RUNS or any(letter.isupper() for letter in run[1:]):
        return True
    return (
        not any(vowel in run for vowel in "aeiouAEIOU")
        and run == run.lower()
        and run not in {"yrs", "hrs", "lbs", "mph", "pct"}
    )
