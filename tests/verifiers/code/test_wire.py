"""Values over the wire: what goes in comes out with its type, whatever methods it claims to have, and junk is refused."""

import collections
import datetime
import decimal
import enum
import fractions
import json
import math
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.code import wire

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


def through(value):
    return wire.decode(json.loads(wire.to_json(wire.encode(value))))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(PLAIN)
def test_round_trip_keeps_value_and_types(value):
    assert repr(through(value)) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        frozenset({1}),
        collections.deque([1, 2]),
        collections.Counter("aab"),
        collections.OrderedDict([(2, 1), (1, 2)]),
        datetime.date(2020, 1, 2),
        datetime.datetime(2020, 1, 2, 3, 4, 5, 6),
        datetime.timedelta(days=1, seconds=2),
        range(1, 9, 2),
        bytearray(b"x"),
        math.inf,
        1 << 20_000,
        int,
        ...,
        "\ud800",
        decimal.Decimal("0.10"),
        fractions.Fraction(1, 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_types(value):
    back = through(value)
    assert (type(back), back) == (type(value), value)


def test_nan_and_negative_zero():
    assert math.isnan(through(math.nan))
    assert math.copysign(1, through(-0.0)) == -1


def test_a_subclass_goes_by_what_is_in_it():
    class Liar(list):
        def __eq__(self, other):
            return True

        def __iter__(self):
            return iter([9, 1])

        __hash__ = None

    class Color(enum.IntEnum):
        RED = 3

    class Text(str):
        __slots__ = ()

        def __str__(self):
            return "other"

    assert through(Liar([1])) == [1]
    assert type(through(Liar([1]))) is list
    assert type(through(Color.RED)) is int
    assert (through(Text("a")), type(through(Text("a")))) == ("a", str)


def test_a_named_tuple_keeps_its_fields():
    Point = collections.namedtuple("Point", "x y")
    back = through(Point(1, [2]))
    assert (back.x, back.y, back) == (1, [2], (1, [2]))


@pytest.mark.parametrize("value", [object(), print, (x for x in ()), [object()]])
def test_what_has_no_plain_form(value):
    with pytest.raises(wire.NotPlainError, match="plain form"):
        wire.encode(value)


def test_cycles_and_depth_are_refused():
    cycle = []
    cycle.append(cycle)
    with pytest.raises(wire.NotPlainError, match="nested"):
        wire.encode(cycle)


@pytest.mark.parametrize(
    "data",
    [{"i": "zz"}, {"?": 1}, {"i": "1", "f": "2"}, {}, {"d": [1]}, {"s": [[1]]}, {"x": ["os", []]}, {"T": "os"}, {"b": 3},
     {"c": ["x"]}, {"n": ["x"]}, {"f": []}, {"h": [0, True, None]}],
)  # fmt: skip
def test_malformed_data_is_refused(data):
    with pytest.raises(wire.NotPlainError):
        wire.decode(data)


def test_channel_refuses_long_and_broken_messages_and_times_out():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = wire.Channel(ours)
        theirs.sendall(struct.pack("!I", wire.MAX_FRAME_BYTES + 1))
        with pytest.raises(wire.NotPlainError, match="longer"):
            channel.receive()
        theirs.sendall(struct.pack("!I", 3) + b"{x}")
        with pytest.raises(wire.NotPlainError, match="not JSON"):
            channel.receive()
        theirs.sendall(b"\0")
        channel.expect_within(0.05)
        with pytest.raises(TimeoutError):
            channel.receive()


def test_the_time_of_a_channel_is_one_for_all_its_pieces():
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def dribble():
        theirs.sendall(struct.pack("!I", 1000))
        while not stop.wait(0.02):
            theirs.sendall(b" ")

    thread = threading.Thread(target=dribble)
    thread.start()
    channel = wire.Channel(ours)
    channel.expect_within(0.3)
    with pytest.raises(TimeoutError):
        channel.receive()
    stop.set()
    thread.join()
    ours.close()
    with pytest.raises(wire.ClosedError):
        wire.Channel(theirs).receive()
    theirs.close()
