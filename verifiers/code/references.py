"""What stands for an object of the other side: its attributes, items and iteration are fetched when they are used.

A reference is never equal to a plain value, takes part in no arithmetic that ends in one, and is compared with none: a
program can't answer "equal" or "close enough" for an object of its own. Two objects of classes that the tests name
(a task whose solution is a class) are compared, hashed and combined as their class says, on the program's side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verifiers.code.remote import Endpoint


class Remote:
    """A reference to an object of the other side, which knows it by `number` and its class by `kind`."""

    __slots__ = ("__endpoint", "__kind", "__number")

    def __init__(self, endpoint: Endpoint, number: int, kind: int | None) -> None:
        object.__setattr__(self, "_Remote__endpoint", endpoint)
        object.__setattr__(self, "_Remote__number", number)
        object.__setattr__(self, "_Remote__kind", kind)

    def __ask(self, op: str, *arguments: Any) -> Any:
        return self.__endpoint.ask(op, self.__number, *arguments)

    def __getattr__(self, name: str) -> Any:
        return self.__ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__ask("set", name, value)

    def __delattr__(self, name: str) -> None:
        self.__ask("delete", name)

    def __getitem__(self, key: Any) -> Any:
        return self.__ask("item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__ask("set item", key, value)

    def __delitem__(self, key: Any) -> None:
        self.__ask("delete item", key)

    def __iter__(self) -> Any:
        return self.__ask("iter")

    def __next__(self) -> Any:
        return self.__ask("next")

    def __contains__(self, value: Any) -> bool:
        return any(item is value or item == value for item in self)

    def __len__(self) -> int:
        return self.__ask("len")

    def __bool__(self) -> bool:
        return self.__ask("bool")

    def __int__(self) -> int:
        return self.__ask("int")

    def __float__(self) -> float:
        return self.__ask("float")

    def __str__(self) -> str:
        return self.__ask("str")

    def __repr__(self) -> str:
        return self.__ask("repr")

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(self.__ask("isinstance", value))

    def __copy__(self) -> Any:
        return self.__ask("copy")

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__ask("deepcopy")

    def __reduce__(self) -> Any:
        raise TypeError("an object of the program can't be pickled by its tests")

    def __is_named(self) -> bool:
        return self.__kind in self.__endpoint.named_classes

    def __hash__(self) -> int:
        return self.__ask("hash") if self.__is_named() else object.__hash__(self)

    def __compare(self, op: str, other: Any) -> Any:
        if not (isinstance(other, Remote) and self.__is_named() and other.__is_named()):
            return NotImplemented
        return bool(self.__ask(op, other))

    def __eq__(self, other: object) -> Any:
        return self.__compare("==", other)

    def __ne__(self, other: object) -> Any:
        return self.__compare("!=", other)

    def __lt__(self, other: Any) -> Any:
        return self.__compare("<", other)

    def __le__(self, other: Any) -> Any:
        return self.__compare("<=", other)

    def __gt__(self, other: Any) -> Any:
        return self.__compare(">", other)

    def __ge__(self, other: Any) -> Any:
        return self.__compare(">=", other)

    def __combine(self, op: str, other: Any) -> Any:
        """`self op other` (`op` of the form "r+": `other` + self); with a plain value it may only give an object."""
        if not self.__is_named():
            return NotImplemented
        result = self.__ask(op, other)
        if isinstance(result, Remote) or (isinstance(other, Remote) and other.__is_named()):
            return result
        return NotImplemented

    def __neg__(self) -> Any:
        return self.__combine("neg", None)


def _combination(op: str) -> Callable[[Remote, Any], Any]:
    return lambda self, other: self._Remote__combine(op, other)  # type: ignore[attr-defined]


ARITHMETIC = {"+": "add", "-": "sub", "*": "mul", "/": "truediv", "//": "floordiv", "%": "mod", "**": "pow"}
ARITHMETIC |= {"@": "matmul", "&": "and", "|": "or", "^": "xor"}
for _sign, _name in ARITHMETIC.items():
    setattr(Remote, f"__{_name}__", _combination(_sign))
    setattr(Remote, f"__r{_name}__", _combination(f"r{_sign}"))


class RemoteCallable(Remote):
    """A reference to something that can be called: arguments go by value, and lists, dicts and sets come back changed."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._Remote__endpoint.call(self._Remote__number, args, kwargs)  # type: ignore[attr-defined]
