"""Objects used across a process border: plain values travel by value, anything else stays at home and is referred to.

Two sides talk over a `wire.Channel`: the program's and the tests'. What decides a test is always a plain value on the
tests' side (`references` says what a reference may be used for).
"""

from __future__ import annotations

import builtins
import copy
import operator
import types
from collections.abc import Callable
from typing import Any

from verifiers.code import wire
from verifiers.code.references import ARITHMETIC, Remote, RemoteCallable

# Where a name may come from that tests use and only the program imported.
SHARED_MODULES = [
    "bisect",
    "cmath",
    "collections",
    "copy",
    "datetime",
    "decimal",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "time",
    "typing",
]
_MAX_TEXT_CHARS = 500


class RemoteError(Exception):
    """Base of the exceptions that the other side raised and that are no built-in ones."""


def describe(exc: BaseException) -> dict[str, Any]:
    """An exception as plain values: the names of its type and bases, its text, and its arguments if they are plain."""
    names = [kind.__name__ for kind in type.mro(type(exc))]
    try:
        text = str(exc)[:_MAX_TEXT_CHARS]
    except BaseException as broken:  # noqa: BLE001  (its `__str__` is the program's code)
        text = f"<its message raised {type(broken).__name__}>"
    try:
        arguments = wire.encode(list(BaseException.args.__get__(exc)))  # type: ignore[attr-defined]
        if len(wire.to_json(arguments)) > 20 * _MAX_TEXT_CHARS:
            arguments = [text]
    except (wire.NotPlainError, ValueError):
        arguments = [text]
    return {"types": names, "text": text, "args": arguments}


def as_text(described: Any) -> str:
    """A described exception in one line."""
    try:
        return f"{described['types'][0]}: {described['text']}"[:_MAX_TEXT_CHARS]
    except (KeyError, IndexError, TypeError):
        return "an exception that was badly described"


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "delete": delattr,
    "item": lambda target, key: target[key],
    "set item": lambda target, key, value: target.__setitem__(key, value),
    "delete item": lambda target, key: target.__delitem__(key),
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "repr": repr,
    "isinstance": lambda target, value: isinstance(value, target),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "hash": hash,
    "neg": lambda target, _: -target,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda target, other: function(other, target)


for _sign, _name in ARITHMETIC.items():
    _function = getattr(operator, f"__{_name}__")
    _OPERATIONS |= {_sign: _function, f"r{_sign}": _reflected(_function)}


_OF_OBJECTS = frozenset({"set", "delete", "copy", "deepcopy", "hash", "neg", "==", "!=", "<", "<=", ">", ">="})
_OF_OBJECTS |= {prefix + sign for sign in ARITHMETIC for prefix in ("", "r")}


class ProgramSide:
    """What the tests may do with the program's objects: everything; and which names it defines."""

    def __init__(self, module: types.ModuleType, given: frozenset[str]) -> None:
        self._module = module
        self._given = given

    def check(self, target: Any, op: str, arguments: list[Any]) -> None:
        """The program has nothing to hide from its tests."""

    def names(self, asked: list[str], encode: Callable[[Any], Any]) -> dict[str, Any]:
        """How each name that the program defines is to be understood on the other side."""
        found = {name: vars(self._module)[name] for name in asked if name in vars(self._module)}
        return {name: self._meaning(name, value, encode) for name, value in found.items() if name not in self._given}

    def _meaning(self, name: str, value: Any, encode: Callable[[Any], Any]) -> Any:
        if type(value) is types.ModuleType:
            return {"module": value.__name__}
        home = getattr(value, "__module__", None)
        if home in SHARED_MODULES and vars(__import__(home)).get(name) is value:
            return {"from": home}
        return {"value": encode(value)}


class TestSide:
    """What a program may do with the objects that tests pass to it: call functions, walk iterators, read public fields.

    Anything else, names with an underscore first of all, would lead to the tests' variables.
    """

    __test__ = False

    def __init__(self, module_name: str) -> None:
        self._module_name = module_name

    def check(self, target: Any, op: str, arguments: list[Any]) -> None:
        """Raises TypeError if the program may not do that."""
        if op in ("get", "set", "delete") and str(arguments[0]).startswith("_"):
            raise TypeError(f"attribute {arguments[0]!r} of an object of the tests is private")
        if op == "get" and not self._is_own(target):
            raise TypeError(f"a {type(target).__name__} of the tests has no attributes here")
        if op in _OF_OBJECTS and not self._is_own(target):
            raise TypeError(f"a {type(target).__name__} of the tests allows no {op!r} from here")

    def _is_own(self, target: Any) -> bool:
        return not isinstance(target, type) and type(target).__module__ == self._module_name

    def names(self, asked: list[str], encode: Callable[[Any], Any]) -> dict[str, Any]:
        """The tests show no names."""
        raise TypeError("the names of the tests are not for the program")


class Endpoint:
    """One end: answers what the other asks while it waits for its own answers."""

    def __init__(self, channel: wire.Channel, side: ProgramSide | TestSide) -> None:
        self._channel = channel
        self._side = side
        self._exported: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._seen: dict[int, Any] = {}
        self.named_classes: set[int] = set()
        self.failure: Exception | None = None

    def note_class(self, value: Any) -> None:
        """Remember that `value`, if it is a class of the other side's, is one that this side names."""
        if isinstance(value, RemoteCallable):
            self.named_classes.add(value._Remote__number)  # type: ignore[attr-defined]

    def serve(self) -> None:
        """Answer until the other side closes the channel."""
        while True:
            try:
                message = self._channel.receive()
            except wire.ClosedError:
                return
            self._channel.send(self._answer(message))

    def ask(self, op: str, number: int, *arguments: Any) -> Any:
        """Have the other side do something with its object `number`; what it returns, or raises."""
        return self._result(self._exchange({"op": op, "on": number, "args": [self.encode(each) for each in arguments]}))

    def names(self, asked: list[str]) -> dict[str, Any]:
        """What the program's names stand for (`ProgramSide.names`), values still encoded."""
        reply = self._exchange({"op": "names", "on": 0, "args": asked})
        meanings = reply.get("ok")
        if not isinstance(meanings, dict):
            raise wire.NotPlainError("malformed: no names")
        return meanings

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the other side's object `number`; arguments that it changed are changed here too."""
        arguments = [self.encode(each) for each in args]
        named = {key: self.encode(value) for key, value in kwargs.items()}
        reply = self._exchange({"op": "call", "on": number, "args": arguments, "named": named})
        changed = reply.get("changed") or {}
        for place, data in changed.items():
            original = kwargs[place[1:]] if place.startswith("=") else args[int(place)]
            _update(original, self.decode(data))
        return self._result(reply)

    def encode(self, value: Any) -> Any:
        """The value for the wire."""
        return wire.encode(value, self._refer)

    def decode(self, data: Any) -> Any:
        """The value of what came over the wire."""
        return wire.decode(data, self._resolve)

    def _refer(self, value: Any) -> Any:
        if isinstance(value, Remote) and type(value) in (Remote, RemoteCallable):
            return {"y": value._Remote__number}  # type: ignore[attr-defined]
        if isinstance(value, types.ModuleType):
            raise wire.NotPlainError(f"module {value.__name__} can't be passed on")
        is_class = isinstance(value, type)
        bases = [kind.__name__ for kind in type.mro(value)] if is_class and issubclass(value, BaseException) else None
        kind = self._number(type(value)) if isinstance(self._side, ProgramSide) else None
        return {"h": [self._number(value), callable(value), bases, kind]}

    def _number(self, value: Any) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._exported)
            self._exported.append(value)
        return number

    def _resolve(self, data: Any) -> Any:
        if "y" in data:
            return self._exported[data["y"]]
        if "a" in data:
            return _array(*data["a"])
        if "h" not in data:
            raise wire.NotPlainError("malformed: unknown tag")
        number, is_callable, bases, kind = data["h"]
        if type(number) is not int or (kind is not None and type(kind) is not int):
            raise wire.NotPlainError("malformed: a reference")
        if number not in self._seen:
            if bases:
                self._seen[number] = _mirror(bases)
            else:
                self._seen[number] = (RemoteCallable if is_callable else Remote)(self, number, kind)
        return self._seen[number]

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send it and answer what is asked meanwhile; that the channel broke is remembered in `failure`."""
        self._channel.send(message)
        try:
            while True:
                reply = self._channel.receive()
                if not isinstance(reply, dict):
                    raise wire.NotPlainError("malformed: not an object")
                if "op" not in reply:
                    return reply
                self._channel.send(self._answer(reply))
        except (wire.ClosedError, wire.NotPlainError) as exc:
            self.failure = exc
            raise

    def _result(self, reply: dict[str, Any]) -> Any:
        if "raised" in reply:
            raise self._exception(reply["raised"])
        if "ok" not in reply:
            raise wire.NotPlainError("malformed: neither a result nor an exception")
        return self.decode(reply["ok"])

    def _exception(self, described: Any) -> BaseException:
        try:
            kind = _mirror(described["types"])
            arguments = wire.decode(described["args"])
            return kind(*arguments)
        except (wire.NotPlainError, KeyError, TypeError, ValueError, StopIteration):
            return RemoteError(as_text(described))

    def _answer(self, message: Any) -> dict[str, Any]:
        try:
            op, arguments = message["op"], message["args"]
            if op == "names":
                return {"ok": self._side.names(arguments, self.encode)}
            target = self._exported[message["on"]]
            if op == "call":
                return self._called(target, arguments, message["named"])
            values = [self.decode(each) for each in arguments]
            self._side.check(target, op, values)
            return {"ok": self.encode(_OPERATIONS[op](target, *values))}
        except BaseException as exc:  # noqa: BLE001  (raised again on the other side)
            return {"raised": describe(exc)}

    def _called(self, target: Any, arguments: list[Any], named: dict[str, Any]) -> dict[str, Any]:
        self._side.check(target, "call", [])
        args = [self.decode(each) for each in arguments]
        kwargs = {key: self.decode(value) for key, value in named.items()}
        reply: dict[str, Any] = {}
        try:
            reply["ok"] = self.encode(target(*args, **kwargs))
        except BaseException as exc:  # noqa: BLE001  (raised again on the other side)
            reply["raised"] = describe(exc)
        places = [(str(place), before, args[place]) for place, before in enumerate(arguments)]
        places += [(f"={key}", before, kwargs[key]) for key, before in named.items()]
        changed = {}
        for place, before, value in places:
            if isinstance(before, list) or (isinstance(before, dict) and not {"h", "y"} & before.keys()):
                after = self.encode(value)
                if wire.to_json(after) != wire.to_json(before):
                    changed[place] = after
        if changed:
            reply["changed"] = changed
        return reply


def _mirror(names: list[str]) -> type[BaseException]:
    """An exception class of ours for one of the other side, by the names of it and its bases."""
    own, *bases = names
    known = next(kind for name in names if isinstance(kind := getattr(builtins, name, None), type))
    if not issubclass(known, BaseException):
        raise TypeError("malformed: not an exception")
    if known.__name__ == own:
        return known
    key = (own, *bases)
    if key not in _mirrored:
        _mirrored[key] = type(own, (known,), {}) if known is not Exception else type(own, (RemoteError,), {})
    return _mirrored[key]


def _array(dtype: str, items: list[Any]) -> Any:
    """A numpy array, or its items where numpy is not to be had."""
    try:
        import numpy
    except ImportError:
        return items
    if numpy.dtype(dtype).kind not in "biufcU":
        raise wire.NotPlainError("malformed: an array")
    return numpy.array(wire.decode(items), dtype=None if dtype.startswith("<U") else dtype)


_mirrored: dict[tuple[str, ...], type[BaseException]] = {}


def _update(original: Any, new: Any) -> Any:
    """Give `original` the contents of `new`, in place as far as both are containers of one kind; what stands there now."""
    if type(original) is not type(new):
        return new
    if isinstance(original, list):
        kept = [_update(old, item) for old, item in zip(original, new, strict=False)]
        original[:] = kept + new[len(kept) :]
    elif isinstance(original, dict):
        merged = {key: _update(original[key], item) if key in original else item for key, item in new.items()}
        original.clear()
        original.update(merged)
    elif isinstance(original, set):
        original.clear()
        original.update(new)
    elif isinstance(original, bytearray):
        original[:] = new
    elif type(original) is tuple and len(original) == len(new):
        for old, item in zip(original, new, strict=True):
            _update(old, item)
        return original
    else:
        return new
    return original
