"""Outputs line by line and values with their types: what is the same and what is not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.code.compare import as_json, same_output, same_value

NAN = float("nan")


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("9\n1\n", "9\n1\n", True),
        ("9\n1\n", "9\n1", True),
        ("9\n1", "9 \t\n1\n\n\n", True),
        ("9\r\n1\r\n", "9\n1\n", True),
        ("", "\n", True),
        ("9\n1\n", "9\n", False),
        ("9\n", "9\n1\n", False),
        ("9\n1\n", "9\n\n1\n", False),
        ("\n9\n", "9\n", False),
        ("a b\n", "a  b\n", False),
        ("9\n", " 9\n", False),
        ("Yes\n", "yes\n", False),
        ("0.5\n", "0.50\n", False),
        ("\nx", "", False),
    ],
)
def test_lines(expected, actual, same):
    assert same_output(expected, actual) is same


def test_other_rules_and_tolerance():
    assert same_output("a b\nc", "a  b c\n", "tokens")
    assert not same_output("a b c", "a b", "tokens")
    assert not same_output("a\n", "a", "exact")
    assert same_output("0.333333\n", "0.3333334\n", float_tolerance=1e-6)
    assert not same_output("0.333333\n", "0.334\n", float_tolerance=1e-6)
    assert not same_output("1000000000\n", "1000000001\n", float_tolerance=1e-6)  # integers stay exact
    assert not same_output("1.0 2.0\n", "1.0\n", float_tolerance=1e-6)
    assert not same_output("1.0\n", "nan\n", float_tolerance=1e-6)


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        (1, 1, True),
        (1, True, False),
        (True, 1, False),
        (1, 1.0, False),
        (1.0, 1, True),
        (1.0, True, False),
        (1, "1", False),
        ("1", 1, False),
        (None, None, True),
        (None, False, False),
        (0, None, False),
        ([1, 2], [1, 2], True),
        ([1, 2], [2, 1], False),
        ([1, 2], [1], False),
        ([1], 1, False),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (NAN, NAN, True),
        (NAN, 1.0, False),
        (float("inf"), float("inf"), True),
        (0.3, 0.1 + 0.2, False),
        (2.0, 10**400, False),
        (10**30, 10**30, True),
    ],
)
def test_values(expected, actual, same):
    assert same_value(expected, actual) is same


def test_value_tolerance_is_for_floats_only():
    assert same_value([0.3], [0.1 + 0.2], 1e-9)
    assert not same_value([3], [3.0000000001], 1e-6)


def test_values_as_json_carries_them():
    assert as_json((1, [(2,)])) == [1, [[2]]]
    assert as_json({7: "a", None: 2, True: 3, 1.5: 4}) == {"7": "a", "null": 2, "true": 3, "1.5": 4}
    for value in ({1}, b"x", 1j, range(3), object(), {(1, 2): 3}):
        with pytest.raises(ValueError, match="JSON"):
            as_json(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(JSON, JSON)
def test_a_value_is_itself_and_sameness_implies_equality(one, other):
    assert same_value(one, as_json(one))
    if same_value(one, other) and "nan" not in repr(one):
        assert one == other
