"""`repetition`: a punishment for text that says the same again and again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from verifiers.registry import register
from verifiers.verdict import TaskLike, Verdict

MAX_WORDS = 50_000
# A CJK character, a run of other word characters, or a symbol: spaces need not stand between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


@register("repetition")
@dataclass(frozen=True)
class Repetition:
    """Minus the share of repeated n-grams, and -1 for a text that ends in a loop; `correct` means neither is too much.

    The share is 1 - distinct / all n-grams of `ngram` words; up to `max_share` it costs nothing, since reasoning quotes
    its question. A loop is a unit of words that the text ends with `min_repeats` times in a row or more, over at least
    `min_loop_words` words. Words are runs of letters or digits, symbols and CJK characters; the last 50,000 count.
    Linear in the length.
    """

    ngram: int = 8
    max_share: float = 0.3
    min_repeats: int = 4
    min_loop_words: int = 24

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram is {self.ngram}; it must be at least 1")
        if not 0 <= self.max_share < 1:
            raise ValueError(f"max_share is {self.max_share}; it must be at least 0 and below 1")
        if self.min_repeats < 2:
            raise ValueError(f"min_repeats is {self.min_repeats}; it must be at least 2")
        if self.min_loop_words < 1:
            raise ValueError(f"min_loop_words is {self.min_loop_words}; it must be at least 1")

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        del task
        words = _WORD.findall(completion)[-MAX_WORDS:]
        length, period = final_loop(words, self.min_repeats)
        if length >= self.min_loop_words:
            reason = f"the text ends in {length // period} repeats of {' '.join(words[-period:])[:80]!r}"
            return Verdict(score=-1.0, status="wrong", reason=reason, parts={"share": 1.0})
        share = repeated_share(words, self.ngram)
        reason = f"{share:.0%} of the {self.ngram}-grams of {len(words)} words are repeats"
        if share <= self.max_share:
            return Verdict(score=0.0, status="correct", reason=reason, parts={"share": share})
        return Verdict(score=-share, status="wrong", reason=reason, parts={"share": share})


def repeated_share(words: Sequence[str], ngram: int) -> float:
    """1 - distinct / all n-grams; 0 for a text with none."""
    total = len(words) - ngram + 1
    if total < 1:
        return 0.0
    numbers: dict[str, int] = {}
    coded = [numbers.setdefault(word, len(numbers)) for word in words]
    return 1 - len({tuple(coded[i : i + ngram]) for i in range(total)}) / total


def final_loop(words: Sequence[str], min_repeats: int) -> tuple[int, int]:
    """(length, period) of the longest end of `words` that is one unit at least `min_repeats` times over, or (0, 0).

    By the prefix function of the reversed words (Knuth, Morris and Pratt): a prefix of length i with longest border b
    has the smallest period i - b.
    """
    backwards = list(reversed(words))
    borders = [0] * (len(backwards) + 1)
    best = (0, 0)
    border = 0
    for i in range(1, len(backwards)):
        while border and backwards[i] != backwards[border]:
            border = borders[border]
        border += backwards[i] == backwards[border]
        borders[i + 1] = border
        period = i + 1 - border
        if (i + 1) >= min_repeats * period:
            best = (i + 1, period)
    return best
