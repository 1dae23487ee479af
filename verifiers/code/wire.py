"""Plain Python values as JSON text and back, each with its exact type, between processes that do not trust each other.

A value is encoded by what it is underneath: a subclass of list by the items in it, whatever its methods say. Nothing
that is decoded can run code: numbers, texts and containers are built, the types of `TYPES` are found by name.
"""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import fractions
import json
import keyword
import math
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

MAX_FRAME_BYTES = 16 * 2**20
MAX_DEPTH = 150
_SMALL = 2**62
_HEADER = struct.Struct("!I")

TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, range, object)
}
TYPES["NoneType"] = type(None)
_NAMES = {kind: name for name, kind in TYPES.items()}
# Types that their own `repr`-like arguments rebuild: name -> (type, arguments of a value).
_REBUILT: dict[str, tuple[type, Callable[[Any], list[Any]]]] = {
    "Decimal": (decimal.Decimal, lambda value: [decimal.Decimal.__str__(value)]),
    "Fraction": (fractions.Fraction, lambda value: [value.numerator, value.denominator]),
    "date": (datetime.date, lambda value: [value.year, value.month, value.day]),
    "time": (datetime.time, lambda value: [value.hour, value.minute, value.second, value.microsecond]),
    "timedelta": (datetime.timedelta, lambda value: [value.days, value.seconds, value.microseconds]),
    "range": (range, lambda value: [value.start, value.stop, value.step]),
    "slice": (slice, lambda value: [value.start, value.stop, value.step]),
    "array": (array.array, lambda value: [value.typecode, value.tolist()]),
}
_REBUILT_BY_TYPE = {kind: name for name, (kind, _) in _REBUILT.items()}


class NotPlainError(ValueError):
    """The value, or something in it, has no plain form; or what came over the wire is malformed."""


class ClosedError(Exception):
    """The other side of a channel is gone."""


def encode(value: Any, refer: Callable[[Any], Any] | None = None, depth: int = 0) -> Any:
    """`value` in terms of JSON; what has no plain form goes through `refer`, or raises `NotPlainError`."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else {"i": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"f": repr(value)}
    if depth > MAX_DEPTH:
        raise NotPlainError(f"nested deeper than {MAX_DEPTH}")
    if issubclass(kind, (list, tuple, dict, set, frozenset, collections.deque)):
        return _encode_container(value, kind, refer, depth + 1)
    return _encode_other(value, kind, refer, depth)


def _encode_container(value: Any, kind: type, refer: Callable[[Any], Any] | None, depth: int) -> Any:
    if issubclass(kind, list):
        return [encode(item, refer, depth) for item in list.__iter__(value)]
    if issubclass(kind, tuple):
        items = [encode(item, refer, depth) for item in tuple.__iter__(value)]
        fields = type.__getattribute__(kind, "_fields") if "_fields" in kind.__dict__ else None
        if type(fields) is tuple and all(type(name) is str for name in fields):
            return {"n": [kind.__name__, list(fields), items]}
        return {"t": items}
    if issubclass(kind, dict):
        pairs = [[encode(key, refer, depth), encode(item, refer, depth)] for key, item in dict.items(value)]
        for base, tag in ((collections.Counter, "C"), (collections.OrderedDict, "O")):
            if issubclass(kind, base):
                return {tag: pairs}
        return {"d": pairs}
    if issubclass(kind, set):
        return {"s": [encode(item, refer, depth) for item in set.__iter__(value)]}
    if issubclass(kind, frozenset):
        return {"z": [encode(item, refer, depth) for item in frozenset.__iter__(value)]}
    return {"q": [encode(item, refer, depth) for item in collections.deque.__iter__(value)]}


def _encode_other(value: Any, kind: type, refer: Callable[[Any], Any] | None, depth: int) -> Any:
    if isinstance(value, type) and value in _NAMES:
        return {"T": _NAMES[value]}
    if value is Ellipsis or value is NotImplemented:
        return {"E": value is Ellipsis}
    if kind in _REBUILT_BY_TYPE:
        name = _REBUILT_BY_TYPE[kind]
        return {"x": [name, encode(_REBUILT[name][1](value), refer, depth + 1)]}
    if kind is datetime.datetime and value.tzinfo is None:
        return {"x": ["datetime", [*list(value.timetuple()[:6]), value.microsecond]]}
    for base, tag in ((str, ""), (int, ""), (float, ""), (bytes, "b"), (bytearray, "B"), (complex, "c")):
        if issubclass(kind, base):
            return _encode_scalar(value, base, tag)
    if kind.__module__ == "numpy" and hasattr(kind, "item") and getattr(value, "shape", None) == ():
        return encode(value.item(), refer, depth + 1)
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray" and value.dtype.kind in "biufcU":
        return {"a": [value.dtype.str, encode(value.tolist(), refer, depth + 1)]}
    if refer is None:
        raise NotPlainError(f"a value of type {kind.__name__} has no plain form")
    return refer(value)


def _encode_scalar(value: Any, base: type, tag: str) -> Any:
    if base is str:
        return str.__str__(value)
    if base is int:
        return encode(int.__add__(value, 0))
    if base is float:
        return encode(float.__add__(value, 0.0))
    if base is complex:
        return {tag: [encode(float(value.real)), encode(float(value.imag))]}
    return {tag: base.hex(value)}


def decode(data: Any, resolve: Callable[[Any], Any] | None = None) -> Any:
    """The value that `encode` saw; references go through `resolve`. Raises `NotPlainError` for anything malformed."""
    try:
        return _decode(data, resolve)
    except NotPlainError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as exc:
        raise NotPlainError(f"malformed: {type(exc).__name__}: {exc}") from exc


def _decode(data: Any, resolve: Callable[[Any], Any] | None) -> Any:
    if type(data) is list:
        return [_decode(item, resolve) for item in data]
    if type(data) is not dict:
        return data
    if len(data) != 1:
        raise NotPlainError("malformed: not one tag")
    ((tag, body),) = data.items()
    if tag in _CONTAINERS:
        return _CONTAINERS[tag]([_decode(item, resolve) for item in body])
    if tag in ("d", "O", "C"):
        pairs = [(_decode(key, resolve), _decode(item, resolve)) for key, item in body]
        if tag == "C":
            counter: collections.Counter[Any] = collections.Counter()
            dict.update(counter, pairs)
            return counter
        return dict(pairs) if tag == "d" else collections.OrderedDict(pairs)
    if tag in _SCALARS:
        return _SCALARS[tag](body)
    if tag == "n":
        return _namedtuple(body, resolve)
    if tag == "x":
        return _rebuild(body, resolve)
    if tag == "a" and resolve is None:  # an array is the list of its items to whoever compares plain values
        return _decode(body[1], None)
    if resolve is None:
        raise NotPlainError(f"malformed: tag {tag!r}")
    return resolve(data)


_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "t": tuple,
    "s": set,
    "z": frozenset,
    "q": collections.deque,
}
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "i": lambda text: int(text, 16),
    "f": float,
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "c": lambda parts: complex(*(_decode(part, None) for part in parts)),
    "T": TYPES.__getitem__,
    "E": lambda is_ellipsis: Ellipsis if is_ellipsis else NotImplemented,
}


def _namedtuple(body: Any, resolve: Callable[[Any], Any] | None) -> Any:
    name, fields, items = body
    good = all(part.isidentifier() and not keyword.iskeyword(part) for part in (name, *fields))
    values = [_decode(item, resolve) for item in items]
    if not good or len(fields) > 100 or len(fields) != len(values) or any(field.startswith("_") for field in fields):
        return tuple(values)
    return collections.namedtuple(name, fields)(*values)


def _rebuild(body: Any, resolve: Callable[[Any], Any] | None) -> Any:
    name, arguments = body
    kind = datetime.datetime if name == "datetime" else _REBUILT[name][0]
    return kind(*_decode(arguments, resolve))


def to_json(value: Any) -> bytes:
    """JSON in ASCII, as short as it gets."""
    return json.dumps(value, separators=(",", ":")).encode()


class Channel:
    """Messages (JSON values) over a stream socket, each after its length."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._end: float | None = None

    def expect_within(self, seconds: float) -> None:
        """Let all that follows take this long together; after that `send` and `receive` raise TimeoutError."""
        self._end = time.monotonic() + seconds

    def _set_timeout(self) -> None:
        if self._end is not None:
            left = self._end - time.monotonic()
            if left <= 0:
                raise TimeoutError("the time for an answer is over")
            self.connection.settimeout(left)

    def send(self, message: Any) -> None:
        """Send one message; raises `ClosedError`, `NotPlainError` if it is too long, TimeoutError."""
        data = to_json(message)
        if len(data) > MAX_FRAME_BYTES:
            raise NotPlainError(f"a message of {len(data)} bytes is longer than {MAX_FRAME_BYTES}")
        self._set_timeout()
        try:
            self.connection.sendall(_HEADER.pack(len(data)) + data)
        except ConnectionError as exc:
            raise ClosedError("the other side has closed the channel") from exc

    def receive(self) -> Any:
        """The next message; raises `ClosedError` at the end, `NotPlainError` for garbage, TimeoutError."""
        (length,) = _HEADER.unpack(self._exactly(_HEADER.size))
        if length > MAX_FRAME_BYTES:
            raise NotPlainError(f"a message of {length} bytes is longer than {MAX_FRAME_BYTES}")
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError) as exc:
            raise NotPlainError(f"not JSON: {exc}") from exc

    def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            self._set_timeout()
            try:
                part = self.connection.recv(min(length - len(parts), 2**20))
            except ConnectionError:
                part = b""
            if not part:
                raise ClosedError("the other side has closed the channel")
            parts += part
        return bytes(parts)
