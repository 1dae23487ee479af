r"""Where prose states a value: "the final answer is ..", "答案是..", "#### ..", "so x is ..", or nothing but the value.

Every scan is over a bounded window and moves forward only, so that time is linear in the text whatever it holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

MAX_WINDOW_CHARS = 20_000
MAX_VALUE_CHARS = 4_000
MAX_MARKERS = 64
MAX_BARE_WORDS = 30
MAX_VALUE_WORDS = 24
MAX_LAYERS = 16

_SKIP = re.compile(r"[\s*_#:：>]*")
_IS = r"\s+(?:is|are|was|be|equals|becomes|(?:would|should|must|will)\s+be)"
_COPULA = (
    rf"(?:{_IS}(?:\s+(?:thus|therefore|then|simply|exactly|given\s+by|equal\s+to))?\b\s*[:：]?"
    r"|\*{0,2}\s*[:：=]|\s*\*\*)"
)
_TO = r"(?:\s+(?:to|of|for)\s+(?:the|this|our)\s+(?:\w+\s+)?(?:problem|question|exercise|equation|inequality|system))?"
_MARKERS = re.compile(
    rf"(?P<final>\bfinal\s+(?:answer|result){_TO}(?:{_COPULA}|\s*\n|\s*(?=\$|\\[(\[]))"
    rf"|(?:最终|最后)(?:的)?(?:答案|结果)(?:\s*[:：]|应该是|应该为|应为|是|为)*"
    r"|^[ \t]{0,8}\#{4}(?!\#)|<\|answer\|>)"
    rf"|(?P<plain>\banswers?{_TO}(?:{_COPULA}|\s*(?=\$|\\[(\[]))"
    r"|^[ \t]{0,8}(?:\*\*)?A\s*:(?:\*\*)?|^[#*][ #*]{0,8}answers?[ \t*:]{0,8}\n"
    rf"|\b(?:correct|right|best)\s+(?:option|choice|statement)s?{_COPULA}"
    rf"|\bsolutions?(?:\s+set)?{_TO}(?:\s+(?:is|are)\s*[:：]?(?=\s*(?:\$|\\[(\[]|[-+]?[0-9])))"
    r"|(?:正确)?(?:答案|选项)(?:\s*[:：]|应该是|应该为|应为|应是|是|为)+|(?:故|应|因此|所以)?(?:选择|选)(?:\s*[:：]|是|为)?(?=\s*[(（$\\]*[A-Z]))"
    r"|(?P<reverse>\bis\s+(?:therefore\s+|thus\s+)?(?:the|our|my)\s+(?:final\s+|correct\s+|required\s+|desired\s+)?(?:answer|solution)\b(?!\s+(?:to|of|for)\s+\w+\s*=))",
    re.IGNORECASE | re.MULTILINE,
)
# What can open, close or end a value; the order matters, since `\$` must not be read as `$`.
_TOKENS = re.compile(r"\\\\|\\[()\[\]]|\\.|\$\$|\$|[{}]|\n|\.+(?=\s|\*|$)|[。！]", re.DOTALL)
_NEGATIONS = re.compile(
    r"\s*\((?=since\b|because\b|as\b)|[,，]?\s+(?:not|which|rather\s+than|instead\s+of|because|since|as\s+(?:required|desired|shown|expected))\b|，(?:而)?不是|，因为"
)
_HEDGE = re.compile(
    r"(?:approximately|about|roughly|exactly|simply|just|equal\s+to|大约|约)\s*(?:为|是)?\s*(?=\S)", re.IGNORECASE
)
EMPTY_BOX = re.compile(r"\\boxed\s*\{[\s.]*\}")
_NO_VALUE = re.compile(
    r"(?:not|correct|incorrect|wrong|right|in|that|based|given|obtained|found|reasonable|unique|unclear|unknown|still|also|now|"
    r"there|here|indeed|always|what|which|whether|how|as|to|of|by|with|from|expected|required|asked|going|supposed|i|we|you)\b"
    r"(?!\s*[=<>+*/^-])",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"\W*(?:(?:and|so|then)\W+)?(?:(?:therefore|thus|hence|so|consequently|in\s+conclusion|finally|as\s+a\s+result)\b|∴|因此|所以|故|综上(?:所述)?|于是|从而)",
    re.IGNORECASE,
)
_OPENING = re.compile(r"(?<=\s)(?:Therefore|Thus|Hence|So),?\s")
_LINK = re.compile(
    r"\b(?:is|are|was|equals|equal\s+to|becomes|gives|comes\s+(?:out\s+)?to|amounts\s+to|totals)\b(?:\s+(?:exactly|simply|therefore|thus|then)\b)?\s*[:：]?"
    r"|(?:至少|至多|应该)?(?:是|为|等于)|[一总]?共有|[:：](?=\s)"
)
_VALUE = re.compile(r"\s*(?:\*\*|__)?\s*(?:\$|\\[(\[a-zA-Z]|[-+−]?\s*(?:[$€£¥]\s*)?[0-9.(\[{√π∞])")
_EQUATION = re.compile(r"[A-Za-z](?:_\w|_\{\w{1,8}\})?(?:\([A-Za-z]\))?\s*(?:[=<>≤≥≠∈]|\\(?:leq?|geq?|neq?|in)\b)")
_FORMULA = re.compile(r"\$[^$]{1,2000}\$|\\\([^()]{1,2000}\\\)")
_DENIAL = re.compile(
    r"\b(?:not|no|never|nor|cannot|unless|except|if|impossible|false|wrong)\b|n't\b|不|非", re.IGNORECASE
)
_INLINE_BREAK = re.compile(r"(?:(?<![\$\\])\$(?!\$)|\\\()[ \t]{0,8}\n")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?\s?(?:\\[dt]?frac\s?\{\d{1,40}\}\s?\{\d{1,40}\}|\d{1,3}(?:,\d{3})+(?:\.\d{1,60})?|\d{1,80}(?:\.\d{1,60})?(?:\s?/\s?\d{1,60})?|\.\d{1,60})"
    r"(?:\s?\\?%)?(?!\w)"
)


@dataclass(frozen=True)
class Statement:
    """A value stated in prose: its text, where the statement starts, and by which kind of phrase."""

    text: str
    start: int
    kind: str


def last_statement(text: str, start: int = 0) -> Statement | None:
    """The last phrase of `text` from `start` on that states an answer, or None.

    Only the last `MAX_WINDOW_CHARS` are searched.
    """
    offset = max(0, len(text) - MAX_WINDOW_CHARS)
    window = text[offset:]
    markers = list(_MARKERS.finditer(window, max(0, start - offset)))[-MAX_MARKERS:]
    for marker in reversed(markers):
        kind = marker.lastgroup or "plain"
        if kind == "reverse":
            value = _value_before(window, marker.start())
        else:
            value = reduce_prose(_value_after(window, marker.end()))
        if value and is_value(value):
            return Statement(value, offset + marker.start(), kind)
    return None


def is_value(text: str) -> bool:
    """Whether `text` can be an answer: not blank, not the start of a clause ("correct because .."), not an essay."""
    return (
        bool(EMPTY_BOX.sub("", text).strip(" .,:;*$"))
        and not _NO_VALUE.match(text)
        and num_words(text) <= MAX_VALUE_WORDS
    )


def num_words(text: str) -> int:
    """Words of three letters or more that are no LaTeX commands."""
    return sum(1 for _ in _WORD.finditer(text))


def first_value_end(text: str, start: int) -> int:
    """Where the sentence that begins at `start` ends: a full stop or line end outside formulas and braces."""
    depth = 0
    opener = ""
    for token in _TOKENS.finditer(text, start, min(len(text), start + MAX_VALUE_CHARS)):
        mark = token.group()
        if opener and not (opener == "$" and mark == "\n"):
            opener = "" if mark == opener else opener
        elif mark in ("$", "$$"):
            opener = mark
        elif mark in (r"\(", r"\["):
            opener = r"\)" if mark == r"\(" else r"\]"
        elif mark == "{":
            depth += 1
        elif mark == "}":
            depth = max(0, depth - 1)
        elif mark == "\n" and not depth and not text.startswith(r"\begin", start):
            return token.start()
        elif mark[0] in ".。！" and not depth:
            return token.start()
    return min(len(text), start + MAX_VALUE_CHARS)


def _value_after(text: str, start: int) -> str:
    skipped = _SKIP.match(text, start)
    start = skipped.end() if skipped else start
    value = text[start : first_value_end(text, start)]
    if inline_breaks(value):
        return ""
    if hedge := _HEDGE.match(value):
        value = value[hedge.end() :]
    cut = _NEGATIONS.search(value)
    return clean(value[: cut.start()] if cut and cut.start() else value)


def _value_before(text: str, end: int) -> str:
    """What stands before ".. is the answer" in its sentence, without its opening word ("Therefore", "so")."""
    *_, sentence = sentences(text[max(0, end - MAX_VALUE_CHARS) : end]) or [""]
    value = clean(without_conclusion(sentence))
    return value if _VALUE.match(value) or num_words(value) == 0 else ""


def inline_breaks(text: str) -> bool:
    r"""Whether an inline formula opens with a line break: inline formulas stand on one line."""
    return _INLINE_BREAK.search(text) is not None


def sentences(text: str) -> list[str]:
    """The sentences and lines of `text`; formulas and braces are not cut."""
    found: list[str] = []
    position = 0
    while position < len(text):
        end = first_value_end(text, position)
        if piece := text[position:end].strip():
            found.append(piece)
        position = max(end + 1, position + 1)
        while position < len(text) and text[position] in ".。！\n":
            position += 1
    return found


def concluding_value(text: str) -> str | None:
    """The value that the last sentence ends with, if that sentence draws a conclusion ("So .. is 5") or is the only one."""
    all_sentences = sentences(text[-MAX_WINDOW_CHARS:])
    if not all_sentences:
        return None
    last = all_sentences[-1]
    for opening in reversed(list(_OPENING.finditer(last))[-4:]):
        if not _inside_formula(last, opening.start()):
            last = last[opening.start() :]
            break
    body = without_conclusion(last)
    if body == last and len(all_sentences) > 1:
        return None
    reduced = reduce_prose(clean(body))
    if not is_value(reduced):
        return None
    if reduced != clean(body) or ((_VALUE.match(body) or _EQUATION.match(body)) and num_words(reduced) <= 2):
        return reduced
    return None


def without_conclusion(sentence: str) -> str:
    """`sentence` without the word that draws a conclusion at its start ("Therefore, ")."""
    conclusion = _CONCLUSION.match(sentence)
    return sentence[conclusion.end() :].lstrip(" ,，:：") if conclusion else sentence


def reduce_prose(sentence: str) -> str:
    """`sentence` without the words before its one value: "the volume of $P$ is $12$" -> "$12$"; else as it stands."""
    sentence = sentence[:MAX_VALUE_CHARS]
    links = [link for link in islice(_LINK.finditer(sentence), 32) if not _inside_formula(sentence, link.start())]
    for link in reversed(links[-4:]):
        rest = sentence[link.end() :].strip()
        if cut := _NEGATIONS.search(rest):
            rest = rest[: cut.start()]
        if _VALUE.match(rest) and num_words(rest) <= 4:
            return clean(rest) if len(links) == 1 or _only_one_value(sentence, link.start()) else sentence
    return _only_formula(sentence) or sentence


def _only_formula(sentence: str) -> str | None:
    """The one formula of a sentence in words that it ends with, a unit after it included: "has length $3$ cm"."""
    formulas = _FORMULA.findall(sentence)
    if len(formulas) != 1 or _DENIAL.search(sentence):
        return None
    before, _, after = sentence.partition(formulas[0])
    if num_words(before) < 2 or num_words(after) > 1 or len(after) > 20:
        return None
    return clean(formulas[0] + after)


def _only_one_value(sentence: str, end: int) -> bool:
    """Whether nothing before `end` could be another part of the answer."""
    return all(not _VALUE.match(sentence[link.end() :]) for link in _LINK.finditer(sentence, 0, end))


def _inside_formula(text: str, position: int) -> bool:
    before = text[:position]
    return (
        before.count("$") % 2 == 1 or before.count(r"\(") > before.count(r"\)") or before.count("{") > before.count("}")
    )


_WRAPPERS = (
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("```", "```"), ("`", "`"), ('"', '"'), ("“", "”")
)  # fmt: skip


def clean(text: str) -> str:
    """`text` without surrounding white space, end punctuation, emphasis, and formula delimiters around all of it."""
    for _ in range(MAX_LAYERS):
        before = text
        text = text.strip().rstrip(",;，；。、")
        if text[-1:] == "." and text[-2:-1] not in (".", "\\"):
            text = text[:-1]
        for start, end in _WRAPPERS:
            inner = text[len(start) : -len(end)]
            if (
                len(text) > len(start) + len(end)
                and text.startswith(start)
                and text.endswith(end)
                and start not in inner
            ):
                text = inner if not text.endswith("\\" + end) else text
                break
        if text.startswith("**") and text.count("**") == 1:
            text = text[2:]
        elif text.endswith("**") and text.count("**") == 1:
            text = text[:-2]
        if text == before:
            break
    return text


def last_number(text: str) -> str | None:
    """The last number of the last `MAX_WINDOW_CHARS` characters, as written."""
    *_, last = _numbers(text[-MAX_WINDOW_CHARS:])
    return last


def _numbers(text: str) -> Iterator[str | None]:
    yield None
    for match in _NUMBER.finditer(text):
        yield match.group().strip()
