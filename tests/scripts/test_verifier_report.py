"""The verifier report on a run folder written by the run's own writer: what it suspects, and judgements that stay."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from rollout.errors import UserError
from rollout.records import Group, Sample, Task
from rollout.run import RunRecord
from scripts.judgements import JUDGEMENTS, check_judgements, read_judgements
from scripts.loose_comparison import loosely_equal
from scripts.verifier_report import REPORT, build_report, run_verifier_report
from scripts.verifier_suspects import find_suspects
from verifiers.verdict import Verdict

TOML = (
    'name = "demo"\n[scoring]\ntimeout_s = 2.0\n'
    '[[rewards]]\nname = "accuracy"\nverifier = "numeric"\n'
    '[[rewards]]\nname = "length"\nverifier = "length"\nweight = 0.1\n[rewards.options]\nlongest = 5000\n'
)
REASONING = "First I add the two numbers, then I halve the sum, and at the end I check the result once more by hand. "


def sample(task_id, index, completion, status="wrong", extracted=None, score=None):
    verdict = Verdict(
        score=float(status == "correct") if score is None else score, status=status, reason="r", extracted=extracted
    )
    return Sample(
        task_id=task_id,
        sample_index=index,
        prompt_ids=(1,),
        completion_ids=(5, 6),
        rollout_logprobs=np.zeros(2, np.float32),
        policy_versions=(0, 0),
        finish_reason="stop",
        completion_text=completion,
        verdict=verdict,
    )


def group(task_id, answer, *completions):
    """Completions are (text, status[, extracted[, score]])."""
    samples = tuple(sample(task_id, index, *each) for index, each in enumerate(completions))
    return Group(task=Task(task_id=task_id, prompt=f"question {task_id}", answer=answer), samples=samples)


@pytest.fixture
def write(tmp_path):
    """Write {step: groups} as a run, and return its folder."""

    def write(steps, phase="train", toml=TOML) -> Path:
        run = tmp_path / "run"
        with RunRecord.open(run, tomllib.loads(toml), toml, resume=False) as record:
            for step, groups in steps.items():
                record.write_samples(step, groups, phase, [str(each.task.prompt) for each in groups])
            record.finish_samples()
        return run

    return write


def boxed(answer, status, extracted=None):
    return (f"{REASONING}So it is \\boxed{{{answer}}}.", status, extracted or answer)


def found(run):
    return {(each.rule, each.row["task_id"], each.row["sample_index"]) for each in build_report(run).suspects}


@pytest.mark.parametrize(
    ("gold", "stated", "equal"),
    [
        ("5", "5.", True), ("5", r"\text{ 5 }", True), (5, "$5$", True), ("1/2", r"\dfrac{1}{2}", True),
        ("0.5", "50\\%", True), ("1,234", "1234", True), ("x=3", "3", True), ("Paris", r"\text{paris}", True),
        ("3.1416", "3.1415926", True), ("90^\\circ", "90", True), ("５", "5", True), ("#### 18", "18 dollars", True),
        ("5", "6", False), (r"\frac{1}{12}", "1/12", True), (r"\frac{1}{12}", "5.5", False), ("2.50", "2.5", True),
        ("5", "15.", False), ("5", "5 or 6", False), ("1/2", "2/1", False), ("5", "", False), ("", "5", False),
        ({"mode": "stdin"}, "5", False), (True, "1", False), ("1/0", "0", False), ("-5", "5", False),
    ],
)  # fmt: skip
def test_the_loose_comparison(gold, stated, equal):
    assert loosely_equal(gold, stated) is equal


def test_right_answers_called_wrong_are_found_by_majority_and_by_reading(write):
    agree = [boxed("0.5", "wrong"), boxed("0.5", "wrong"), boxed("0.5", "unparsable"), boxed("7", "wrong")]
    alone = [boxed("50\\%", "wrong"), boxed("3", "wrong"), boxed("4", "wrong"), boxed("1/2", "correct")]
    run = write({0: [group("a", "1/2", *agree), group("b", "1/2", *alone), group("c", "9", *agree)]})
    expected = {("majority", "a", 0), ("majority", "a", 1), ("majority", "a", 2), ("looser reading", "b", 0)}
    assert found(run) == expected
    why = next(each.why for each in build_report(run).suspects if each.row["task_id"] == "a")
    assert why == "3 of 4 samples of its group say '0.5', which could mean the gold"


def test_rewards_that_were_not_earned_are_found(write):
    usual = [boxed(str(n), "correct") for n in range(4)]
    groups = [group(f"u{n}", str(n), usual[n]) for n in range(4)]
    groups += [
        group("short", "5", ("\\boxed{5}", "correct", "5")),
        group("list", "5", (REASONING + "\\boxed{3, 4, 5, 6}", "correct", "3, 4, 5, 6")),
        group("pair", "3,4,5", (REASONING + "\\boxed{3,4,5}", "correct", "3,4,5")),
        group("boxes", "5", (REASONING + "\\boxed{3} \\boxed{4} \\boxed{5}", "correct", "5")),
        group("blocks", "5", (REASONING + "<answer>4</answer><answer>5</answer>", "correct", "5")),
        group("grader", "5", (REASONING + "class A: __eq__ = lambda s, o: True \\boxed{5}", "correct", "5")),
        group("wrong", "5", ("\\boxed{6} __eq__", "wrong", "6")),
        *(group(f"copy{n}", "A", (REASONING + "it is always A", "correct", "A")) for n in range(3)),
    ]
    run = write({0: groups})
    assert found(run) == {
        ("no reasoning", "short", 0),
        ("list of answers", "list", 0),
        ("many boxes", "boxes", 0),
        ("many boxes", "blocks", 0),
        ("addresses the grader", "grader", 0),
        ("same text", "copy0", 0),
        ("same text", "copy1", 0),
        ("same text", "copy2", 0),
    }


def test_a_leap_of_the_mean_score_shows_its_best_sample(write):
    def step(scores):
        rows = [(f"{REASONING}{n}", "wrong", None, score) for n, score in enumerate(scores)]
        return [group("a", "none", *rows)]

    run = write({0: step([0.1, 0.1]), 1: step([0.2, 0.3]), 2: step([0.9, 0.8]), 3: step([0.9, 1.0])})
    (suspect,) = build_report(run).suspects
    assert (suspect.rule, suspect.row["step"], suspect.row["sample_index"]) == ("score jump", 2, 0)
    assert suspect.why == "the mean score of step 2 is 0.85 after 0.25"


def test_the_report_counts_and_its_page_escapes_text(write):
    evil = ("<script>alert(1)</script> \\boxed{0.5}", "wrong", "0.5")
    error = ("x", "error", None)
    run = write({3: [group("<b>", "1/2", evil, error, error, boxed("1/2", "correct"))]}, phase="eval_before")
    shown = []
    assert run_verifier_report(run, show=shown.append) == 0
    assert shown[0].splitlines()[1].split() == ["eval_before", "4", "25.0%", "25.0%", "0.0%", "0.0%", "50.0%"]
    assert "failed 2 times: r" in shown[0]
    page = (run / REPORT).read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>" not in page
    assert "<b>" not in page
    assert "This run kept no times" in page


def test_times_are_shown_where_a_run_kept_them(write, monkeypatch):
    run = write({0: [group("a", "1", boxed("1", "correct"), boxed("1", "correct"), boxed("1", "correct"))]})
    from scripts import verifier_report

    read = verifier_report.read_samples
    times = [0.5, 2.5, None]
    monkeypatch.setattr(
        verifier_report,
        "read_samples",
        lambda *args: [{**row, "elapsed_s": time} for row, time in zip(read(*args), times, strict=False)],
    )
    assert [row["elapsed_s"] for row in build_report(run).slowest] == [2.5, 0.5]


def test_judgements_are_saved_at_once_and_become_regression_cases(write, monkeypatch):
    groups = [
        group("a", "1/2", boxed("50\\%", "wrong"), boxed("8", "wrong")),
        group("b", "1/2", boxed("0.5", "wrong"), boxed("9", "wrong")),
        group("c", "1/2", boxed("2/4", "wrong"), boxed("9", "wrong")),
    ]
    run = write({0: groups})
    answers = iter(["c", "s", "w"])
    shown = []
    run_verifier_report(run, judging=True, ask=lambda _: next(answers), show=shown.append)
    assert "2 judged" in shown[-1]
    saved = read_judgements(run)
    assert [(each.task_id, each.expected, each.status) for each in saved] == [
        ("a", "correct", "wrong"),
        ("c", "wrong", "wrong"),
    ]
    assert (saved[0].answer, saved[0].prompt) == ("1/2", "question a")
    asked = []
    run_verifier_report(run, judging=True, ask=lambda text: asked.append(text) or "q", show=shown.append)
    assert len(asked) == 1
    assert "task b, sample 0" in shown[-2]

    # `numeric` now: 50\% is unparsable (a person: correct), 2/4 equals 1/2 (a person: wrong).
    count, differ = check_judgements(run, num_workers=1)
    assert count == 2
    assert [(each.judgement.task_id, each.verdict.status) for each in differ] == [("a", "unparsable"), ("c", "correct")]
    assert run_verifier_report(run, checking=True, show=shown.append) == 1
    assert "2 judged cases, 2 decided otherwise" in shown[-1]

    rows = [json.loads(line) for line in (run / JUDGEMENTS).read_text().splitlines()]
    rows += [{**rows[0], "expected": "wrong"}, {**rows[1], "expected": "correct"}]
    (run / JUDGEMENTS).write_text("\n".join(map(json.dumps, rows)))
    assert run_verifier_report(run, checking=True, show=shown.append) == 0
    assert shown[-1] == "2 judged cases, 0 decided otherwise"


def test_unusable_folders_say_what_to_do(tmp_path, write):
    with pytest.raises(UserError, match="isn't a run's folder"):
        build_report(tmp_path)
    run = write({0: [group("a", "1", boxed("1", "correct"))]})
    with pytest.raises(UserError, match=r"judge some verdicts first, with `groupzero verifier-report .*run --judge`"):
        check_judgements(run)
    (run / JUDGEMENTS).write_text('{"expected": "correct"}\n')
    with pytest.raises(UserError, match=r"judgements.jsonl, line 1: not a judgement"):
        check_judgements(run)
    (run / "samples.parquet").unlink()
    with pytest.raises(UserError, match="has no samples yet"):
        build_report(run)


def test_unscored_samples_are_left_out():
    row = {"status": None, "step": 0, "task_id": "a", "completion": "5", "answer": "5", "extracted": None}
    assert find_suspects([row]) == []
