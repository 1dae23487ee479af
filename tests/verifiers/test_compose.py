"""Compositions: whose score and status they take, and that a failed part is never a wrong answer."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.records import Task
from verifiers import (
    GoldAudit,
    GoldStatus,
    Status,
    Verdict,
    VerifierLookupError,
    all_of,
    by_task,
    first_of,
    prepare,
    resolve,
    weighted,
)
from verifiers.calling import timeout_of

TASK = Task(task_id="t", prompt="", answer=5, metadata={})


def audit_of(verifier, task):
    found = prepare(verifier, task)
    assert found is not None
    return found


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


GOOD, BAD = "<think>a</think><answer>5</answer>", "<answer>5</answer>"


def test_all_of_wants_every_part_and_stops_at_the_first_that_is_not():
    both = resolve("all_of", {"components": {"format": "format", "value": {"verifier": "numeric"}}})
    right, bare, wrong = (both(text, TASK) for text in (GOOD, BAD, GOOD.replace("5", "6")))
    assert (right.score, right.status, right.extracted) == (1.0, "correct", "5")
    assert right.parts == {"format": 1.0, "value": 1.0}
    assert (bare.score, bare.status, bare.parts) == (0.0, "wrong", {"format": 0.0})
    assert bare.reason == "format: <think> occurs 0 times, not once"
    assert (wrong.score, wrong.status, wrong.reason) == (0.0, "wrong", "value: 6 is not the gold answer 5")
    assert all_of({"a": fixed(0.5, "correct"), "b": fixed(2.0, "correct")})("", TASK).score == 0.5
    assert all_of({"a": fixed(1.0, "correct"), "b": fixed(0.0, "error", "broke")})("", TASK).status == "error"


@pytest.mark.parametrize(
    ("statuses", "winner", "status"),
    [
        (["unparsable", "error", "wrong", "correct"], 2, "wrong"),
        (["timeout", "correct"], 1, "correct"),
        (["error", "unparsable", "unparsable"], 1, "unparsable"),
        (["timeout", "error"], 0, "timeout"),
    ],
)
def test_first_of_asks_until_one_can_tell(statuses, winner, status):
    verdict = first_of({str(i): fixed(float(i), s, f"r{i}") for i, s in enumerate(statuses)})("", TASK)
    assert (verdict.score, verdict.status, verdict.reason) == (float(winner), status, f"{winner}: r{winner}")


def test_by_task_goes_by_the_tasks_own_verifier():
    chosen = by_task({"numeric": "numeric", "form": {"verifier": "format"}, "strict": all_of({"f": "format"})})
    assert chosen(GOOD, replace(TASK, verifier="form")).reason == "one thinking block, then one answer block"
    assert chosen(BAD, replace(TASK, verifier="strict")).parts == {"f": 0.0}
    assert chosen(BAD, replace(TASK, verifier="numeric")).status == "correct"
    lost = chosen(BAD, replace(TASK, verifier="numerc"))
    assert (lost.score, lost.status) == (0.0, "error")
    assert "'numerc' is not among numeric, form, strict, did you mean 'numeric'" in lost.reason
    assert prepare(chosen, replace(TASK, verifier="numerc")) == GoldAudit(status="missing", reason=lost.reason)


def test_by_task_without_a_list_takes_any_name_but_no_path(tmp_path, monkeypatch):
    (tmp_path / "compose_plugin.py").write_text("raise RuntimeError('data must not import code')\n")
    monkeypatch.syspath_prepend(tmp_path)
    chosen = by_task()
    assert chosen(GOOD, replace(TASK, verifier="format")).status == "correct"
    for name in ("compose_plugin:f", "by_task", "nothing_like_it"):
        verdict = chosen(GOOD, replace(TASK, verifier=name))
        assert (verdict.status, "is not among" in verdict.reason) == ("error", True)
    assert chosen(GOOD, replace(TASK, verifier="")).reason == "the task names no verifier, and by_task has no default"
    assert by_task(["format"], default="format")(GOOD, replace(TASK, verifier="")).status == "correct"
    with pytest.raises(VerifierLookupError, match="'numeric' is not among format"):
        by_task(["format"], default="numeric")


@dataclass(frozen=True)
class Audited:
    """A verifier whose audit says what it is told to."""

    status: GoldStatus | None = None
    timeout_s: float | None = None

    def __call__(self, completion, task):
        return True

    def prepare(self, task):
        return None if self.status is None else GoldAudit(status=self.status, reason="said so")


def test_audits_and_times_of_the_parts_are_forwarded():
    parts = {"a": Audited("ok", 2.0), "b": Audited("ambiguous"), "c": Audited(None, 3.5)}
    for combined in (weighted({name: (part, 1.0) for name, part in parts.items()}), all_of(parts)):
        assert prepare(combined, TASK) == GoldAudit(status="ambiguous", reason="b: said so")
        assert timeout_of(combined, TASK) == 5.5
    assert audit_of(first_of({"a": Audited("unparsable"), "b": Audited("ok")}), TASK).status == "ok"
    assert prepare(first_of(parts), TASK) is None
    assert prepare(weighted({"a": (fixed(1.0), 1.0)}), TASK) is None
    chosen = by_task({"slow": Audited("ok", 30.0), "quick": Audited("missing")})
    assert timeout_of(chosen, replace(TASK, verifier="slow")) == 30.0
    assert timeout_of(chosen, replace(TASK, verifier="quick")) == 0.0
    assert audit_of(chosen, replace(TASK, verifier="quick")).status == "missing"


async def later(completion, task):
    return 0.5


def test_async_and_number_returning_parts_count():
    combined = weighted({"a": (later, 2.0), "b": (lambda completion, task: True, 1.0)})
    assert combined("", TASK).score == 2.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("all_of", {"components": {}}, "at least one component"),
        ("weighted", {"components": {"a": {"verifier": "numeric", "wieght": 2}}}, "component 'a' has 'wieght'"),
        ("weighted", {"components": {"a": {"verifier": "numeric", "weight": "2"}}}, "'a' is 2; it must be a finite"),
        ("first_of", {"components": {"a": "numerc"}}, "unknown verifier 'numerc'"),
        ("first_of", {"components": {"a": 5}}, "'a' is a int, not a verifier"),
        ("by_task", {"verifiers": "math"}, "a list of names"),
        ("by_task", {"verifiers": ["by_task"]}, "can't hold by_task"),
    ],
)
def test_bad_options_of_compositions_are_refused(name, options, message):
    with pytest.raises(VerifierLookupError, match=message):
        resolve(name, options)
