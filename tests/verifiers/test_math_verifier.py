"""`math`: end to end on bare, dollar and boxed answers, and on the labelled sets where they are at hand."""

import json
from pathlib import Path

import pytest

from rollout.records import Task
from verifiers.math_verifier import MathVerifier

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
VERIFIER = MathVerifier()
UNDECIDED = "First we add 1 and 2, which gives a sum.\nThen the next case has to be looked at, and it has 4 parts"


def judge(completion, gold, verifier=VERIFIER):
    return verifier(completion, Task(task_id="t", prompt="q", answer=gold, metadata={}))


def rows(*names):
    path = DATA.joinpath(*names)
    if not path.exists():
        pytest.skip(f"the labelled set {'/'.join(names)} is not at hand (../shared/data)")
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("written", ["{}", "${}$", r"\boxed{{{}}}", r"\({}\)", r"\[{}\]", "<answer>{}</answer>"])
@pytest.mark.parametrize("boxed", ["{}", "${}$", r"\boxed{{{}}}"])
@pytest.mark.parametrize(
    ("answer", "gold", "status"),
    [
        (r"\frac12", "0.5", "correct"), (r"\frac{3}{4}", "0.5", "wrong"), ("x^2+1", "1+x^2", "correct"),
        ("(1,2]", "1<x\\le2", "correct"),
        (r"\sqrt{2}", "2^{1/2}", "correct"), ("12", "12", "correct"), (r"5\text{ cm}", r"5\text{ cm}", "correct"),
        ("-7", "7", "wrong"),
    ],
)  # fmt: skip
def test_bare_dollar_and_boxed_answers(written, boxed, answer, gold, status):
    assert judge(written.format(answer), boxed.format(gold)).status == status


def test_statuses():
    assert judge(UNDECIDED, "4").status == "unparsable"
    assert judge(r"\boxed{\frac{5}{}", "5").status in {"unparsable", "wrong"}
    assert judge(r"\boxed{5}", None).status == "error"
    assert judge(r"\boxed{5}", r"\frac{5").status == "error"
    verdict = judge(r"so \boxed{7}", "5")
    assert (verdict.status, verdict.score, verdict.extracted) == ("wrong", 0.0, "7")


def test_options_reach_the_comparison():
    assert judge(r"\boxed{2, 1}", "1, 2", MathVerifier(unordered_lists=False)).status == "wrong"
    assert judge(UNDECIDED, "4", MathVerifier(last_number=True)).status == "correct"
    assert judge(UNDECIDED, "4").status == "unparsable"
    with pytest.raises(ValueError, match="boxes"):
        MathVerifier(boxes="first")
    with pytest.raises(ValueError, match="percent"):
        MathVerifier(percent="any")


def test_prepare_audits_the_gold():
    task = Task(task_id="t", prompt="q", answer=r"\frac{1}{2", metadata={})
    assert VERIFIER.prepare(task).status == "embedded_number"


def counts(labelled):
    """Accuracy, false positives and negatives of (completion, gold, expected) rows."""
    false_positives = false_negatives = negatives = 0
    for completion, gold, expected in labelled:
        correct = judge(completion, gold).score == 1.0
        negatives += not expected
        false_positives += correct and not expected
        false_negatives += expected and not correct
    return 1 - (false_positives + false_negatives) / len(labelled), false_positives, negatives


# Two published rows call a list of roots in another order wrong, against twenty that call it right.
@pytest.mark.parametrize(
    ("name", "accuracy", "excused"), [("published", 0.95, 2), ("issues", 0.90, 0), ("adversarial", 0.95, 0)]
)
def test_labelled_verdicts(name, accuracy, excused):
    labelled = [
        (row["completion"], row["answer"], row["expected"])
        for row in rows("math_verdicts", f"cases_{name}.jsonl")
        if not row["disputed"]
    ]
    right, false_positives, negatives = counts(labelled)
    assert right >= accuracy
    assert false_positives - excused <= 0.01 * negatives


def test_gsm8k_solutions():
    labelled = [
        (solution["solution"], row["ground_truth"].rpartition("A:")[2].strip(), solution["is_correct"])
        for row in rows("gsm8k_model_solutions", "labelled.jsonl")
        for solution in row.values()
        if isinstance(solution, dict)
    ]
    assert len(labelled) > 1000
    assert counts(labelled)[0] >= 0.999


def test_qwen_outputs():
    labelled = [
        (completion, row["answer"], bool(score))
        for row in rows("qwen_math_cot_outputs", "math_cot.jsonl")
        for completion, score in zip(row["code"], row["score"], strict=True)
        if not (row["answer"] == "10{,}000" and "boxed{10000}" in completion)  # right, and labelled wrong
    ]
    assert len(labelled) > 390
    assert counts(labelled)[0] >= 0.999


def test_math_solutions_against_their_own_and_others_golds():
    found = rows("math500", "test.jsonl")
    assert counts([(row["solution"], row["answer"], True) for row in found])[0] >= 0.999
    accepted = 0
    for shift in (1, 7, 13):
        for row, other in zip(found, found[shift:] + found[:shift], strict=True):
            same = judge(f"\\boxed{{{row['answer']}}}", other["answer"]).score == 1.0
            accepted += same is False and judge(row["solution"], other["answer"]).score == 1.0
    assert accepted == 0


def test_every_gold_answer_can_be_read():
    golds = [row["answer"] for row in rows("deepscaler", "train_math.json")] + [
        row["answer"] for row in rows("math500", "test.jsonl")
    ]
    audits = [VERIFIER.prepare(Task(task_id="t", prompt="q", answer=gold, metadata={})) for gold in golds if gold]
    bad = [audit for audit in audits if audit.status not in {"ok", "ambiguous"}]
    assert len(bad) <= 0.001 * len(golds)
