"""The labelled sets that `bench_verifiers` runs: (gold, completion, expected verdict), read from a folder of data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import UserError

VERDICT_SETS = ("published", "issues", "adversarial")
SET_NAMES = (*VERDICT_SETS, "gsm8k", "qwen", "math_own", "math_shuffled")


class BenchDataError(UserError):
    """A set can't be read; the message names the file."""


@dataclass(frozen=True)
class Pair:
    """One labelled judgement: does `completion` answer what `answer` says?"""

    name: str
    answer: str
    completion: str
    expected: bool


def load_set(folder: Path, name: str) -> list[Pair]:
    """The pairs of the set `name` under `folder`; disputed rows are left out. Raises `BenchDataError`."""
    if name in VERDICT_SETS:
        return list(_verdicts(folder / "math_verdicts" / f"cases_{name}.jsonl"))
    if name == "gsm8k":
        return list(_gsm8k(folder / "gsm8k_model_solutions" / "labelled.jsonl"))
    if name == "qwen":
        return list(_qwen(folder / "qwen_math_cot_outputs" / "math_cot.jsonl"))
    if name in ("math_own", "math_shuffled"):
        return list(_math(folder / "math500" / "test.jsonl", shuffled=name == "math_shuffled"))
    raise BenchDataError(f"unknown set {name!r}; known: {', '.join(SET_NAMES)}")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise BenchDataError(f"{path} does not exist; give the folder that holds the data sets")
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield json.loads(line)
            except ValueError as exc:
                raise BenchDataError(f"{path}, line {number}: {exc}") from exc


def _verdicts(path: Path) -> Iterator[Pair]:
    for row in _rows(path):
        if not row["disputed"]:
            yield Pair(row["id"], row["answer"], row["completion"], row["expected"])


def _gsm8k(path: Path) -> Iterator[Pair]:
    for index, row in enumerate(_rows(path)):
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        for model, solution in row.items():
            if isinstance(solution, dict):
                yield Pair(f"{index}/{model}", gold, solution["solution"], solution["is_correct"])


def _qwen(path: Path) -> Iterator[Pair]:
    for row in _rows(path):
        for sample, (completion, correct) in enumerate(zip(row["code"], row["score"], strict=True)):
            yield Pair(f"{row['idx']}/{sample}", row["gt"], completion, bool(correct))


def _math(path: Path, shuffled: bool) -> Iterator[Pair]:
    """Each solution with its own answer; or with the answer after it of the same subject, unless it is the same text."""
    rows = list(_rows(path))
    if not shuffled:
        for row in rows:
            yield Pair(row["unique_id"], row["answer"], row["solution"], True)
        return
    rows.sort(key=lambda row: (row["subject"], row["unique_id"]))
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        if _letters(row["answer"]) != _letters(other["answer"]):
            yield Pair(row["unique_id"], other["answer"], row["solution"], False)


def _letters(text: str) -> str:
    """A crude form in which answers that look the same are the same; such pairs have no label."""
    return re.sub(r"\\(?:text|mathrm|left|right|[,!; ])|\^?\\circ|\\?[%$]|[^\w+/.-]|cm|units?", "", text).replace(
        "dfrac", "frac"
    )
