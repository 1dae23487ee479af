"""`exact`: the stated answer is the gold text, character by character after the normalisation that the options name."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from verifiers.extract import after_thinking, stated_answer
from verifiers.registry import register
from verifiers.verdict import GoldAudit, TaskLike, Verdict


@register("exact")
@dataclass(frozen=True)
class Exact:
    """1 if the answer equals the gold, or one of several golds in a list, else 0.

    `whole` compares everything after the thinking instead of the stated answer. Normalisation, the same on both sides:
    `unicode` (NFKC, so that full-width letters are plain ones), `spaces` (runs of white space are one space, none at
    the ends), `ignore_case`, `ignore_punctuation`.
    """

    whole: bool = False
    unicode: bool = True
    spaces: bool = True
    ignore_case: bool = False
    ignore_punctuation: bool = False

    def __post_init__(self) -> None:
        for option in fields(self):
            if not isinstance(getattr(self, option.name), bool):
                raise ValueError(f"{option.name} is {getattr(self, option.name)!r}; it must be true or false")

    def prepare(self, task: TaskLike) -> GoldAudit:
        """Whether there is a gold text to compare with."""
        golds = _golds(task.answer)
        if golds is None:
            return GoldAudit(status="unparsable", reason=f"it is of type {type(task.answer).__name__}, not text")
        normal = [self.normalise(gold) for gold in golds]
        if not any(normal):
            return GoldAudit(status="missing", reason="the gold answer is empty")
        return GoldAudit(status="ok", reason="it is text", parsed=normal[0])

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        """Judge one completion; `error` is a gold that is no text, `unparsable` a text that states no answer."""
        audit = self.prepare(task)
        if audit.status != "ok":
            return Verdict(score=0.0, status="error", reason=f"the gold answer is unusable: {audit.reason}")
        if self.whole:
            text, reason = after_thinking(completion), "there is nothing after the thinking"
        else:
            stated = stated_answer(completion)
            text, reason = stated.text, stated.reason
        if text is None or not text.strip():
            return Verdict(score=0.0, status="unparsable", reason=reason)
        extracted = text.strip()
        if self.normalise(text) in {self.normalise(gold) for gold in _golds(task.answer) or []}:
            return Verdict(score=1.0, status="correct", reason="it is the gold text", extracted=extracted)
        return Verdict(score=0.0, status="wrong", reason="it is not the gold text", extracted=extracted)

    def normalise(self, text: str) -> str:
        """`text` as it is compared."""
        if self.unicode:
            text = unicodedata.normalize("NFKC", text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
        return " ".join(text.split()) if self.spaces else text


def _golds(answer: Any) -> list[str] | None:
    """The accepted texts; numbers count as their text, None where `answer` is neither."""
    if answer is None:
        return []
    values = answer if isinstance(answer, Sequence) and not isinstance(answer, str) else [answer]
    if all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in values):
        return [str(value) for value in values]
    return None
