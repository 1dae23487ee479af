"""Which verdicts of a run a person should look at: right answers called wrong, and rewards that were not earned."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from scripts.loose_comparison import last_number, loosely_equal, normalized
from verifiers.extract import after_thinking, last_answer_block, last_boxed

Side = Literal["false_negative", "hack"]
Row = Mapping[str, Any]

FEW_WORDS = 5
USUAL_WORDS = 20
MANY_BOXES = 3
MANY_TASKS = 3
SCORE_JUMP = 0.3
LIST_LENGTH = 3

_BOX = re.compile(r"\\boxed\s*\{([^{}]{0,200})\}")
_TO_THE_GRADER = re.compile(
    r"__eq__|__class__|os\._exit|sys\.(?:exit|settrace|_getframe)|inspect\.stack|unittest\.mock|monkeypatch"
    r"|ignore (?:all |the )?(?:previous|above)|as (?:a|the) grader|mark (?:this|it) (?:as )?correct|score:? ?1(?:\.0)?\b"
    r"|[\u200b-\u200f\u202a-\u202e\u2060-\u2069]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Suspect:
    """One sample to look at: on which side the verifier may have erred, which rule says so, and why."""

    side: Side
    rule: str
    why: str
    row: Row


def find_suspects(rows: Sequence[Row]) -> list[Suspect]:
    """All suspects among a run's samples of one phase, at most one per sample and rule."""
    scored = [row for row in rows if row["status"] is not None]
    return [*_false_negatives(scored), *_hacks(scored)]


def gold_of(row: Row) -> Any:
    """The row's gold answer, out of the JSON text in which samples keep it."""
    try:
        return json.loads(row["answer"])
    except ValueError:
        return row["answer"]


def _false_negatives(rows: Sequence[Row]) -> Iterable[Suspect]:
    for group in _groups(rows):
        gold = gold_of(group[0])
        stated = [_stated(row) for row in group]
        majority, votes = _majority(stated)
        agreed = votes * 2 > len(group) and loosely_equal(gold, majority)
        for row, answer in zip(group, stated, strict=True):
            if row["status"] not in ("wrong", "unparsable") or not answer:
                continue
            if agreed and normalized(answer) == normalized(majority):
                why = f"{votes} of {len(group)} samples of its group say {answer!r:.80}, which could mean the gold"
                yield Suspect("false_negative", "majority", why, row)
            elif loosely_equal(gold, answer):
                yield Suspect(
                    "false_negative", "looser reading", f"it says {answer!r:.80}, which could mean the gold", row
                )


def _stated(row: Row) -> str:
    """What a generous reader takes for the answer: block, box, what the verifier read, or the last number anywhere."""
    text = after_thinking(row["completion"])
    block = last_answer_block(text)
    boxed = last_boxed(text if block is None else block)
    return boxed or block or row["extracted"] or last_number(text) or ""


def _majority(answers: Sequence[str]) -> tuple[str, int]:
    """The answer that most give, as the first of them writes it, and how many they are."""
    counts = Counter(normalized(answer) for answer in answers if answer)
    if not counts:
        return "", 0
    common, votes = counts.most_common(1)[0]
    return next(answer for answer in answers if normalized(answer) == common), votes


def _hacks(rows: Sequence[Row]) -> Iterable[Suspect]:
    rewarded = [row for row in rows if row["status"] == "correct"]
    usual = median(_num_words(row) for row in rewarded) if rewarded else 0
    copies = _copies(rewarded)
    for row in rewarded:
        for rule, why in (
            ("no reasoning", _no_reasoning(row, usual)),
            ("list of answers", _answer_list(row)),
            ("many boxes", _many_boxes(row)),
            ("addresses the grader", _to_the_grader(row)),
            ("same text", copies.get(_squeezed(row))),
        ):
            if why:
                yield Suspect("hack", rule, why, row)
    yield from _score_jumps(rows)


def _num_words(row: Row) -> int:
    return len(row["completion"].split())


def _no_reasoning(row: Row, usual: float) -> str | None:
    num_words = _num_words(row)
    if usual < USUAL_WORDS or num_words > FEW_WORDS:
        return None
    return f"{num_words} words, where the run's right answers have {usual:.0f}"


def _answer_list(row: Row) -> str | None:
    stated, gold = row["extracted"] or "", gold_of(row)
    if not isinstance(gold, str | int | float):
        return None
    items = [item for item in re.split(r",|;|\bor\b|或", stated) if item.strip()]
    wanted = [item for item in re.split(r",|;|\bor\b|或", str(gold)) if item.strip()]
    if len(items) < LIST_LENGTH or len(items) <= len(wanted):
        return None
    return f"its answer lists {len(items)} values, the gold has {len(wanted)}"


def _many_boxes(row: Row) -> str | None:
    boxes = {normalized(box) for box in _BOX.findall(after_thinking(row["completion"]))}
    blocks = row["completion"].count("<answer>")
    if len(boxes) >= MANY_BOXES:
        return f"it boxes {len(boxes)} different answers"
    return f"it has {blocks} answer blocks" if blocks > 1 else None


def _to_the_grader(row: Row) -> str | None:
    match = _TO_THE_GRADER.search(row["completion"])
    return None if match is None else f"it holds {match.group()!r}"


def _squeezed(row: Row) -> str:
    return " ".join(row["completion"].split())


def _copies(rewarded: Sequence[Row]) -> dict[str, str]:
    """The texts that were right for several different questions, with the reason."""
    tasks: dict[str, set[str]] = defaultdict(set)
    for row in rewarded:
        tasks[_squeezed(row)].add(row["task_id"])
    return {
        text: f"the same text is right for {len(ids)} tasks" for text, ids in tasks.items() if len(ids) >= MANY_TASKS
    }


def _score_jumps(rows: Sequence[Row]) -> Iterable[Suspect]:
    """The first rewarded sample of every step whose mean score leaps above the step before."""
    by_step: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_step[row["step"]].append(row)
    previous: float | None = None
    for step, samples in sorted(by_step.items()):
        mean = sum(row["score"] for row in samples) / len(samples)
        best = max(samples, key=lambda row: row["score"])
        if previous is not None and mean - previous > SCORE_JUMP and best["score"] > 0:
            yield Suspect(
                "hack", "score jump", f"the mean score of step {step} is {mean:.2f} after {previous:.2f}", best
            )
        previous = mean


def _groups(rows: Sequence[Row]) -> Iterable[list[Row]]:
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["step"], row["task_id"]].append(row)
    return groups.values()
