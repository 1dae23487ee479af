"""`numeric`: documented forms, exactness, refusals, and laws over hostile text."""

import json
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.records import Task
from verifiers.numeric import NotANumberError, numeric, parse_gold, parse_number

LAW = settings(deadline=None, derandomize=True, max_examples=150)


def task(answer):
    return Task(task_id="t", prompt="q", answer=answer, metadata={})


def judge(stated, gold):
    return numeric(f"<think>1 2 3</think><answer>{stated}</answer>", task(gold))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42), ("-3", -3), ("+3", 3), ("- 3", -3), ("\N{MINUS SIGN}3", -3), ("007", 7), ("1,234", 1234),
        ("1,234,567.50", Fraction(2469135, 2)), ("1{,}234", 1234), (".5", Fraction(1, 2)), ("-.5", Fraction(-1, 2)),
        ("5.", 5), ("3.10.", Fraction(31, 10)), ("1e3", 1000), ("1E+3", 1000), ("2.5e-1", Fraction(1, 4)),
        ("7/2", Fraction(7, 2)), ("-14 / 4", Fraction(-7, 2)), ("\\frac{7}{2}", Fraction(7, 2)),
        ("-\\dfrac{7}{2}", Fraction(-7, 2)), ("$5", 5), ("\\$5", 5), ("-$5", -5), ("$-5", -5),
        ("$ 1,000.25", Fraction(4001, 4)), ("$7$", 7), ("  8 \n", 8), ("1e400", 10**400), ("0", 0), ("-0", 0),
    ],
)  # fmt: skip
def test_documented_forms(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", ".", "-", "$", "abc", "5 apples", "x = 5", "5%", "1,23", "1,2345", ",123", "1.2.3", "1 2", "5..", "--5",
     "-$-5", "1e", "1e401", "1e999999999", "1e-999999999", "7/0", "7/2/1", "\\frac{1}{0}", "\\frac12", "(5)", "2^3",
     "1_000", "0x10", "NaN", "inf", "-Infinity", "\uff15", "\u0665", "\u00b2", "5\n6", "\x00", "1" * 257, "9" * 10**6,
     "((" * 1000],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_anything_else_is_unparsable_and_quickly_so(text):
    start = time.perf_counter()
    verdict = judge(text, 5)
    assert (verdict.status, verdict.score) == ("unparsable", 0.0)
    assert len(verdict.reason) < 300
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("completion", "status", "extracted"),
    [
        ("<think>6</think><answer>5</answer>", "correct", "5"),
        ("so \\boxed{5.0}", "correct", "5.0"),
        ("<answer>\\boxed{10/2}</answer>", "correct", "10/2"),
        ("<think>5</think><answer>6</answer>", "wrong", "6"),
        ("<answer>5.0000001</answer>", "wrong", "5.0000001"),
        ("<think>5</think> five", "unparsable", None),
        ("<answer>five</answer> \\boxed{5}", "unparsable", "five"),
        ("the answer is 5", "unparsable", None),
        ("<think><answer>5</answer></think>", "unparsable", None),
    ],
)
def test_statuses(completion, status, extracted):
    verdict = numeric(completion, task("5"))
    assert (verdict.status, verdict.extracted) == (status, extracted)
    assert verdict.score == (1.0 if status == "correct" else 0.0)


def test_reasons_name_both_numbers():
    assert judge("6", "7/2").reason == "6 is not the gold answer 7/2"
    assert judge("3.5", "7/2").reason == "3.5 equals the gold answer"
    assert "no <answer>" in numeric("", task(1)).reason


@pytest.mark.parametrize(
    ("gold", "value"),
    [
        (5, 5), (-2, -2), (0.1, Fraction(1, 10)), (1e300, 10**300), (5e-324, Fraction(5, 10**324)),
        (Decimal("1.50"), Fraction(3, 2)),
        (Fraction(7, 2), Fraction(7, 2)), (np.int64(4), 4), (np.float32(0.1), Fraction(1, 10)),
        (np.float64(2.5), Fraction(5, 2)),
        ("Tom pays 3 + 4 = 7.\n#### 1,007", 1007), ("#### -5", -5), ("$18", 18), (10**1000, 10**1000),
    ],
)  # fmt: skip
def test_gold_forms(gold, value):
    assert parse_gold(gold) == value


@pytest.mark.parametrize(
    "gold",
    [None, "", "x", True, float("nan"), float("inf"), Decimal("NaN"), [5], 10**5000, "9" * 10**6],
    ids=lambda g: repr(g)[:9] if g != 10**5000 else "huge",
)
def test_unusable_gold_is_an_error_not_a_wrong_answer(gold):
    verdict = judge("5", gold)
    assert (verdict.status, verdict.score) == ("error", 0.0)
    assert verdict.reason.startswith("the gold answer is unusable: ")


NUMBERS = st.fractions(min_value=-(10**20), max_value=10**20, max_denominator=10**6)


@LAW
@given(value=NUMBERS)
def test_gold_scores_one_as_a_fraction_and_any_other_scores_zero(value):
    for stated in (str(value), f"{value.numerator * 3}/{value.denominator * 3}"):
        assert judge(stated, str(value)).score == 1.0
    assert judge(str(value), value).status == "correct"
    assert judge(str(value + Fraction(1, 10**9)), value).status == "wrong"


@LAW
@given(value=st.integers(-(10**30), 10**30))
def test_gold_integer_scores_one_in_every_documented_form(value):
    plain, commas = str(value), f"{value:,}"
    for form in (
        plain,
        commas,
        f"{plain}.",
        f"{plain}.0",
        f"${commas}",
        f"${plain}$",
        f" {plain} ",
        f"{plain}e0",
        f"{plain}0e-1",
    ):
        for completion in (
            f"<answer>{form}</answer>",
            f"it is \\boxed{{{form}}}",
            f"<think>0</think>\n<answer>\n{form}\n</answer>",
        ):
            assert numeric(completion, task(value)).status == "correct", form
            assert numeric(completion, task(value + 1)).status == "wrong", form


@LAW
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_gold_scores_one_as_printed(value):
    assert judge(repr(value), value).status == "correct"


MARKERS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "{",
    "}",
    "\\",
    "$",
    "1",
    "e",
    ".",
    ",",
    "/",
    "-",
    "\ud800",
    " ",
]


@LAW
@given(
    text=st.lists(st.sampled_from(MARKERS) | st.text(max_size=5), max_size=40).map("".join),
    gold=st.text(max_size=6) | NUMBERS,
)
def test_no_text_makes_it_raise_and_it_is_deterministic(text, gold):
    verdict = numeric(text, task(gold))
    assert verdict == numeric(text, task(gold))
    assert verdict.score == float(verdict.status == "correct")


@pytest.mark.parametrize("piece", ["9", "1e", "(", "$", "\\boxed{", "<answer>", "-", ",111", "\\frac{1}{", " "])
def test_a_megabyte_of_anything_is_judged_quickly(piece):
    text = piece * (10**6 // len(piece))
    start = time.perf_counter()
    for completion in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}"):
        assert numeric(completion, task(5)).status == "unparsable"
    assert time.perf_counter() - start < 3


def test_not_a_number_says_why():
    with pytest.raises(NotANumberError, match="divides by zero"):
        parse_number("1/0")
    with pytest.raises(NotANumberError, match="too long"):
        parse_number("1" * 300)


def test_every_published_gsm8k_gold_scores_one():
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip(f"GSM8K is not at {path}")
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert len(answers) == 1319
    for answer in answers:
        stated = answer.rpartition("####")[2]
        assert numeric(f"{answer} <answer>{stated}</answer>", task(answer)).status == "correct"
        assert numeric(answer, task(answer)).status == "unparsable"


@pytest.mark.parametrize(
    ("gold", "status", "parsed"),
    [
        ("42", "ok", "42"), ("so #### 1,000", "ok", "1000"), (0.5, "ok", "1/2"), ("x+1", "unparsable", None),
        ("  ", "missing", None), (None, "missing", None), (True, "unparsable", None), ("9" * 300, "unparsable", None),
    ],
)  # fmt: skip
def test_golds_are_audited(gold, status, parsed):
    audit = numeric.prepare(Task(task_id="t", prompt="", answer=gold, metadata={}))
    assert (audit.status, audit.parsed) == (status, parsed)
