"""`weighted`: the sum, whose status it is, and that a failed part is never a wrong answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.records import Task
from verifiers import Status, Verdict, resolve, weighted

TASK = Task(task_id="t", prompt="", answer=5, metadata={})


def fixed(score, status: Status = "wrong", reason="r", parts=None):
    return lambda completion, task: Verdict(
        score=score, status=status, reason=reason, extracted=completion, parts=parts or {}
    )


def both():
    return weighted({"accuracy": (resolve("numeric"), 1.0), "format": (resolve("format"), 0.2)})


@pytest.mark.parametrize(
    ("completion", "score", "status", "parts"),
    [
        ("<think>a</think><answer>5</answer>", 1.2, "correct", {"accuracy": 1.0, "format": 1.0}),
        ("<answer>5</answer>", 1.0, "correct", {"accuracy": 1.0, "format": 0.0}),
        ("<think>a</think><answer>6</answer>", 0.2, "wrong", {"accuracy": 0.0, "format": 1.0}),
        ("<think>a</think><answer>?</answer>", 0.2, "unparsable", {"accuracy": 0.0, "format": 1.0}),
        ("5", 0.0, "unparsable", {"accuracy": 0.0, "format": 0.0}),
    ],
)
def test_accuracy_and_format(completion, score, status, parts):
    verdict = both()(completion, TASK)
    assert verdict.score == pytest.approx(score)
    assert (verdict.status, verdict.parts) == (status, parts)


def test_reason_and_extracted_are_those_of_the_first():
    combined = weighted({"a": (fixed(0.5, "correct", "first"), 2.0), "b": (fixed(1.0, "wrong", "second"), -1.0)})
    verdict = combined("text", TASK)
    assert (verdict.score, verdict.status, verdict.reason, verdict.extracted) == (0.0, "correct", "first", "text")


@pytest.mark.parametrize("status", ["error", "timeout"])
@pytest.mark.parametrize("position", [0, 1])
def test_a_failed_component_fails_the_whole(status, position):
    components = [("good", (fixed(1.0, "correct"), 1.0)), ("bad", (fixed(0.0, status, "broke"), 1.0))]
    verdict = weighted(dict(components[::-1] if position == 0 else components))("", TASK)
    assert (verdict.score, verdict.status, verdict.reason) == (0.0, status, "bad: broke")


def test_parts_of_a_component_are_kept_under_its_name():
    verdict = weighted({"code": (fixed(0.5, parts={"case 1": 1.0, "case 2": 0.0}), 1.0)})("", TASK)
    assert verdict.parts == {"code": 0.5, "code.case 1": 1.0, "code.case 2": 0.0}


def test_bad_components_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        weighted({})
    with pytest.raises(ValueError, match="'a' is nan"):
        weighted({"a": (fixed(1.0), float("nan"))})


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=5))
def test_score_is_the_weighted_sum(pairs):
    combined = weighted({str(i): (fixed(score), weight) for i, (score, weight) in enumerate(pairs)})
    assert combined("", TASK).score == pytest.approx(sum(score * weight for score, weight in pairs))
