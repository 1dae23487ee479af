"""`choice`: forms of an option that are read, words that are no letters, several letters, options by their text."""

import pytest

from rollout.records import Task
from verifiers.choice import Choice

CITIES = {"options": ["Paris", "Rome", "Athens", "Oslo"]}


def judge(completion, gold, metadata=None, **options):
    return Choice(**options)(completion, Task(task_id="t", prompt="q", answer=gold, metadata=metadata or {}))


@pytest.mark.parametrize(
    "completion",
    ["B", "(B)", "b", "B.", "\\boxed{B}", "\\boxed{\\text{B}}", "\\boxed{\\mathrm{(B)}}", "\\boxed{\\textbf{(B)}}",
     "\\boxed{\\textbf{(B) }12}", "The answer is B.", "The answer is (B).", "The answer is (B) 12.", "Answer: B",
     "**Answer:** B", "The correct option is B", "the final answer is option B.", "<answer>B</answer>",
     "<answer>Option B</answer>", "<answer>B) 12</answer>", "<think>A</think>B", "故选B。", "故选：B", "答案是B", "选B",
     "答案：（B）", "\uff22", "First 3 + 4 = 7. So option (B) is correct.", "The answer is B because A is too small.",
     "\\boxed{A} is tempting. The final answer is B.", "$\\boxed{B}$", "#### B"],
)  # fmt: skip
def test_forms_of_an_option(completion):
    assert judge(completion, "B").status == "correct"
    assert judge(completion, "(B)").score == 1.0
    assert judge(completion, "C").status == "wrong"


@pytest.mark.parametrize(
    "completion",
    ["A train leaves at noon. It is late.", "A train", "The answer is a prime number.", "I would guess", "", "\\boxed{}",
     "\\boxed{12}", "\\boxed{F}", "\\boxed{AAA}",
     "\\boxed{BAD BEE}", "<think>B", "As for me, Bob is right.", "Option B looks fine. Let me check it again."],
)  # fmt: skip
def test_a_word_is_never_a_letter(completion):
    verdict = judge(completion, "A")
    assert (verdict.status, verdict.score) == ("unparsable", 0.0)


def test_hedging_is_wrong_and_several_gold_letters_are_all_needed():
    assert judge("\\boxed{A \\text{ or } B}", "B").status == "wrong"
    assert judge("\\boxed{A}, \\boxed{B}", "B").status == "wrong"
    assert [judge(text, "AC").status for text in ("\\boxed{CA}", "A, C", "A and C", "A", "ABC", "A")] == [
        "correct", "correct", "correct", "wrong", "wrong", "wrong",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("completion", "gold", "status"),
    [
        ("Rome", "B", "correct"),
        ("The answer is Rome.", "B", "correct"),
        ("B", "Rome", "correct"),
        ("B. Rome", "rome", "correct"),
        ("\\boxed{\\text{Rome}}", "Rome", "correct"),
        ("Oslo", "Rome", "wrong"),
        ("B. Oslo", "B", "unparsable"),
        ("Madrid", "B", "unparsable"),
        ("E", "B", "unparsable"),
        ("B", "Madrid", "error"),
        ("B", "E", "error"),
        ("B", 1, "error"),
    ],
)
def test_options_of_the_task(completion, gold, status):
    as_dict = {"choices": dict(zip("ABCD", CITIES["options"], strict=True))}
    labelled = {"choices": {"label": list("ABCD"), "text": [f"{a}. {t}" for a, t in as_dict["choices"].items()]}}
    for metadata in (CITIES, as_dict, labelled):
        assert judge(completion, gold, metadata).status == status


def test_letters_beyond_e_only_where_the_task_has_them():
    assert judge("\\boxed{G}", "G").status == "error"
    assert judge("\\boxed{G}", "G", num_options=7).status == "correct"
    assert judge("\\boxed{G}", "G", {"options": list("1234567")}).status == "correct"


@pytest.mark.parametrize(("options", "word"), [({"num_options": 1}, "num_options"), ({"boxes": "first"}, "boxes")])
def test_bad_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Choice(**options)


def test_audit():
    def audit(gold, metadata=None):
        return Choice().prepare(Task(task_id="t", prompt="q", answer=gold, metadata=metadata or {}))

    assert (audit("(B)").status, audit("(B)").parsed) == ("ok", "B")
    assert audit("Rome", CITIES).parsed == "B"
    assert audit("Rome").status == "unparsable"
    assert audit(" ").status == "missing"
    assert audit("Rome", {"options": ["Rome", "rome"]}).status == "unparsable"
