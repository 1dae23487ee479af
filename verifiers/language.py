"""`language`: the reasoning is in one language (the language consistency reward of DeepSeek-R1, section 2.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from verifiers.calling import broken
from verifiers.registry import nearest, register
from verifiers.verdict import GoldAudit, TaskLike, Verdict
from verifiers.writing import count_words, prose


def _codes(codes: str, *scripts: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(codes.split(), scripts)


_LATIN = "en de fr es pt it nl sv da no fi pl cs sk sl hr hu ro tr vi id ms sw et lv lt ca eu gl is"
SCRIPTS: Mapping[str, tuple[str, ...]] = {
    **_codes(_LATIN, "latin"),
    **_codes("ru uk be bg sr mk kk mn", "cyrillic"),
    **_codes("ar fa ur", "arabic"),
    **_codes("hi mr ne", "devanagari"),
    "zh": ("han",),
    "ja": ("han", "kana"),
    "ko": ("hangul",),
    "el": ("greek",),
    "he": ("hebrew",),
    "hy": ("armenian",),
    "ka": ("georgian",),
    "bn": ("bengali",),
    "pa": ("gurmukhi",),
    "gu": ("gujarati",),
    "ta": ("tamil",),
    "te": ("telugu",),
    "kn": ("kannada",),
    "ml": ("malayalam",),
    "am": ("ethiopic",),
    "th": ("thai",),
    "lo": ("lao",),
    "km": ("khmer",),
    "my": ("burmese",),
}
_JAPANESE_KANA_SHARE = 0.1


@register("language")
@dataclass(frozen=True)
class Language:
    """The share of words written in the target language's script; `correct` from `threshold` on.

    `language` is a code such as "en" or "zh"; without it, the script that most of the prompt is in is the target. `part`
    "thinking" looks at what comes before the last `</think>` (all, if there is none), "all" at the whole completion.
    Code, formulas, tags and single letters don't count; of Han and kana every character is a word. Languages that share
    a script (English and French) can't be told apart. `unparsable` is a text without words, with score 0.
    """

    language: str | None = None
    threshold: float = 0.9
    part: Literal["thinking", "all"] = "thinking"

    def __post_init__(self) -> None:
        if self.language is not None and self.language not in SCRIPTS:
            known = ", ".join(sorted(SCRIPTS))
            raise ValueError(f"language {self.language!r} is unknown{nearest(self.language, SCRIPTS)}; known: {known}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must be above 0 and at most 1")
        if self.part not in ("thinking", "all"):
            raise ValueError(f"part is {self.part!r}; it must be 'thinking' or 'all'")

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        target = self._target(task)
        if target is None:
            return broken("the prompt has no words to tell its language from: set the option language")
        thinking, tag, _ = completion.rpartition("</think>")
        counts = count_words(prose(thinking if tag and self.part == "thinking" else completion))
        total = counts.total()
        if total == 0:
            return Verdict(score=0.0, status="unparsable", reason="there are no words")
        share = sum(counts[script] for script in target) / total
        others = ", ".join(f"{count} {script}" for script, count in counts.most_common() if script not in target)
        reason = f"{share:.0%} of {total} words are {' or '.join(target)}" + (f"; {others}" if others else "")
        return Verdict(score=share, status="correct" if share >= self.threshold else "wrong", reason=reason)

    def prepare(self, task: TaskLike) -> GoldAudit | None:
        """`missing` for a task whose language can't be told."""
        target = self._target(task)
        if target is None:
            return GoldAudit(status="missing", reason="the prompt has no words to tell its language from")
        return None

    def _target(self, task: TaskLike) -> tuple[str, ...] | None:
        if self.language is not None:
            return SCRIPTS[self.language]
        counts = count_words(prose(_text_of(task.prompt)))
        if not counts:
            return None
        if counts["kana"] >= _JAPANESE_KANA_SHARE * (counts["han"] + counts["kana"]) > 0 and (
            counts["han"] + counts["kana"] >= max(counts.values())
        ):
            return SCRIPTS["ja"]
        return (counts.most_common(1)[0][0],)


def _text_of(prompt: Any) -> str:
    """A prompt's text; of chat messages that of the last one by the user."""
    if isinstance(prompt, str):
        return prompt
    try:
        texts = [message["content"] for message in prompt if message["role"] == "user"]
    except (TypeError, KeyError):
        return ""
    return texts[-1] if texts and isinstance(texts[-1], str) else ""
