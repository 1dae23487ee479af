"""The labelled sets, where they are: all hand-made cases, and a part of the published ones."""

import json
import re
from pathlib import Path

import pytest

from tests.verifiers.code.support import PlainTask, need_namespaces
from verifiers.code_verifier import CodeVerifier

DATA = Path(__file__).resolve().parents[4] / "shared/data"
EVERY = 8  # one row of so many; `python -m scripts.bench_sandbox` takes them all


def rows(path):
    if not (DATA / path).exists():
        pytest.skip(f"no {DATA / path}")
    with (DATA / path).open() as stream:
        return [json.loads(line) for line in stream]


def test_hand_made_cases():
    need_namespaces()
    verifier = CodeVerifier(timeout_s=1.0)
    wrong = []
    for row in rows("code_cases/cases.jsonl"):
        answer = {key: row[key] for key in ("mode", "tests", "fn_name") if key in row}
        verdict = verifier(f"```python\n{row['code']}\n```", PlainTask(json.dumps(answer)))
        if (verdict.status == "correct") != row["expected"] or verdict.status == "error":
            wrong.append((row["id"], verdict.status, verdict.reason))
    assert wrong == []


def disagreements(triples):
    verifier = CodeVerifier(timeout_s=10.0)
    verdicts = [(verifier(source, PlainTask(answer)), expected) for source, answer, expected in triples]
    return [verdict.reason for verdict, expected in verdicts if (verdict.status == "correct") != expected]


def test_humaneval_and_real_completions():
    need_namespaces()
    tasks = {row["task_id"]: row for row in rows("humaneval/HumanEval.jsonl")}
    answers = {
        name: {"mode": "asserts", "test_code": task["test"], "entry_point": task["entry_point"]}
        for name, task in tasks.items()
    }
    named = [name for number, name in enumerate(tasks) if number % EVERY == 0 or number in (32, 38, 50)]
    triples = [(tasks[name]["prompt"] + tasks[name]["canonical_solution"], answers[name], True) for name in named]
    for row in rows("humaneval_outputs/labelled.jsonl")[:: EVERY * 2]:
        name = row["task_id"]
        triples.append((tasks[name]["prompt"] + row["completion"], answers[name], row["passed"]))
    assert len(triples) > 60
    assert disagreements(triples) == []


def test_mbpp():
    need_namespaces()
    triples = []
    for number, row in enumerate(rows("mbpp/mbpp.jsonl")):
        if number % (EVERY * 2) and not row["test_setup_code"]:
            continue
        tests = "\n".join(row["test_list"])
        entry = next((name for name in re.findall(r"def (\w+)", row["code"]) if name in tests), None)
        answer = {"mode": "asserts", "test_code": f"{row['test_setup_code']}\n{tests}", "entry_point": entry}
        triples.append((row["code"], answer, True))
    assert len(triples) > 50
    assert disagreements(triples) == []
