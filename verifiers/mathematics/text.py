"""Answers in words: yes and no, named days, phrases; compared as words, never by a number inside them."""

from __future__ import annotations

import re

from verifiers.mathematics.words import word_set

_COMMANDS = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf)?|mathrm|mathbf|mbox|emph|left|right|quad|displaystyle|,|;|!|:)(?![a-zA-Z])|[{}$\\]"
)
_ORDINAL = re.compile(r"(\d)(?:st|nd|rd|th)\b")
_NOT_WORDS = re.compile(r"[^\w%<>=+*/^-]+")
_MEANINGS = {
    "yes": "yes", "true": "yes", "correct": "yes", "是": "yes", "对": "yes", "正确": "yes", "是的": "yes", "成立": "yes",
    "no": "no", "false": "no", "incorrect": "no", "否": "no",
    "错": "no", "错误": "no", "不是": "no", "不成立": "no", "不正确": "no",
    "no solution": "none", "no solutions": "none", "none": "none", "no real solution": "none", "no real solutions": "none",
    "no real roots": "none", "no real root": "none", "no roots": "none",
    "empty set": "none", "the empty set": "none", "无解": "none", "空集": "none", "emptyset": "none", "varnothing": "none",
    "does not exist": "dne", "dne": "dne", "undefined": "undefined", "not defined": "undefined", "不存在": "dne",
    "an infinite number": "inf", "infinite number": "inf", "infinitely many": "inf",
    "infinite": "inf", "infinity": "inf", "infty": "inf", "infinitely many solutions": "inf",
    "无穷多": "inf", "无数": "inf", "diverges": "inf",
}  # fmt: skip
_ARTICLES = frozenset(["the", "a", "an", "is", "are", "it", "of"])
# Words that a name or an adjective does without: "Alice wins" is Alice, "isosceles triangle" is isosceles.
_WEAK = _ARTICLES | word_set(
    "triangle quadrilateral number numbers integer integers function player person wins win winner will winning "
    "strategy has have can must be and condition function curve"
)
_VERBS = word_set("is are wins win winner will winning strategy has have can must be")
_OPENING_WORDS = word_set("all any every")
_YES_OR_NO = re.compile(
    r"(?:\\text\w*\s*\{)?\s*(yes|no|true|false|是|否|不是)\s*(?:[,.;:!，。；（(}].*)?", re.IGNORECASE | re.DOTALL
)
_LOGIC = word_set("not no never or nor neither none and but if only cannot except without both either 不 或 无")
_FORMULA = re.compile(r"\\(?!text|mathrm|mbox|mathbf|emph|quad|left|right)[a-zA-Z]{2,}")


def words_of(text: str) -> list[str]:
    """The lower-case words, without commands, punctuation and brackets."""
    plain = _COMMANDS.sub(" ", text)
    plain = _ORDINAL.sub(r"\1", plain.lower())
    return [word for word in _NOT_WORDS.sub(" ", plain).split() if word]


def meaning(text: str) -> str:
    """One form for the words that say the same: "True" is "yes", "no solutions" is "none"."""
    phrase = " ".join(words_of(text))
    return _MEANINGS.get(phrase, phrase)


def same_yes_or_no(gold: str, answer: str) -> bool | None:
    """Whether two texts that open with yes or no open with the same; None if one does not, or the gold goes on to numbers."""
    one, two = _YES_OR_NO.fullmatch(gold.strip()), _YES_OR_NO.fullmatch(answer.strip())
    if one is None or two is None or any(char.isdigit() for char in gold):
        return None
    return _MEANINGS[one[1].lower()] == _MEANINGS[two[1].lower()]


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
    if said[:1] != asked[:1]:
        said, asked = (words[words[:1] != [] and words[0] in _OPENING_WORDS :] for words in (said, asked))
        if said == asked:
            return bool(said)
    content = [_content(words) for words in (said, asked)]
    if not any(content):  # "Player A wins" is player A
        plain = [[word for word in words if word not in _VERBS] for words in (said, asked)]
        return plain[0] == plain[1] != []
    if content[0] == content[1] and set(content[0]) - _LOGIC:
        return True
    if len(asked) < 4 or _FORMULA.search(gold) or any(char.isdigit() for char in gold + answer):
        return False
    if _LOGIC & set(asked):
        return False
    content = [word for word in said if word not in _ARTICLES]
    return 0 < len(content) < len(asked) and _contains(asked, said) and any(len(word) > 2 for word in content)


def _content(words: list[str]) -> list[str]:
    """The words that say something, in the singular, without a variable that they are said of ("n is even")."""
    kept = [word for word in words if word not in _WEAK]
    kept = [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in kept]
    if len(kept) > 1 and kept[0] in {"when", "if"}:
        kept = kept[1:]
    return kept[1:] if len(kept) > 1 and len(kept[0]) == 1 and kept[0].isalpha() and kept[0] not in _LOGIC else kept


def _contains(words: list[str], phrase: list[str]) -> bool:
    return any(words[start : start + len(phrase)] == phrase for start in range(len(words) - len(phrase) + 1))
