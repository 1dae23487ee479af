"""Hostile and meaningless text: a verdict within the bounds, never an exception."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.mathematics import equivalent, numeric
from verifiers.mathematics.audit import audit_gold
from verifiers.mathematics.exact import MAX_BITS, rational
from verifiers.mathematics.parser import parse

LAW = settings(deadline=None, derandomize=True, max_examples=300)
HUGE = [
    "9^{9^{9^9}}", "10^{10^9}", "2003^{2002^{2001}}", "(10^9)!", "((10^6)!)!", r"\binom{10^9}{10^8}", "10^{-10^{9}}",
    r"\sum_{k=1}^{10^7} k", r"\sum_{k=1}^{999}\sum_{j=1}^{999} kj^{0.5}", r"\prod_{k=1}^{900} k^{k}", r"\sin(10^{10^6})",
    r"\lfloor 10^{10^6}\pi\rfloor", "e^{e^{e^{e}}}", "(x+y+z)^{1000000}", "x^{x^{x^{x^{x}}}}", "1e999999999", "1e" + "9" * 30,
    "9" * 1999 + "^" + "9" * 1999, r"\sqrt[10^9]{6}", r"\gcd(10^{1000},10^{999})", "3^{5000000}", "0.5^{10^{12}}",
]  # fmt: skip
LONG = [
    r"\sqrt{" * 200 + "2" + "}" * 200, r"\frac{1}{" * 300 + "2" + "}" * 300, "(" * 9000, "+".join(["x"] * 1400),
    "-" * 5000 + "1", "1/" * 1400 + "2", "2^" * 1400 + "2", "5" + "!" * 50, "5" + "'" * 3000, r"\text{" * 1500, r"\(" * 4000,
    "x!" * 100, "1=2=" * 700 + "3", r"\{" * 400 + "1" + r"\}" * 400, "a_{" * 500 + "1" + "}" * 500, "|" * 2999,
    r"\begin{pmatrix}" * 100, "²" * 4000, "√" * 3000 + "2", "(1," * 900, "\n" * 9999, "1\n" * 3000, "f(" * 300 + "x" + ")" * 300,
    r"\begin{vmatrix}" + r"\\".join(["&".join(["x"] * 12)] * 12) + r"\end{vmatrix}", "2^{" * 30 + "x" + "}" * 30,
]  # fmt: skip
GOLDS = ["6", r"\frac{x+1}{2}", "(1,7)", "3,4,7", "x<6", "x=6", "Yes", r"6\text{ cm}"]


@pytest.mark.parametrize("text", HUGE + LONG, ids=lambda text: text[:30])
def test_huge_answers_are_not_the_gold(text):
    for gold in GOLDS:
        assert equivalent(gold, text).status in {"wrong", "unparsable"}
        assert equivalent(text, gold).status in {"wrong", "error"}
    assert audit_gold(text).status in {"ok", "unparsable", "embedded_number", "ambiguous", "missing"}


@pytest.mark.parametrize("text", HUGE)
def test_huge_answers_are_themselves(text):
    assert equivalent(f"{text} + 0", f"0 + {text}").status == "correct"


def test_nothing_beyond_the_bound_is_written_out():
    value = rational(parse("2^{19000}").tree)
    assert value is not None
    assert value.numerator.bit_length() == 19001 < MAX_BITS
    assert rational(parse("2^{50000}").tree) is None
    assert rational(parse("10^{10^{9}}").tree) is None


def test_powers_too_large_to_write_out_stay_exact():
    assert equivalent("3^{200000}+1", "3^{200000}").status == "wrong"
    assert equivalent("9^{100000}", "3^{200000}").status == "correct"


def test_one_comparison_has_one_budget_of_steps(monkeypatch):
    spent = []
    real = numeric.Evaluator.evaluate

    def counted(self, expr):
        spent.append(1)
        return real(self, expr)

    monkeypatch.setattr(numeric.Evaluator, "evaluate", counted)
    long = r"\sum_{k=1}^{900}\sin(k)\cos(kx)\tan(k)"
    assert equivalent(long, f"{long} + 2x - 2x").status in {"correct", "wrong"}
    assert len(spent) <= 2 * numeric.MAX_STEPS


VOCABULARY = (
    r"1 2.5 x y n \pi e i + - * / ^ _ ( ) [ ] { } \{ \} | , ; = < \le \in \cup \setminus \frac \sqrt \sin \log ! % \% ^\circ "
    r"\text{cm} \text{or} and \mathbb{R} \infty \pm \sum \binom \begin{pmatrix} \end{pmatrix} & \\ \det \bmod \begin{cases} "
    r"\end{cases} : \mid f( where \$ $ \ldots \lfloor \boxed{ ' . 10^{10^{10}} 1,234 ① ² √ ½ ≤ 或 百分之五"
)
PIECES = st.lists(st.sampled_from(VOCABULARY.split()), max_size=25).map(" ".join)


@LAW
@given(PIECES | st.text(max_size=60), PIECES | st.sampled_from(GOLDS))
def test_junk_never_raises(answer, gold):
    assert equivalent(gold, answer).status in {"correct", "wrong", "unparsable", "error"}
    assert audit_gold(answer).reason


@LAW
@given(st.fractions(), st.fractions())
def test_fractions_compare_as_fractions(one, two):
    def written(value):
        return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"

    assert (equivalent(written(one), f"{two.numerator}/{two.denominator}").status == "correct") == (one == two)
    assert equivalent(written(one), f"{written(one - two)} + {written(two)}").status == "correct"


@LAW
@given(st.integers(-999, 999), st.integers(0, 999), st.integers(1, 3))
def test_two_decimals_of_one_length_compare_exactly(whole, digits, apart):
    gold, answer = f"{whole}.{digits:03d}7", f"{whole}.{digits:03d}{7 - apart}"
    assert equivalent(gold, answer).status == "wrong"
    assert equivalent(gold, gold + "0").status == "correct"


@LAW
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_lists_in_any_order_and_tuples_in_one(items, random):
    mixed = list(items)
    random.shuffle(mixed)
    gold, answer = ", ".join(map(str, items)), ", ".join(map(str, mixed))
    assert equivalent(gold, answer).status == "correct"
    assert equivalent(f"\\{{{gold}\\}}", answer).status == "correct"
    assert equivalent(gold, f"{answer}, 51").status == "wrong"
    assert (equivalent(f"({gold})", f"({answer})").status == "correct") == (items == mixed)


def test_threads_agree_with_the_main_thread():
    pairs = [(r"\sin 2x", r"2\sin x\cos x"), (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), (r"\pi", "3.2"), ("x+y=5", "2x+2y=10")]
    expected = [equivalent(*pair).status for pair in pairs] * 10
    results = []

    def work():
        results.append([equivalent(*pair).status for pair in pairs * 10])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
