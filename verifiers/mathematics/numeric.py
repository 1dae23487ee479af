"""Numbers of any precision out of a tree: mpmath, bounded in magnitude before anything is evaluated."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any

from verifiers.mathematics.expr import Expr

MAX_EXPONENT_BITS = 10_000_000
MAX_ARGUMENT_BITS = 400
MAX_FOLD_TERMS = 1_000
MAX_STEPS = 30_000  # of one comparison, all its evaluations together
_FUNCTION_STEPS = 4
_LOCAL = threading.local()


class OutOfDomainError(ArithmeticError):
    """The expression has no value at this point (division by zero, a pole, a function of a set)."""


class TooBigError(ArithmeticError):
    """The value is beyond what is evaluated; the expression is compared by structure alone."""


def context() -> Any:
    """This thread's mpmath context: the library's global one is shared between threads."""
    if not hasattr(_LOCAL, "context"):
        from mpmath import MPContext

        _LOCAL.context = MPContext()
    return _LOCAL.context


def start_budget() -> None:
    """Give this thread's next comparison its steps; evaluation beyond them raises `TooBigError`."""
    _LOCAL.steps = MAX_STEPS


class Evaluator:
    """One evaluation: values of the variables, precision in digits, whether `\\log` is to base ten.

    With `real`, what leaves the real numbers on the way (the root of a negative number) is out of the domain.
    """

    def __init__(self, values: Mapping[str, Any], digits: int, *, log_ten: bool = False, real: bool = False) -> None:
        self.mp = context()
        self.mp.dps = digits
        self.values = dict(values)
        self.log_ten = log_ten
        self.real = real
        if not hasattr(_LOCAL, "steps"):
            start_budget()

    def __call__(self, expr: Expr) -> Any:
        """The value (real or complex); raises `OutOfDomainError` or `TooBigError`."""
        try:
            value = self.evaluate(expr)
        except (ZeroDivisionError, ValueError, TypeError, OverflowError, ArithmeticError) as exc:
            if isinstance(exc, TooBigError | OutOfDomainError):
                raise
            raise OutOfDomainError(str(exc)) from exc
        if self.mp.isnan(value):
            raise OutOfDomainError("not a number")
        return value

    def evaluate(self, expr: Expr) -> Any:
        _LOCAL.steps -= 1
        if _LOCAL.steps < 0:
            raise TooBigError("too many steps")
        rule = _RULES.get(expr.op)
        if rule is None:
            raise OutOfDomainError(f"a {expr.op} is no number")
        return rule(self, expr.args)

    def number(self, args: tuple[Any, ...]) -> Any:
        value = args[0]
        whole = self.mp.mpf(value.numerator)
        return whole if value.denominator == 1 else whole / value.denominator

    def variable(self, args: tuple[Any, ...]) -> Any:
        if args[0] not in self.values:
            raise OutOfDomainError(f"{args[0]} has no value")
        return self.values[args[0]]

    def constant(self, args: tuple[Any, ...]) -> Any:
        name = args[0]
        if name == "pi":
            return +self.mp.pi
        if name == "e":
            return +self.mp.e
        if name == "i":
            return self.mp.mpc(0, 1)
        return self.mp.inf

    def sum(self, args: tuple[Any, ...]) -> Any:
        total = self.evaluate(args[0])
        for part in args[1:]:
            total = total + self.evaluate(part)
        return total

    def product(self, args: tuple[Any, ...]) -> Any:
        total = self.evaluate(args[0])
        for part in args[1:]:
            total = total * self.evaluate(part)
        return total

    def inverse(self, args: tuple[Any, ...]) -> Any:
        value = self.evaluate(args[0])
        if value == 0 or self.mp.isinf(value):
            raise OutOfDomainError("division by zero or infinity")
        return 1 / value

    def bits(self, value: Any) -> int:
        """The binary exponent of |value|; 0 for zero."""
        if value == 0:
            return 0
        if not self.mp.isfinite(value):
            return MAX_EXPONENT_BITS * 2
        return int(self.mp.mag(value))

    def power(self, args: tuple[Any, ...]) -> Any:
        base, exponent = self.evaluate(args[0]), self.evaluate(args[1])
        if base == 0:
            if self.mp.re(exponent) <= 0:
                raise OutOfDomainError("zero to a power that is not positive")
            return base
        if not self.mp.isfinite(base) or not self.mp.isfinite(exponent):
            raise OutOfDomainError("a power of infinity")
        if self.bits(exponent) > 40:
            raise TooBigError("too large an exponent")
        # |log2 base| * |exponent| bounds the binary exponent of the result
        if (abs(self.bits(base)) + 1) * abs(exponent) > MAX_EXPONENT_BITS:
            raise TooBigError("too large a power")
        return self.in_domain(self.mp.power(base, exponent))

    def in_domain(self, value: Any) -> Any:
        if self.real and self.mp.im(value) != 0:
            raise OutOfDomainError("not real")
        return value

    def root(self, args: tuple[Any, ...]) -> Any:
        index, radicand = self.evaluate(args[0]), self.evaluate(args[1])
        if index == 2:
            return self.in_domain(self.mp.sqrt(radicand))
        if index == 0:
            raise OutOfDomainError("a zeroth root")
        if self.mp.im(radicand) == 0 and self.mp.re(radicand) < 0 and self.mp.isint(index) and int(index) % 2:
            return -self.mp.power(-radicand, 1 / index)
        return self.in_domain(self.mp.power(radicand, 1 / index))

    def factorial(self, args: tuple[Any, ...]) -> Any:
        value = self.evaluate(args[0])
        if abs(value) > 10**6:
            raise TooBigError("too large a factorial")
        return self.mp.factorial(value)

    def degrees(self, args: tuple[Any, ...]) -> Any:
        return self.evaluate(args[0]) * self.mp.pi / 180

    def fold(self, args: tuple[Any, ...]) -> Any:
        name, index, low, high, body = args
        first, last = self.evaluate(low), self.evaluate(high)
        if not (self.mp.isint(first) and self.mp.isint(last)):
            raise OutOfDomainError("the bounds are no integers")
        if last - first > MAX_FOLD_TERMS:
            raise TooBigError("too many terms")
        saved = self.values.get(index)
        total = self.mp.mpf(0 if name == "sum" else 1)
        for k in range(int(first), int(last) + 1):
            self.values[index] = self.mp.mpf(k)
            total = total + self.evaluate(body) if name == "sum" else total * self.evaluate(body)
        if saved is None:
            self.values.pop(index, None)
        else:
            self.values[index] = saved
        return total

    def ratio(self, args: tuple[Any, ...]) -> Any:
        total = self.evaluate(args[0])
        for part in args[1:]:
            total = total / self.evaluate(part)
        return total

    def function(self, args: tuple[Any, ...]) -> Any:
        name, *arguments = args
        _LOCAL.steps -= _FUNCTION_STEPS
        if name == "det":
            return self.determinant(arguments[0])
        values = [self.evaluate(part) for part in arguments]
        if name in {"max", "min", "gcd", "lcm"}:
            return self.extreme(name, values)
        rule = _FUNCTIONS.get(name)
        if rule is None:
            raise OutOfDomainError(f"{name} is not evaluated")
        if any(self.bits(value) > MAX_ARGUMENT_BITS for value in values) and name not in {"abs", "ln", "log", "lg"}:
            raise TooBigError(f"too large an argument of {name}")
        if name == "exp" and abs(values[0]) > MAX_EXPONENT_BITS:
            raise TooBigError("too large a power")
        if name == "log" and len(values) == 1 and self.log_ten:
            return self.in_domain(self.mp.log(values[0]) / self.mp.log(10))
        if name in {"log", "ln", "lg"} and any(value == 0 for value in values):
            raise OutOfDomainError("the logarithm of zero")
        return self.in_domain(rule(self.mp, *values))

    def extreme(self, name: str, values: list[Any]) -> Any:
        if any(self.mp.im(value) != 0 for value in values):
            raise OutOfDomainError("complex numbers have no order")
        if name in {"max", "min"}:
            return max(values) if name == "max" else min(values)
        raise OutOfDomainError(f"{name} is not evaluated")

    def determinant(self, matrix: Expr) -> Any:
        if matrix.op != "matrix":
            raise OutOfDomainError("the determinant of what is no matrix")
        rows = [[self.evaluate(cell) for cell in row.args] for row in matrix.args]
        if len(rows) != len(rows[0]) or len(rows) > 8:
            raise OutOfDomainError("no determinant")
        return self.mp.det(self.mp.matrix(rows))

    def piecewise(self, args: tuple[Any, ...]) -> Any:
        """The value of the first row whose condition holds."""
        for row in args:
            if len(row.args) != 2:
                raise OutOfDomainError("a row without a condition")
            value, condition = row.args
            if (condition.op == "text" and condition.args[0] in {"otherwise", "else"}) or self.holds(condition):
                return self.evaluate(value)
        raise OutOfDomainError("no row holds here")

    def holds(self, condition: Expr) -> bool:
        if condition.op != "rel" or any(relation not in _ORDERS for relation in condition.args[0]):
            raise OutOfDomainError("a condition that is no inequality")
        values = [self.evaluate(member) for member in condition.args[1:]]
        if any(self.mp.im(value) != 0 for value in values):
            raise OutOfDomainError("complex numbers have no order")
        pairs = zip(condition.args[0], values, values[1:], strict=False)
        return all(_ORDERS[relation](left, right) for relation, left, right in pairs)

    def call(self, args: tuple[Any, ...]) -> Any:
        """An unknown function: any fixed smooth function of its arguments that differs by name will do."""
        name, *arguments = args
        seed = (sum(ord(char) * (index + 3) for index, char in enumerate(name)) % 97) / 64 + 0.7
        total = self.mp.mpf(seed)
        for index, part in enumerate(arguments):
            value = self.evaluate(part)
            if self.bits(value) > 20:
                raise TooBigError("too large an argument")
            total = total + self.mp.sin(value * (index + seed)) + value / (index + 3)
        return total


def _binomial(mp: Any, above: Any, below: Any) -> Any:
    if abs(above) > 10**6 or abs(below) > 10**6:
        raise TooBigError("too large a binomial")
    return mp.binomial(above, below)


def _real(function: str) -> Callable[..., Any]:
    def apply(mp: Any, value: Any) -> Any:
        if mp.im(value) != 0:
            raise OutOfDomainError(f"{function} of a complex number")
        return getattr(mp, function)(mp.re(value))

    return apply


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda mp, x: abs(x),
    "ln": lambda mp, x: mp.log(x),
    "log": lambda mp, x, base=None: mp.log(x) if base is None else mp.log(x) / mp.log(base),
    "lg": lambda mp, x: mp.log(x) / mp.log(10),
    "exp": lambda mp, x: mp.exp(x),
    "floor": _real("floor"),
    "ceil": _real("ceil"),
    "sgn": _real("sign"),
    "sign": _real("sign"),
    "binom": _binomial,
    "Re": lambda mp, x: mp.re(x),
    "Im": lambda mp, x: mp.im(x),
    "arg": lambda mp, x: mp.arg(x),
    "arccot": lambda mp, x: mp.pi / 2 - mp.atan(x),
    "arcctg": lambda mp, x: mp.pi / 2 - mp.atan(x),
    "fac2": lambda mp, x: mp.fac2(x),
    "cis": lambda mp, x: mp.expj(x),
    "erf": lambda mp, x: mp.erf(x),
}
for _names, _target in (
    ("sin", "sin"), ("cos", "cos"), ("tan tg", "tan"), ("cot ctg", "cot"), ("sec", "sec"), ("csc cosec", "csc"),
    ("sinh", "sinh"), ("cosh", "cosh"), ("tanh", "tanh"), ("coth", "coth"), ("sech", "sech"), ("csch", "csch"),
    ("arcsin asin", "asin"), ("arccos acos", "acos"), ("arctan atan arctg", "atan"), ("arcsec", "asec"),
    ("arccsc", "acsc"), ("arcsinh asinh arsinh", "asinh"), ("arccosh acosh arcosh", "acosh"),
    ("arctanh atanh artanh", "atanh"),
):  # fmt: skip
    for _name in _names.split():
        _FUNCTIONS[_name] = lambda mp, x, target=_target: getattr(mp, target)(x)

_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq, "!=": operator.ne,
}  # fmt: skip
_RULES: dict[str, Callable[[Evaluator, tuple[Any, ...]], Any]] = {
    "num": Evaluator.number,
    "sym": Evaluator.variable,
    "const": Evaluator.constant,
    "add": Evaluator.sum,
    "mul": Evaluator.product,
    "inv": Evaluator.inverse,
    "pow": Evaluator.power,
    "root": Evaluator.root,
    "fact": Evaluator.factorial,
    "deg": Evaluator.degrees,
    "fold": Evaluator.fold,
    "ratio": Evaluator.ratio,
    "fn": Evaluator.function,
    "call": Evaluator.call,
    "cases": Evaluator.piecewise,
    "pct": lambda self, args: self.evaluate(args[0]) / 100,
    "based": lambda self, args: self.evaluate(args[0]),
    "arc": lambda self, args: self.evaluate(args[0]) * self.mp.pi / 180,
}
