"""What `audit_gold` says of gold answers."""

import pytest

from verifiers.mathematics.audit import audit_gold, gold_text


@pytest.mark.parametrize(
    ("gold", "status"),
    [
        (r"\frac12", "ok"), (r"\boxed{\frac12}", "ok"), (r"$x<3$", "ok"), (r"\text{even}", "ok"), ("5", "ok"),
        (5, "ok"), (0.5, "ok"),
        (r"\{m \mid m \lt 3\}", "ok"), (r"1-\frac{1}{\mathrm{e}}", "ok"), ("1,234", "ok"), (r"f(x)=x^2 \text{ for all } x", "ok"),
        (None, "missing"), ("", "missing"), ("  ", "missing"), (True, "missing"), ([1], "missing"),
        (r"\frac{1}{2", "embedded_number"), (r"90^", "embedded_number"), (r"\text{the 7 dwarfs}", "embedded_number"),
        (r"\frac{a}{", "unparsable"), ("???", "unparsable"),
        ("100,200,300", "ambiguous"),
    ],
)  # fmt: skip
def test_status(gold, status):
    assert audit_gold(gold).status == status


def test_the_reading_is_shown():
    assert audit_gold(r"\boxed{$\frac12$}").parsed == r"\frac12"
    assert audit_gold(r"\frac{1}{2").parsed is None


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("#### 42", "42"),
        ("work #### 1,200", "1,200"),
        (r"so $x=\boxed{3}$.", "3"),
        (7, "7"),
        (0.25, "0.25"),
        (None, None),
    ],
)
def test_gold_text(gold, text):
    assert gold_text(gold) == text
