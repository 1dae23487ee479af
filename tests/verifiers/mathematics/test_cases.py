"""Labelled pairs of gold and answer, as a mathematician would judge them, one per line of `cases.jsonl`.

Kinds "prose.." hold whole completions; every other answer is judged inside a box. A case with `open` is one that `math`
does not read yet: it must fail, so that the mark goes when it is read.
"""

import json
from pathlib import Path

import pytest

from rollout.records import Task
from verifiers.math_verifier import MathVerifier

CASES = [json.loads(line) for line in Path(__file__).with_name("cases.jsonl").read_text().splitlines()]
VERIFIER = MathVerifier()


def judge(gold, completion):
    return VERIFIER(completion, Task(task_id="t", prompt="q", answer=gold, metadata={}))


def parameter(case):
    label = f"{case['kind']}: {case['gold']} / {case['answer']}"[:80]
    marks = [pytest.mark.xfail(reason="not read yet", strict=True)] if case.get("open") else []
    return pytest.param(case, id=label, marks=marks)


@pytest.mark.parametrize("case", [parameter(case) for case in CASES])
def test_verdict(case):
    completion = case["answer"] if case["kind"].startswith("prose") else f"\\boxed{{{case['answer']}}}"
    verdict = judge(case["gold"], completion)
    assert verdict.status == "correct" if case["expected"] else verdict.status in ("wrong", "unparsable"), verdict


@pytest.mark.parametrize("gold", sorted({case["gold"] for case in CASES}))
def test_every_gold_answer_is_correct_for_itself(gold):
    assert judge(gold, f"\\boxed{{{gold}}}").status == "correct"
