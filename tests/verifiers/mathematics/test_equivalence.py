"""Equivalence by kind: `pairs.txt` has one `gold | answer | verdict` a line under `# kind` (T, F, or U for unparsable)."""

from pathlib import Path

import pytest

from verifiers.mathematics import MathOptions, equivalent

EXPECTED = {"T": {"correct"}, "F": {"wrong", "unparsable"}, "U": {"unparsable", "wrong"}}


def read_pairs():
    kind, found = "", []
    for line in Path(__file__).with_name("pairs.txt").read_text().splitlines():
        if line.startswith("# "):
            kind = line[2:]
        elif line.strip():
            pair, _, verdict = line.rpartition(" | ")
            gold, _, answer = pair.partition(" | ")
            found.append((kind, gold.strip(), answer.strip(), verdict.strip()))
    return found


PAIRS = read_pairs()


@pytest.mark.parametrize(("kind", "gold", "answer", "verdict"), PAIRS)
def test_pair(kind, gold, answer, verdict):
    assert equivalent(gold, answer).status in EXPECTED[verdict]


@pytest.mark.parametrize("text", sorted({text for _, *pair, verdict in PAIRS if verdict != "U" for text in pair[:2]}))
def test_what_is_written_another_way_stays_itself(text):
    assert equivalent(text, text).status == "correct"
    assert equivalent(f"\\displaystyle {text}", f"{text} \\;").status == "correct"


ONE_WAY = {"percent", "decimals", "base"}  # conventions about what the gold is


@pytest.mark.parametrize(
    ("gold", "answer"),
    [(gold, answer) for kind, gold, answer, verdict in PAIRS if verdict == "F" and kind not in ONE_WAY],
)
def test_what_differs_differs_both_ways(gold, answer):
    assert equivalent(answer, gold).status != "correct"


@pytest.mark.parametrize(
    ("gold", "answer", "options", "status"),
    [
        ("1, 2", "2, 1", MathOptions(unordered_lists=False), "wrong"),
        ("1, 2", "1, 2.0", MathOptions(unordered_lists=False), "correct"),
        (r"\{1, 2\}", r"\{2, 1\}", MathOptions(unordered_lists=False), "correct"),
        (r"5\text{ cm}", "5", MathOptions(missing_units="refuse"), "wrong"),
        (r"5\text{ cm}", r"50\text{ mm}", MathOptions(missing_units="refuse"), "correct"),
        (r"50\%", "50", MathOptions(percent="value"), "wrong"),
        (r"50\%", "0.5", MathOptions(percent="value"), "correct"),
        (r"\pi", "3.14159", MathOptions(rounded_digits=0), "wrong"),
        (r"\pi", "3.14", MathOptions(rounded_digits=3), "correct"),
        ("0.333", r"\frac13", MathOptions(gold_digits=0), "wrong"),
        ("2.74", "2,74", MathOptions(decimal_comma=False), "wrong"),
        ("2.74", "2,74", MathOptions(), "correct"),
    ],
)
def test_options(gold, answer, options, status):
    assert equivalent(gold, answer, options).status == status


@pytest.mark.parametrize(
    ("field", "value"),
    [("percent", "maybe"), ("missing_units", True), ("rounded_digits", -1), ("gold_digits", "3"), ("decimal_comma", 1)],
)
def test_a_bad_option_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        MathOptions(**{field: value})


def test_the_side_that_cannot_be_read_is_said():
    assert equivalent(r"\frac{5", "5").status == "error"
    assert equivalent("5", r"\frac{5").status == "unparsable"
    assert equivalent("5", r"\left( 5 + \right)").status == "unparsable"
    assert equivalent("5", "").status == "unparsable"
    assert equivalent("5", "5" * 20_000).status == "unparsable"
