"""The completions of the report: the same held-out tasks before and after, chosen by a rule and not by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.sample_table import MERGED, PARTS, read_samples

NUM_TASKS_SHOWN = 5
_MAX_TEXT_CHARS = 6000
_LEAST_PROMPTS = 12


def compare_completions(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """Held-out tasks with a completion before and after, chosen by a rule that also shows what did not improve.

    With them comes the text around the problem that all held-out prompts share ("" when there are too few to tell).
    """
    if not (run_dir / MERGED).exists() and not (run_dir / PARTS).is_dir():
        return [], ""
    before, after = _by_task(read_samples(run_dir, "eval_before")), _by_task(read_samples(run_dir, "eval_after"))
    shared = [task_id for task_id in before if task_id in after] or list(before) or list(after)
    gains = {task: _share_right(after.get(task, ())) - _share_right(before.get(task, ())) for task in shared}
    ordered = sorted(shared, key=lambda task: -gains[task])
    count = min(NUM_TASKS_SHOWN, len(ordered))
    places = [round(index * (len(ordered) - 1) / max(count - 1, 1)) for index in range(count)]
    start, end = _template([rows[0]["prompt"] for rows in (before or after).values()])
    shown = [_comparison(ordered[place], before, after) for place in places]
    for task in shown:
        task["prompt"] = task["prompt"][len(start) : len(task["prompt"]) - len(end)]
    return shown, f"{start}…{end}" if start or end else ""


def _template(prompts: Sequence[str]) -> tuple[str, str]:
    """The text that all prompts begin and end with, in whole words; a few prompts would tell too little."""
    if len(set(prompts)) < _LEAST_PROMPTS:
        return "", ""
    start = _common_start(prompts)
    start = start[: max(start.rfind(" "), start.rfind("\n")) + 1]
    rests = [prompt[len(start) :] for prompt in prompts]
    end = _common_start([rest[::-1] for rest in rests])[::-1]
    cut = min((place for mark in " \n" if (place := end.find(mark)) >= 0), default=len(end))
    return start, end[cut:]


def _common_start(texts: Sequence[str]) -> str:
    """The longest text that all begin with: that of the two which differ most, the first and the last in order."""
    first, last = min(texts), max(texts)
    return first[: next((place for place, letter in enumerate(first) if letter != last[place]), len(first))]


def _comparison(task: str, before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]) -> dict[str, Any]:
    row = (before.get(task) or after[task])[0]
    sides = []
    for title, rows in (("Before", before.get(task, [])), ("After", after.get(task, []))):
        right = sum(sample["status"] == "correct" for sample in rows)
        sides.append({"title": title, "right": right, "count": len(rows), "sample": _shown(rows[0]) if rows else None})
    return {"task_id": task, "prompt": row["prompt"], "answer": _unquoted(row["answer"]), "sides": sides}


def _shown(sample: Mapping[str, Any]) -> dict[str, Any]:
    text = sample["completion"]
    cut = len(text) - _MAX_TEXT_CHARS
    shown = (
        text
        if cut <= 0
        else f"{text[: _MAX_TEXT_CHARS // 2]}\n[{cut:,} characters left out]\n{text[-_MAX_TEXT_CHARS // 2 :]}"
    )
    return dict(sample) | {"completion": shown}


def _by_task(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["sample_index"]):
        tasks.setdefault(row["task_id"], []).append(row)
    return tasks


def _share_right(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["status"] == "correct" for row in rows) / max(len(rows), 1)


def _unquoted(answer: str) -> str:
    value = json.loads(answer)
    return value if isinstance(value, str) else answer
