"""The labelled programs that `bench_sandbox` judges: published sets with their canonical solutions, and real completions."""

from __future__ import annotations

import base64
import json
import pickletools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One program, its tests, and whether it should pass."""

    name: str
    source: str
    answer: Mapping[str, Any]
    expected: bool


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]


def _cases(data: Path) -> Iterator[Row]:
    for row in _lines(data / "code_cases/cases.jsonl"):
        answer = {key: row[key] for key in ("mode", "tests", "fn_name") if key in row}
        yield Row(f"{row['id']} {row['name']}", row["code"], answer, row["expected"])


def _asserts(test_code: str, entry_point: str | None) -> dict[str, Any]:
    return {"mode": "asserts", "test_code": test_code, "entry_point": entry_point}


def _humaneval(data: Path) -> Iterator[Row]:
    for row in _lines(data / "humaneval/HumanEval.jsonl"):
        source = row["prompt"] + row["canonical_solution"]
        yield Row(row["task_id"], source, _asserts(row["test"], row["entry_point"]), True)


def _humaneval_outputs(data: Path) -> Iterator[Row]:
    tasks = {row["task_id"]: row for row in _lines(data / "humaneval/HumanEval.jsonl")}
    for row in _lines(data / "humaneval_outputs/labelled.jsonl"):
        task = tasks[row["task_id"]]
        answer = _asserts(task["test"], task["entry_point"])
        yield Row(f"{row['task_id']}/{row['sample']}", task["prompt"] + row["completion"], answer, row["passed"])


def _mbpp(data: Path) -> Iterator[Row]:
    for row in _lines(data / "mbpp/mbpp.jsonl"):
        tests = "\n".join(row["test_list"])
        defined = re.findall(r"def (\w+)", row["code"])
        entry = next((name for name in defined if re.search(rf"\b{name}\b", tests)), None)
        code = f"{row['test_setup_code']}\n{tests}"
        yield Row(f"mbpp/{row['task_id']}", row["code"], _asserts(code, entry), True)


# Their own asserts fail on their own solutions, in a plain Python as well.
_BROKEN_MBPP_PLUS = ("Mbpp/164", "Mbpp/295")


def _mbpp_plus(data: Path) -> Iterator[Row]:
    for row in _lines(data / "mbppplus/MbppPlus-v0.1.0.jsonl"):
        answer = _asserts(row["assertion"], row["entry_point"])
        yield Row(row["task_id"], row["canonical_solution"], answer, row["task_id"] not in _BROKEN_MBPP_PLUS)


# The same of the sample with twisted HumanEval tasks: unfinished tests, tests of another function.
_BROKEN_SHADOW = (1, 12, 32, 33, 37)


def _table(tests: list[dict[str, str]], spoiled: bool) -> str:
    """A program that knows every output by its input; spoiled, it leaves out the last line of the last one."""
    known = {test["input"]: test["output"] for test in tests}
    if spoiled:
        last = tests[-1]["input"]
        known[last] = "\n".join(known[last].rstrip().split("\n")[:-1])
    return f"import sys\nKNOWN = {known!r}\nsys.stdout.write(KNOWN[sys.stdin.read()])\n"


def _samples(data: Path) -> Iterator[Row]:
    """Sets with tests on standard input have no solutions: a table of the answers must pass, cut by a line it must not."""
    folder = data / "sandboxfusion_samples"
    for row in _lines(folder / "code_eval_code_contests.jsonl"):
        tests = [
            {"input": test["input"]["stdin"], "output": test["output"]["stdout"]} for test in json.loads(row["test"])
        ]
        yield from _both(f"code_contests/{row['id']}", tests)
    for row in _lines(folder / "code_eval_live_code_bench_v1.jsonl"):
        packed = json.loads(_first_json(zlib.decompress(base64.b64decode(row["test"]))))
        pairs = zip(packed["inputs"], packed["outputs"], strict=True)
        if packed.get("fn_name") is None:
            yield from _both(f"livecodebench/{row['id']}", [{"input": i, "output": o} for i, o in pairs])
    for row in _lines(folder / "code_eval_cruxeval.jsonl"):
        yield Row(
            f"cruxeval/{row['id']}", row["code"], _asserts(f"assert f({row['input']}) == {row['output']}", "f"), True
        )
    for row in _lines(folder / "code_eval_mbpp.jsonl"):
        yield Row(
            f"mbpp sample/{row['id']}", row["canonical_solution"], _asserts("\n".join(row["test_list"]), None), True
        )
    for row in _lines(folder / "code_eval_shadow_humaneval_python.jsonl"):
        if row["id"] in _BROKEN_SHADOW:
            continue
        entry = json.loads(row["labels"])["entry_point"]
        source = row["content"] + row["canonical_solution"]
        yield Row(f"shadow_humaneval/{row['id']}", source, _asserts(row["test"], entry), True)


def _both(name: str, tests: list[dict[str, str]]) -> Iterator[Row]:
    answer = {"mode": "stdin", "tests": tests}
    yield Row(f"{name} table", _table(tests, spoiled=False), answer, True)
    yield Row(f"{name} table, cut", _table(tests, spoiled=True), answer, False)


def _first_json(pickled: bytes) -> str:
    """The longest text in a pickle, found without unpickling it."""
    texts = [argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)]
    return max(texts, key=len)


def _hostile(data: Path) -> Iterator[Row]:
    del data
    from verifiers.code.hostile import HONEST, HOSTILE

    for each in HOSTILE:
        yield Row(each.name, each.source, each.answer, False)
    for name, (source, answer) in HONEST.items():
        yield Row(f"honest: {name}", source, answer, True)


SETS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "cases": _cases,
    "humaneval": _humaneval,
    "humaneval_outputs": _humaneval_outputs,
    "mbpp": _mbpp,
    "mbpp_plus": _mbpp_plus,
    "samples": _samples,
    "hostile": _hostile,
}
