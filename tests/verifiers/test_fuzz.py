"""Laws of extraction and of `math` over hostile text, and every input that the fuzzer ever broke them with.

`fuzz_cases.jsonl` holds {gold, completion, what}: what it did when it was found.
"""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.records import Task
from verifiers.choice import Choice
from verifiers.extract import last_boxed, stated_answer
from verifiers.math_verifier import MathVerifier

LAW = settings(deadline=None, derandomize=True, max_examples=120)
CASES = [json.loads(line) for line in Path(__file__).with_name("fuzz_cases.jsonl").read_text().splitlines()]
STATUSES = {"correct", "wrong", "unparsable", "timeout", "error"}
PIECES = st.sampled_from(
    ["\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "^", "_", "!", "+", "-", "=", "<", "\\le", ",", ";", " ",
     "1", "23", "0.5", "10^{9}", "x", "e", "i", "\\pi", "\\sin", "\\log", "\\pm", "\\infty", "\\text{", "\\boxed{", "\\cup",
     "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "%", "^\\circ", "|", "\\overline{", "$", "\\(", "\\)", ".", ":", "\n",
     "<answer>", "</answer>", "<think>", "</think>", "The answer is ", "答案是", "½", "²", "∞", "５", "\x00", "\ud800", "\\"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=60)
MATH = MathVerifier()


def judge(verifier, completion, gold):
    return verifier(completion, Task(task_id="t", prompt="q", answer=gold, metadata={}))


def check(verdict):
    assert verdict.status in STATUSES
    assert verdict.score == float(verdict.status == "correct")
    assert isinstance(verdict.reason, str)
    json.dumps(verdict.to_dict())


@LAW
@given(text=TEXTS)
def test_extraction_never_raises_and_takes_what_is_there(text):
    for options in ({}, {"last_number": True}, {"boxes": "all"}, {"boxes": "single"}):
        stated = stated_answer(text, **options)
        assert (stated.text is None) or stated.text.strip()
        assert stated.reason
    last_boxed(text)


@LAW
@given(answer=st.from_regex(r"[a-z0-9+^/-]{1,12}", fullmatch=True), before=TEXTS)
def test_a_last_box_is_the_answer_whatever_stands_before_it(answer, before):
    before = before.replace("<answer>", "").replace("<think>", "").replace("<ANSWER>", "") + "."
    stated = stated_answer(f"{before}\n\nHence it follows that \\boxed{{{answer}}}")
    assert stated.text == answer.strip()


@LAW
@given(gold=TEXTS, completion=TEXTS)
def test_math_never_raises(gold, completion):
    check(judge(MATH, completion, gold))
    check(judge(MATH, f"\\boxed{{{completion}}}", gold))
    MATH.prepare(Task(task_id="t", prompt="q", answer=gold, metadata={}))


@LAW
@given(gold=TEXTS)
def test_a_gold_in_a_box_is_never_wrong_for_itself(gold):
    gold = gold.replace("\\boxed", "").replace("<", "")
    balanced = gold.count("{") == gold.count("}") and "\\" not in gold
    if balanced and stated_answer(f"\\boxed{{{gold}}}").text == gold.strip() != "":
        assert judge(MATH, f"\\boxed{{{gold}}}", gold).status != "wrong"


@LAW
@given(value=st.integers(-(10**40), 10**40), other=st.integers(-(10**40), 10**40))
def test_integers_are_compared_exactly(value, other):
    assert judge(MATH, f"\\boxed{{{value}}}", str(value)).status == "correct"
    assert judge(MATH, f"\\boxed{{{other}}}", str(value)).status == ("correct" if value == other else "wrong")


@LAW
@given(text=TEXTS, letter=st.sampled_from("ABCDE"))
def test_choice_never_raises(text, letter):
    check(judge(Choice(), text, letter))
    check(judge(Choice(), "A", text))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"][:40])
def test_what_the_fuzzer_found(case):
    check(judge(MATH, case["completion"], case["gold"]))


@pytest.mark.parametrize(
    "piece",
    ["\\", "\\(", "{", "(", "\\frac", "\\frac{1}{", "x^", "2^{", "!", "-", "\\pm ", "1,", "|", "\\sqrt{", "∞", "½", "1=", "\\{",
     "\\left(", "\\cup ", "\\sin ", "\\begin{pmatrix}", "a_{", "\\text{", "9", "x+", "\\boxed{", "1:", "\\mid ", "and "],
)  # fmt: skip
def test_repeated_pieces_end_soon(piece):
    start = time.perf_counter()
    for count in (200, 30_000):
        for completion in (f"\\boxed{{{piece * count}}}", f"\\boxed{{5{piece * count}}}", piece * count):
            check(judge(MATH, completion, "5"))
            check(judge(MATH, "\\boxed{5}", piece * count))
    assert time.perf_counter() - start < 20  # each call ends in milliseconds; a quadratic one takes minutes
