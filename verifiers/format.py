"""`format`: the completion is exactly one thinking block followed by exactly one answer block."""

from __future__ import annotations

from dataclasses import dataclass

from verifiers.registry import register
from verifiers.verdict import TaskLike, Verdict

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@register("format")
@dataclass(frozen=True)
class Format:
    """1 if the completion is `<think>..</think> <answer>..</answer>` (DeepSeek-R1, section 2.2), else 0.

    Each tag occurs exactly once, so that none is nested; both blocks are non-empty, and only white space stands around
    them. With `think_in_prompt` the opening `<think>` stands at the end of the prompt, and must not come again.
    """

    think_in_prompt: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.think_in_prompt, bool):
            raise ValueError(f"think_in_prompt is {self.think_in_prompt!r}; it must be true or false")

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        del task
        fault = _fault(f"<think>{completion}" if self.think_in_prompt else completion)
        if fault is None:
            return Verdict(score=1.0, status="correct", reason="one thinking block, then one answer block")
        return Verdict(score=0.0, status="wrong", reason=fault)


think_answer_format = Format()


def _fault(completion: str) -> str | None:
    """What breaks the form, or None."""
    for tag in TAGS:
        if (count := completion.count(tag)) != 1:
            return f"{tag} occurs {count} times, not once"
    positions = [completion.index(tag) for tag in TAGS]
    if positions != sorted(positions):
        return "the tags are out of order"
    before, thinking, between, answer, after = _pieces(completion, positions)
    for place, text in (("before <think>", before), ("between the blocks", between), ("after </answer>", after)):
        if text.strip():
            return f"there is text {place}"
    for block, text in (("thinking", thinking), ("answer", answer)):
        if not text.strip():
            return f"the {block} is empty"
    return None


def _pieces(completion: str, positions: list[int]) -> list[str]:
    starts = [0] + [position + len(tag) for position, tag in zip(positions, TAGS, strict=True)]
    return [completion[start:end] for start, end in zip(starts, [*positions, len(completion)], strict=True)]
