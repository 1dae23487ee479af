"""What can be told of a trace by itself: its form, how it ended, its language, its repetitions, its length."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from distill.dedup import question_of
from distill.filters.base import Drop, Filter, Table
from distill.trace import Trace
from rollout.errors import UserError
from verifiers.extract import stated_answer
from verifiers.language import Language
from verifiers.repetition import Repetition
from verifiers.task import PlainTask

_TIMES = re.compile(r"\d+ times")


class WellFormedConfig(Table):
    """One think block, closed, then an answer."""

    answer: Literal["any", "stated", "box", "tag"] = Field(
        default="any",
        description="how the answer is given after the thinking: any text; stated (a box, a tag or a phrase); one \\\\boxed{}; "
        "one <answer> block. Of the latter three a text with two different boxes is dropped",
    )


class WellFormed(Filter):
    """Keeps a trace of one closed think block and an answer after it, stated once in the form asked for."""

    name = "well_formed"

    def __init__(self, config: WellFormedConfig) -> None:
        self._config = config

    def fault(self, trace: Trace) -> Drop | None:
        """What breaks the form."""
        if trace.fault is not None:
            return Drop(_TIMES.sub("more than once", trace.fault.partition(": ")[0]), trace.fault)
        return None if self._config.answer == "any" else self._answer_fault(trace.answer_text)

    def _answer_fault(self, text: str) -> Drop | None:
        stated = stated_answer(text, boxes="single")
        wanted = {
            "box": ("box",),
            "tag": ("answer_tag",),
            "stated": ("box", "answer_tag", "statement", "bare", "conclusion"),
        }
        if stated.source not in wanted[self._config.answer]:
            return Drop("the answer is outside the template", stated.reason)
        if stated.text is None:
            return Drop("not one answer", stated.reason)
        if self._config.answer == "tag" and (text.count("<answer>") != 1 or text.count("</answer>") != 1):
            return Drop("not one answer", f"{text.count('<answer>')} <answer>, {text.count('</answer>')} </answer>")
        return None


class FinishedConfig(Table):
    """The answer came to its end by itself."""

    unknown: Literal["keep", "drop"] = Field(
        default="keep", description="traces whose source does not say how they ended"
    )


class Finished(Filter):
    """Keeps a trace that ended by itself."""

    name = "finished"

    def __init__(self, config: FinishedConfig) -> None:
        self._config = config

    def fault(self, trace: Trace) -> Drop | None:
        """Cut off at its longest length, ended by something else, or not known."""
        match trace.finish_reason:
            case "stop":
                return None
            case "length":
                return Drop("cut off at the longest length")
            case None:
                return Drop("how it ended is unknown") if self._config.unknown == "drop" else None
            case other:
                return Drop("ended by something else", other)


class LanguageConsistentConfig(Table):
    """The writing is in one language, as far as scripts tell (the verifier `language`)."""

    language: str | None = Field(default=None, description="code such as en or zh; by default that of the question")
    min_share: float = Field(default=0.9, gt=0, le=1, description="share of words in that language's script")
    part: Literal["thinking", "all"] = Field(default="thinking", description="the reasoning, or the answer as well")

    @model_validator(mode="after")
    def _known(self) -> LanguageConsistentConfig:
        Language(language=self.language)  # its own ValueError names the nearest
        return self


class LanguageConsistent(Filter):
    """Keeps a trace whose words are in one script; one without words, such as bare formulas, mixes no languages."""

    name = "language_consistent"

    def __init__(self, config: LanguageConsistentConfig) -> None:
        self._part = config.part
        self._language = Language(language=config.language, threshold=config.min_share, part="all")

    def fault(self, trace: Trace) -> Drop | None:
        """Mixed languages, or a question that does not tell which one is wanted."""
        text = trace.reasoning if self._part == "thinking" else f"{trace.reasoning}\n\n{trace.answer_text}"
        verdict = self._language(text, PlainTask(answer=None, prompt=question_of(trace)))
        if verdict.status == "error":
            return Drop("the question's language is unknown", "it has no words; set language_consistent.language")
        return Drop("mixed languages", verdict.reason) if verdict.status == "wrong" else None


class NoRepetitionConfig(Table):
    """The text does not turn in circles (the verifier `repetition`)."""

    ngram: int = Field(default=8, ge=1, description="words of one n-gram")
    max_share: float = Field(default=0.3, ge=0, lt=1, description="share of n-grams that repeat an earlier one")
    min_repeats: int = Field(default=4, ge=2, description="times that a text's end is said for it to be a loop")
    min_loop_words: int = Field(default=24, ge=1, description="words of such an end, all repeats together")


class NoRepetition(Filter):
    """Keeps a trace that neither ends in a loop nor repeats itself too much."""

    name = "no_repetition"

    def __init__(self, config: NoRepetitionConfig) -> None:
        self._repetition = Repetition(**config.model_dump())

    def fault(self, trace: Trace) -> Drop | None:
        """A loop at the end of the whole or of the reasoning (an answer may follow it), or too many repeats in the whole."""
        task = PlainTask(answer=None)
        whole = self._repetition(trace.completion, task)
        for verdict in (whole, self._repetition(trace.reasoning, task)):
            if verdict.score == -1:
                return Drop("ends in a loop", verdict.reason)
        return Drop("repeats itself", whole.reason) if whole.status == "wrong" else None


class LengthConfig(Table):
    """Bounds on the completion, in tokens."""

    min_tokens: int = Field(default=1, ge=0, description="fewest tokens of a completion")
    max_tokens: int = Field(default=32768, ge=1, description="most tokens of a completion (DeepSeek-R1: 32768)")

    @model_validator(mode="after")
    def _is_a_range(self) -> LengthConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class Length(Filter):
    """Keeps a trace of a length within the bounds, both included."""

    name = "length"

    def __init__(self, config: LengthConfig) -> None:
        self._config = config

    def admit(self, trace: Trace) -> None:
        """UserError for a trace of unknown length."""
        if trace.num_tokens is None:
            raise UserError(
                f"the filter length needs token counts, and {trace.source} has none for {trace.question_id!r}: set "
                "output.tokenizer, which counts them, or leave length out of select.order"
            )

    def fault(self, trace: Trace) -> Drop | None:
        """Too short or too long."""
        assert trace.num_tokens is not None  # admitted
        if trace.num_tokens < self._config.min_tokens:
            return Drop("too short", f"{trace.num_tokens} tokens")
        return Drop("too long", f"{trace.num_tokens} tokens") if trace.num_tokens > self._config.max_tokens else None
