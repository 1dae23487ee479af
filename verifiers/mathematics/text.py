"""Answers in words: yes and no, named days, phrases; compared as words, never by a number inside them."""

from __future__ import annotations

import re

from verifiers.mathematics.words import word_set

_COMMANDS = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf)?|mathrm|mathbf|mbox|emph|left|right|quad|displaystyle|,|;|!|:)(?![a-zA-Z])|[{}$\\]"
)
_NOT_WORDS = re.compile(r"[^\w%<>=+*/^-]+")
_MEANINGS = {
    "yes": "yes", "true": "yes", "correct": "yes", "是": "yes", "对": "yes", "正确": "yes", "是的": "yes", "成立": "yes",
    "no": "no", "false": "no", "incorrect": "no", "否": "no",
    "错": "no", "错误": "no", "不是": "no", "不成立": "no", "不正确": "no",
    "no solution": "none", "no solutions": "none", "none": "none", "no real solution": "none", "no real solutions": "none",
    "empty set": "none", "the empty set": "none", "无解": "none", "空集": "none", "emptyset": "none", "varnothing": "none",
    "does not exist": "dne", "dne": "dne", "undefined": "undefined", "not defined": "undefined", "不存在": "dne",
    "an infinite number": "inf", "infinite number": "inf", "infinitely many": "inf",
    "infinite": "inf", "infinity": "inf", "infty": "inf", "infinitely many solutions": "inf",
    "无穷多": "inf", "无数": "inf", "diverges": "inf",
}  # fmt: skip
_ARTICLES = frozenset(["the", "a", "an", "is", "are", "it", "of"])
_LOGIC = word_set("not no never or nor neither none and but if only cannot except without both either 不 或 无")
_FORMULA = re.compile(r"\\(?!text|mathrm|mbox|mathbf|emph|quad|left|right)[a-zA-Z]{2,}")


def words_of(text: str) -> list[str]:
    """The lower-case words, without commands, punctuation and brackets."""
    plain = _COMMANDS.sub(" ", text)
    return [word for word in _NOT_WORDS.sub(" ", plain.lower()).split() if word]


def meaning(text: str) -> str:
    """One form for the words that say the same: "True" is "yes", "no solutions" is "none"."""
    phrase = " ".join(words_of(text))
    return _MEANINGS.get(phrase, phrase)


def is_prose(text: str) -> bool:
    """Whether a text that is no formula may be an answer in words: at least one word of three letters, or a Chinese one."""
    plain = re.sub(r"\\[a-zA-Z]+", " ", text)
    return bool(re.search(r"[A-Za-z]{3,}|[\u4e00-\u9fff]|\b(?:no|No|NO)\b", plain))


def same_words(gold: str, answer: str) -> bool:
    """Whether two texts say the same: the same words, or the gold sentence's own words picked out of it.

    A phrase stands for a sentence of four words or more that contains it, if the sentence has no negation, alternative
    or number that the phrase could leave out.
    """
    if meaning(gold) == meaning(answer):
        return True
    said, asked = words_of(answer), words_of(gold)
    if [word for word in said if word not in _ARTICLES and word != "and"] == [
        word for word in asked if word not in _ARTICLES and word != "and"
    ]:
        return True
    if asked and said and asked[0] in {"yes", "no", "true", "false"} and len(asked) == 1 and said[0] in _MEANINGS:
        return _MEANINGS[said[0]] == _MEANINGS[asked[0]] and "," in answer
    if len(asked) < 4 or _FORMULA.search(gold) or any(char.isdigit() for char in gold + answer):
        return False
    if _LOGIC & set(asked):
        return False
    content = [word for word in said if word not in _ARTICLES]
    return 0 < len(content) < len(asked) and _contains(asked, said) and any(len(word) > 2 for word in content)


def _contains(words: list[str], phrase: list[str]) -> bool:
    return any(words[start : start + len(phrase)] == phrase for start in range(len(words) - len(phrase) + 1))
