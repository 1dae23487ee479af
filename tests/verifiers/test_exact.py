"""`exact`: equality of text under each normalisation option."""

import pytest

from rollout.records import Task
from verifiers.exact import Exact


def judge(completion, gold, **options):
    return Exact(**options)(completion, Task(task_id="t", prompt="q", answer=gold, metadata={}))


@pytest.mark.parametrize(
    ("completion", "gold", "options", "status"),
    [
        ("<answer>red fox</answer>", "red fox", {}, "correct"),
        ("<answer> red \n fox </answer>", "red fox", {}, "correct"),
        ("<answer>red  fox</answer>", "red fox", {"spaces": False}, "wrong"),
        ("<answer>Red fox</answer>", "red fox", {}, "wrong"),
        ("<answer>Red fox</answer>", "red fox", {"ignore_case": True}, "correct"),
        ("<answer>red, fox!</answer>", "red fox", {"ignore_punctuation": True}, "correct"),
        ("<answer>red, fox</answer>", "red fox", {}, "wrong"),
        ("<answer>\uff12\uff10</answer>", "20", {}, "correct"),
        ("<answer>\uff12\uff10</answer>", "20", {"unicode": False}, "wrong"),
        ("<answer>20</answer>", 20, {}, "correct"),
        ("<answer>20.0</answer>", 20, {}, "wrong"),
        ("<answer>b</answer>", ["a", "b"], {}, "correct"),
        ("<answer>c</answer>", ["a", "b"], {}, "wrong"),
        ("<think>no</think>\nred fox\n", "red fox", {"whole": True}, "correct"),
        ("<think>no</think> a red fox", "red fox", {"whole": True}, "wrong"),
        ("<think>red fox", "red fox", {}, "unparsable"),
        ("<think>red fox</think>", "red fox", {"whole": True}, "unparsable"),
        ("<answer>x</answer>", {"a": 1}, {}, "error"),
        ("<answer>x</answer>", True, {}, "error"),
        ("<answer>x</answer>", "", {}, "error"),
        ("<answer>x</answer>", None, {}, "error"),
    ],
)
def test_statuses(completion, gold, options, status):
    verdict = judge(completion, gold, **options)
    assert (verdict.status, verdict.score) == (status, float(status == "correct"))


def test_options_are_checked_and_the_gold_is_audited():
    with pytest.raises(ValueError, match="ignore_case"):
        Exact(ignore_case="yes")
    task = Task(task_id="t", prompt="q", answer=" Red  Fox ", metadata={})
    audit = Exact(ignore_case=True).prepare(task)
    assert (audit.status, audit.parsed) == ("ok", "red fox")
