"""`format`: the R1 form, and every way to miss it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.records import Task
from verifiers import resolve
from verifiers.format import TAGS, think_answer_format

TASK = Task(task_id="t", prompt="", answer=None, metadata={})


@pytest.mark.parametrize(
    "completion",
    [
        "<think>a</think><answer>b</answer>",
        "\n <think>\na\n</think>\n\n<answer> b </answer>\n",
        "<think>1 < 2 <b></think> <answer><x></answer>",
    ],
)
def test_the_form_scores_one(completion):
    verdict = think_answer_format(completion, TASK)
    assert (verdict.score, verdict.status) == (1.0, "correct")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "<think> occurs 0 times, not once"),
        ("a</think><answer>b</answer>", "<think> occurs 0 times, not once"),
        ("<think>a</think><answer>b", "</answer> occurs 0 times, not once"),
        ("<think><think>a</think><answer>b</answer>", "<think> occurs 2 times, not once"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "<answer> occurs 2 times, not once"),
        ("<answer>b</answer><think>a</think>", "the tags are out of order"),
        ("<think>a<answer>b</think></answer>", "the tags are out of order"),
        ("hi <think>a</think><answer>b</answer>", "there is text before <think>"),
        ("<think>a</think>so<answer>b</answer>", "there is text between the blocks"),
        ("<think>a</think><answer>b</answer>.", "there is text after </answer>"),
        ("<think> </think><answer>b</answer>", "the thinking is empty"),
        ("<think>a</think><answer>\n</answer>", "the answer is empty"),
    ],
)
def test_each_fault_is_named(completion, reason):
    verdict = think_answer_format(completion, TASK)
    assert (verdict.score, verdict.status, verdict.reason) == (0.0, "wrong", reason)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("a</think><answer>b</answer>", 1.0),
        ("<think>a</think><answer>b</answer>", 0.0),
        ("</think><answer>b</answer>", 0.0),
    ],
)
def test_the_opening_tag_may_stand_in_the_prompt(completion, score):
    assert resolve("format", {"think_in_prompt": True})(completion, TASK).score == score


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.sampled_from([*TAGS, "x", " "]), max_size=8).map("".join))
def test_only_the_form_scores_one(completion):
    rest = completion.strip()
    is_form = (
        [rest.count(tag) for tag in TAGS] == [1, 1, 1, 1] and rest.startswith("<think>") and rest.endswith("</answer>")
    )
    if is_form:
        thinking, _, tail = rest.removeprefix("<think>").partition("</think>")
        between, _, answer = tail.removesuffix("</answer>").partition("<answer>")
        is_form = bool("x" in thinking and "x" in answer and not between.strip() and "<" not in thinking + answer)
    assert think_answer_format(completion, TASK).score == float(is_form)
