"""Words by writing system, with code, formulas and markup left out; every function is linear in the text."""

from __future__ import annotations

import re
from collections import Counter

# Words in each writing system. Han and kana are not spaced, and count by the character; so are Thai, Lao, Khmer and
# Burmese, whose words are taken to be `_CHARS_PER_UNSPACED_WORD` characters long.
_RANGES = {
    "latin": r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "greek": r"\u0370-\u03ff\u1f00-\u1fff",
    "cyrillic": r"\u0400-\u052f",
    "armenian": r"\u0531-\u0587",
    "hebrew": r"\u0590-\u05ff",
    "arabic": r"\u0600-\u065f\u066e-\u06ef\u06fa-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc",
    "devanagari": r"\u0900-\u0963\u0971-\u097f",
    "bengali": r"\u0980-\u09e3\u09f0-\u09ff",
    "gurmukhi": r"\u0a01-\u0a65\u0a70-\u0a75",
    "gujarati": r"\u0a81-\u0ae3",
    "tamil": r"\u0b82-\u0be5",
    "telugu": r"\u0c00-\u0c63",
    "kannada": r"\u0c80-\u0ce3",
    "malayalam": r"\u0d00-\u0d63",
    "georgian": r"\u10a0-\u10ff\u1c90-\u1cbf",
    "hangul": r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "ethiopic": r"\u1200-\u137f",
    "thai": r"\u0e01-\u0e4e",
    "lao": r"\u0e81-\u0ecd",
    "khmer": r"\u1780-\u17d3",
    "burmese": r"\u1000-\u103f",
    "kana": r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "han": r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af",
}
_WORD = re.compile("|".join(f"(?P<{name}>[{characters}]+)" for name, characters in _RANGES.items()))
_BY_CHARACTER = {"han", "kana"}
_UNSPACED = {"thai", "lao", "khmer", "burmese"}
_CHARS_PER_UNSPACED_WORD = 4
_BLOCKS = (("```", "```"), ("~~~", "~~~"), ("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"))
_INLINE = re.compile(r"`[^`\n]*`|\$[^$\n]*\$|</?\w[^<>\n]{0,100}>|\b(?:https?://|www\.)\S+|\\[A-Za-z]+|\b\w*[0-9_]\w*")


def prose(text: str) -> str:
    """The text without fenced and inline code, formulas, tags, addresses, LaTeX commands and names with digits in them."""
    for opening, closing in _BLOCKS:
        text = _without(text, opening, closing)
    return _INLINE.sub(" ", text)


def _without(text: str, opening: str, closing: str) -> str:
    """The text without what stands between `opening` and the next `closing`; an opening without an end stays."""
    kept: list[str] = []
    position = 0
    while (start := text.find(opening, position)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            break
        kept.append(text[position:start])
        position = end + len(closing)
    return " ".join([*kept, text[position:]])


def count_words(text: str) -> Counter[str]:
    """Words of `text` by writing system; single letters of a spaced system are symbols, and not counted."""
    counts: Counter[str] = Counter()
    for match in _WORD.finditer(text):
        script, length = str(match.lastgroup), match.end() - match.start()
        if script in _BY_CHARACTER:
            counts[script] += length
        elif script in _UNSPACED:
            counts[script] += -(-length // _CHARS_PER_UNSPACED_WORD)
        elif length > 1:
            counts[script] += 1
    return counts
