r"""`choice`: the stated answer is the right option of a multiple-choice question, by its letter or by its text."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from verifiers.extract import BoxPolicy, stated_answer
from verifiers.registry import register
from verifiers.verdict import GoldAudit, TaskLike, Verdict

MAX_STATED_CHARS = 2_000
MAX_BARE_CHARS = 200
MAX_OPTIONS = 26
OPTION_KEYS = ("options", "choices")

_STYLE = re.compile(
    r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathsf|operatorname)\s*\{([^{}]*)\}|\*\*|\$|\\[()]|\\ |~"
)
_LEAD = re.compile(
    r"(?:the\s+)?(?:(?:correct|right|final)\s+)?(?:option|choice|answer|选项|选择|选|答案)s?\s*(?:is|are|是|为)?\s*[:：]?\s*",
    re.IGNORECASE,
)
_LETTER_THEN_TEXT = re.compile(
    r"(?:[(\[]\s*([A-Za-z])\s*[)\]]\s*[.:,]?|([A-Z])\s*[).:、．](?!\w*[)\]]))\s*(.*)", re.DOTALL
)
_LETTERS = re.compile(
    r"[(\[]?\s*[A-Za-z]\s*[)\]]?(?:\s*(?:,|、|;|and|or|和|或|&|与)\s*[(\[]?\s*[A-Za-z]\s*[)\]]?){0,25}\.?"
)
_LETTER_RUN = re.compile(r"[A-Z]{2,26}")
_IS_CORRECT = re.compile(
    r"(?:\b(?:option|choice|answer|statement)s?\s+|选项\s*)[(\[]?([A-Z])[)\]]?\s*(?:is|是|为)?\s*(?:therefore\s+|thus\s+)?(?:the\s+)?(?:correct|right|true|正确)"
)
_PREFIX = re.compile(r"\s*[(\[]?([A-Z])[)\].:、．]\s*(?=\S)")


class _UnreadableError(ValueError):
    """No option can be read; the message says why."""


@register("choice")
@dataclass(frozen=True)
class Choice:
    """1 if the stated option is the gold option, else 0.

    The gold is a letter ("B", "(B)"), several ("AC": all of them, in any order), or the text of an option. The options
    of a task stand in its metadata under `options` or `choices`, as a list or {letter: text}; without them there are
    `num_options` letters from A. An option is stated as "B", "(B)", "B. text", "option B", "选B" or by its text;
    a word is never a letter, so the article "A" in "A train" states nothing.
    """

    num_options: int = 5
    boxes: BoxPolicy = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.num_options, int) or not 2 <= self.num_options <= MAX_OPTIONS:
            raise ValueError(f"num_options is {self.num_options!r}; it must be a whole number from 2 to {MAX_OPTIONS}")
        if self.boxes not in get_args(BoxPolicy):
            raise ValueError(f"boxes is {self.boxes!r}; it must be one of {', '.join(get_args(BoxPolicy))}")

    def prepare(self, task: TaskLike) -> GoldAudit:
        """Whether the gold names an option."""
        if task.answer is None or not str(task.answer).strip():
            return GoldAudit(status="missing", reason="the gold answer is empty")
        try:
            letters = self._gold(task)
        except _UnreadableError as exc:
            return GoldAudit(status="unparsable", reason=str(exc))
        return GoldAudit(status="ok", reason="it names an option", parsed="".join(sorted(letters)))

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        """Judge one completion; `error` is a gold that names no option, `unparsable` a text that states none."""
        try:
            gold = self._gold(task)
            options = self._options(task)
        except _UnreadableError as exc:
            return Verdict(score=0.0, status="error", reason=f"the gold answer is unusable: {exc}")
        text, reason = self._stated(completion)
        if text is None:
            return Verdict(score=0.0, status="unparsable", reason=reason)
        shown = text[:80]
        try:
            letters = read_letters(text, options)
        except _UnreadableError as exc:
            return Verdict(score=0.0, status="unparsable", reason=str(exc), extracted=shown)
        stated, expected = "".join(sorted(letters)), "".join(sorted(gold))
        if letters == gold:
            return Verdict(score=1.0, status="correct", reason=f"{stated} is the gold option", extracted=shown)
        reason = f"{stated} is not the gold option {expected}"
        return Verdict(score=0.0, status="wrong", reason=reason, extracted=shown)

    def _stated(self, completion: str) -> tuple[str | None, str]:
        text = completion.rpartition("</think>")[2].strip()
        if len(text) <= MAX_BARE_CHARS and "\n" not in text and _LETTER_THEN_TEXT.fullmatch(_plain(text)):
            return text, "the whole text is an option"
        stated = stated_answer(completion, boxes=self.boxes)
        if stated.source in ("none", "conclusion", "bare"):
            *_, last = ["", *_IS_CORRECT.findall(text[-MAX_STATED_CHARS:])]
            if last:
                return last, "said to be correct"
        return stated.text, stated.reason

    def _options(self, task: TaskLike) -> dict[str, str]:
        """{letter: text} of the task, or the first `num_options` letters with empty texts."""
        for key in OPTION_KEYS:
            if (found := (task.metadata or {}).get(key)) is not None:
                return _read_options(found)
        return dict.fromkeys(string.ascii_uppercase[: self.num_options], "")

    def _gold(self, task: TaskLike) -> frozenset[str]:
        if not isinstance(task.answer, str):
            raise _UnreadableError(f"it is of type {type(task.answer).__name__}, not text")
        return read_letters(task.answer, self._options(task))


def _read_options(found: Any) -> dict[str, str]:
    if (
        isinstance(found, Mapping)
        and isinstance(found.get("text"), Sequence)
        and isinstance(found.get("label"), Sequence)
    ):
        found = dict(zip(found["label"], found["text"], strict=False))
    if isinstance(found, Mapping):
        options = {str(letter).strip().upper(): str(text) for letter, text in found.items()}
    elif isinstance(found, Sequence) and not isinstance(found, str):
        texts = [str(text) for text in found][:MAX_OPTIONS]
        options = dict(zip(string.ascii_uppercase, texts, strict=False))
    else:
        raise _UnreadableError(f"the task's options are a {type(found).__name__}, not a list or {{letter: text}}")
    for letter, text in options.items():
        if (prefix := _PREFIX.match(text)) and prefix[1] == letter:
            options[letter] = text[prefix.end() :]
    return options


def read_letters(text: str, options: Mapping[str, str]) -> frozenset[str]:
    """The letters that a stated answer names; raises `_UnreadableError` where it names no option."""
    plain = _plain(text)
    by_text = [letter for letter, option in options.items() if option and _folded(option) == _folded(plain)]
    body = plain[lead.end() :].strip() if (lead := _LEAD.match(plain)) else plain
    if _LETTERS.fullmatch(body) and not (len(body) == 1 and by_text and body.upper() not in options):
        return _known(re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", body), options)
    if (letter := _LETTER_THEN_TEXT.fullmatch(body)) is not None:
        return _letter_with_text((letter[1] or letter[2]).upper(), letter[3], options)
    if _LETTER_RUN.fullmatch(body) and set(body) <= options.keys() and len(set(body)) == len(body):
        return frozenset(body)
    if len(by_text) == 1:
        return frozenset(by_text)
    raise _UnreadableError(f"{text[:60]!r} names {'more than one' if by_text else 'no'} option")


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text[:MAX_STATED_CHARS])
    for _ in range(4):
        text, count = _STYLE.subn(lambda match: match[1] or "", text)
        if not count:
            break
    return text.strip().strip("{}").strip().removesuffix(".").strip()


def _folded(text: str) -> str:
    return " ".join(_plain(text).split()).casefold()


def _known(letters: Sequence[str], options: Mapping[str, str]) -> frozenset[str]:
    found = frozenset(letter.upper() for letter in letters)
    if not found or not found <= options.keys():
        raise _UnreadableError(f"{', '.join(sorted(found))} is not among the options {', '.join(options)}"[:200])
    return found


def _letter_with_text(letter: str, text: str, options: Mapping[str, str]) -> frozenset[str]:
    """The letter of "B. text", unless the text is another option's, so that the two contradict each other."""
    others = {_folded(option) for other, option in options.items() if other != letter and option}
    if text.strip() and _folded(text) in others:
        raise _UnreadableError(f"option {letter} is stated with the text of another option")
    return _known([letter], options)
