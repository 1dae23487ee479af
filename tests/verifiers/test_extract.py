"""Where a final answer is found, and that hostile text costs no more than its length."""

import time

import pytest

from verifiers.extract import MAX_BOX_SEARCH_CHARS, final_answer, last_answer_block, last_boxed


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>2+3</think><answer>5</answer>", "5"),
        ("<answer>4</answer><answer>5</answer>", "5"),
        ("<answer>5</answer> and <answer>6", "5"),
        ("<answer>6 <answer>5</answer>", "5"),
        ("<answer>5</answer> tail </answer>", "5"),
        ("<think><answer>6</answer></think> none", None),
        ("<think>\\boxed{6}</think>\\boxed{5}", "5"),
        ("<think>a</think> no <think>b</think>\\boxed{5}", "5"),
        ("<answer>so \\boxed{5}</answer>", "5"),
        ("<answer>5</answer> \\boxed{6}", "5"),
        ("\\boxed{3}, wait: \\boxed{5}.", "5"),
        ("\\boxed{5} and \\boxed{6", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{a \\} b}", "a \\} b"),
        ("} { \\boxed{5} }", "5"),
        ("\\boxed{1 \\boxed{2}}", "2"),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_final_answer(completion, expected):
    assert final_answer(completion) == expected


@pytest.mark.parametrize(
    "piece", ["<answer>", "</answer>", "\\boxed{", "{", "}", "\\", "\\boxed ", "<think>", "</think>"]
)
def test_repeated_markers_take_linear_time(piece):
    text = piece * 300_000
    start = time.perf_counter()
    assert final_answer(text) in (None, "")
    assert time.perf_counter() - start < 2


def test_box_search_stops_at_its_bound():
    assert last_boxed("\\boxed{5}" + " " * (MAX_BOX_SEARCH_CHARS - 9)) == "5"
    assert last_boxed("\\boxed{5}" + " " * MAX_BOX_SEARCH_CHARS) is None


def test_answer_block_needs_both_tags():
    assert last_answer_block("</answer>5<answer>") is None
    assert last_answer_block("5</answer>") is None
    assert last_answer_block("<answer></answer>") == ""
