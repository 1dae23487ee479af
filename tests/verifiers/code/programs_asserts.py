"""Programs for assert-style tests, many styles and many tricks, with whether each should pass."""

# ruff: noqa: E501  (programs, as texts)

from __future__ import annotations

from typing import Any


def _asserts(code: str, entry: str | None = "f") -> dict[str, Any]:
    return {"mode": "asserts", "test_code": code, "entry_point": entry}


SAME = _asserts("def check(candidate):\n    assert candidate(3) == 3\n    assert candidate([1, 2]) == [1, 2]\n")
CLOSE = _asserts(
    "import math\nassert math.isclose(f(2), 2 ** 0.5, rel_tol=1e-9)\nassert abs(f(9) - 3) < 1e-6\nassert round(f(4), 2) == 2.0",
    None,
)
ORDER = _asserts(
    "assert set(f([3, 1, 3])) == {1, 3}\nassert sorted(f([2, 1])) == [1, 2]\nassert len(f([])) == 0 and 3 in f([3])",
    None,
)
SETS = _asserts(
    "def set_equal(a, b):\n    return set(map(tuple, a)) == set(map(tuple, b))\ndef check(candidate):\n    assert set_equal(candidate([1, 2]), [[2], [1]])\n    assert not set_equal(candidate([1]), [[2]])\n"
)
RAISES = _asserts(
    "try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False, 'no error'\nassert f(1) == 1"
)
RAISES_ONLY = _asserts(
    "for bad in (-1, -2):\n    try:\n        f(bad)\n        raised = False\n    except Exception:\n        raised = True\n    assert raised"
)
RANDOM = _asserts(
    "import random\nrandom.seed(0)\nfor _ in range(50):\n    xs = [random.randint(-9, 9) for _ in range(random.randint(0, 9))]\n    assert f(list(xs)) == sorted(xs), xs\n    assert f(xs[::-1]) == sorted(xs)",
    "f",
)
UNITTEST = _asserts(
    "import unittest\nclass TestF(unittest.TestCase):\n    def setUp(self): self.x = 3\n    def test_value(self): self.assertEqual(f(self.x), 3)\n    def test_list(self): self.assertListEqual(f([1]), [1])\n    def test_error(self):\n        with self.assertRaises(ValueError): f(-1)\nif __name__ == '__main__':\n    unittest.main()"
)
UNBOUND_MATH = _asserts("assert math.isclose(f(2), 4.0)\nassert Counter(str(f(2))) == Counter('4')", "f")
UNBOUND_ONE = _asserts("assert math.isclose(f(2), 4.5)", "f")
TRUTH = _asserts("assert f(2)\nassert not f(3)\nassert f(4) == True\nassert f(5) is False", "f")
PAIR = _asserts(
    "a = Pair(1, 2)\nassert f([a, Pair(0, 5)]) == 5\nassert a.x == 1 and a == Pair(1, 2) and a != Pair(2, 1)", "f"
)
VECTOR = _asserts(
    "v = Vector(1, 2)\nassert v + Vector(3, 4) == Vector(4, 6)\nassert v != Vector(1, 1)\nassert str(v) == '(1, 2)' and v.x == 1\nassert len({v, Vector(1, 2)}) == 1\nassert sorted([Vector(2, 0), v])[0] is v",
    None,
)
SHIFT = _asserts(
    "def check(candidate):\n    for s in ('abc', 'xyz', ''):\n        assert candidate(encode(s)) == s\n", "decode"
)
SHIFT_PROMPT = 'def encode(s):\n    return \'\'.join(chr((ord(c) - 97 + 5) % 26 + 97) for c in s)\n\n\ndef decode(s):\n    """The inverse of encode."""\n'
NAN = _asserts("assert f(0) != f(0)\nassert math.isnan(f(0))", "f")
ARRAY = _asserts(
    "import numpy as np\nassert np.allclose(f(2), np.eye(2))\nassert f(2).shape == (2, 2)\nassert (f(1) == 1).all()",
    "f",
)
OUTPUT = _asserts("assert f(2) == {'a': (1, 2.5), 'b': {1, 2}, 'c': None, 'd': [frozenset({1}), b'x', 1j]}", "f")
SUB = _asserts(
    "assert type(f(1)) is int\nassert isinstance(f(1), int) and not isinstance(f(1), bool)\nassert f(1) == 1", "f"
)
GENERATOR = _asserts("assert list(f(3)) == [0, 1, 2]\nassert [x for x in f(2)] == [0, 1]\nassert sum(f(4)) == 6", "f")
CLASS = _asserts(
    "s = Stack()\ns.push(1); s.push(2)\nassert s.pop() == 2 and len(s) == 1 and not s.is_empty()\nassert list(s) == [1] and s.items == [1] and 1 in s\nwith_error = False\ntry:\n    s.pop(); s.pop()\nexcept IndexError:\n    with_error = True\nassert with_error",
    None,
)
MATCH = _asserts("assert f('ab1')\nassert not f('ab')", "f")
TIME = _asserts(
    "import datetime\nassert f(2020) == datetime.date(2020, 1, 1)\nassert f(2021) - f(2020) == datetime.timedelta(days=366)",
    "f",
)
DEEP = _asserts("assert f(100) == 100", "f")

_SAME = "def f(x):\n    return x\n"
HONEST: dict[str, tuple[str, dict[str, Any]]] = {
    "check": (_SAME, SAME),
    "root": ("import math\ndef f(x):\n    return math.sqrt(x)", CLOSE),
    "root by numpy": ("import numpy as np\ndef f(x):\n    return np.sqrt(x)", CLOSE),
    "root as a fraction of integers": ("from fractions import Fraction\ndef f(x):\n    return float(Fraction(x ** 0.5))", CLOSE),
    "list": ("def f(a): return list(dict.fromkeys(a))", ORDER),
    "set": ("def f(a): return set(a)", ORDER),
    "tuple": ("def f(a): return tuple(a)", ORDER),
    "frozenset": ("def f(a): return frozenset(a)", ORDER),
    "keys as a list": ("def f(a): return list({x: 1 for x in a}.keys())", ORDER),
    "dict keys": ("def f(a): return {x: 1 for x in a}.keys()", ORDER),
    "Counter": ("from collections import Counter\ndef f(a): return Counter(a)", ORDER),
    "helper of the tests": ("def f(a): return [[x] for x in a]", SETS),
    "error": ("def f(x):\n    if x < 0: raise ValueError('negative')\n    return x", RAISES),
    "error of its own": ("class NegativeError(ValueError): pass\ndef f(x):\n    if x < 0: raise NegativeError('negative', x)\n    return x", RAISES),
    "error from another": ("def f(x):\n    try:\n        if x < 0: {}[x]\n    except KeyError as e:\n        raise ValueError from e\n    return x", RAISES),
    "error by assert": ("def f(x):\n    assert x > 0\n    return x", RAISES_ONLY),
    "random input": ("def f(a):\n    return sorted(a)", RANDOM),
    "random input, own sort": ("def f(a):\n    if len(a) < 2: return a\n    p, *r = a\n    return f([x for x in r if x < p]) + [p] + f([x for x in r if x >= p])", RANDOM),
    "random input, in place": ("def f(a):\n    a.sort()\n    return a", RANDOM),
    "unittest with main": ("def f(x):\n    if x == -1: raise ValueError\n    return x", UNITTEST),
    "modules that only the program imports": ("import math\nfrom collections import Counter\ndef f(x): return x * x", UNBOUND_MATH),
    "modules under other names": ("import math as m\ndef f(x): return x * x\nfrom collections import *", UNBOUND_MATH),
    "truth": ("def f(n): return n % 2 == 0", TRUTH),
    "match object": ("import re\ndef f(s): return re.search(r'\\d', s)", MATCH),
    "class": ("class Pair:\n    def __init__(self, x, y): self.x, self.y = x, y\n    def __eq__(self, o): return (self.x, self.y) == (o.x, o.y)\ndef f(ps): return max(p.y for p in ps)", PAIR),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass Pair:\n    x: int\n    y: int\ndef f(ps): return max(p.y for p in ps)", PAIR),
    "named tuple": ("from typing import NamedTuple\nclass Pair(NamedTuple):\n    x: int\n    y: int\ndef f(ps): return max(p.y for p in ps)", PAIR),
    "operators": ("import functools\n@functools.total_ordering\nclass Vector:\n    def __init__(self, x, y): self.x, self.y = x, y\n    def __add__(self, o): return Vector(self.x + o.x, self.y + o.y)\n    def __eq__(self, o): return (self.x, self.y) == (o.x, o.y)\n    def __lt__(self, o): return (self.x, self.y) < (o.x, o.y)\n    def __hash__(self): return hash((self.x, self.y))\n    def __str__(self): return f'({self.x}, {self.y})'", VECTOR),
    "ordered dataclass": ("from dataclasses import dataclass\n@dataclass(frozen=True, order=True)\nclass Vector:\n    x: int\n    y: int\n    def __add__(self, o): return Vector(self.x + o.x, self.y + o.y)\n    def __str__(self): return f'({self.x}, {self.y})'", VECTOR),
    "helper of the program": (SHIFT_PROMPT + "    return ''.join(chr((ord(c) - 97 - 5) % 26 + 97) for c in s)", SHIFT),
    "not a number": ("def f(x): return float('nan')", NAN),
    "numpy array": ("import numpy as np\ndef f(n): return np.eye(n)", ARRAY),
    "all kinds of values": ("def f(x): return {'a': (1, 2.5), 'b': {1, 2}, 'c': None, 'd': [frozenset({1}), b'x', 1j]}", OUTPUT),
    "exact types": (_SAME, SUB),
    "generator": ("def f(n):\n    for i in range(n): yield i", GENERATOR),
    "range": ("def f(n): return range(n)", GENERATOR),
    "map": ("def f(n): return map(int, range(n))", GENERATOR),
    "iterator class": ("class It:\n    def __init__(self, n): self.i, self.n = -1, n\n    def __iter__(self): return self\n    def __next__(self):\n        self.i += 1\n        if self.i >= self.n: raise StopIteration\n        return self.i\ndef f(n): return It(n)", GENERATOR),
    "stack": ("class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n    def is_empty(self): return not self.items\n    def __len__(self): return len(self.items)\n    def __iter__(self): return iter(self.items)", CLASS),
    "dates": ("import datetime\ndef f(y): return datetime.date(y, 1, 1)", TIME),
    "prints": ("def f(x):\n    print('debug', x)\n    return x", SAME),
    "threads": ("import threading, time\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()\ndef f(x): return x", SAME),
    "recursion": ("import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return n if n == 0 else 1 + f(n - 1)", DEEP),
    "main guard": (_SAME + "if __name__ == '__main__':\n    print(f(input()))", SAME),
    "own tests at the end": (_SAME + "def check(candidate):\n    assert candidate(1) == 1\ncheck(f)\nassert f(2) == 2", SAME),
    "int subclass": ("import enum\nclass E(enum.IntEnum):\n    A = 3\ndef f(x): return E.A if x == 3 else x", SAME),
    "async inside": ("import asyncio\nasync def g(x): return x\ndef f(x): return asyncio.run(g(x))", SAME),
}  # fmt: skip

_PROXY = """
class Meta(type):
    __eq__ = __instancecheck__ = __subclasscheck__ = lambda *a: True
    __hash__ = lambda s: 0
class Proxy(metaclass=Meta):
    def __init__(self, *a, **k): pass
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = lambda *a: True
    __hash__ = lambda s: 0
    __len__ = lambda s: 2
    __iter__ = lambda s: iter([s, s])
    __getitem__ = __getattr__ = __call__ = lambda s, *a, **k: s
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __mod__ = __rmod__ = lambda s, o=0: s
    __pow__ = __rpow__ = __floordiv__ = __neg__ = __pos__ = __abs__ = __round__ = __trunc__ = __and__ = __or__ = lambda s, *o: s
    __class__ = property(lambda s: list)
    __repr__ = __str__ = lambda s: '3'
    __int__ = __index__ = lambda s: 3
    __float__ = lambda s: 3.0
"""
_FLIP = (
    "class Flip:\n    n = 0\n    def __bool__(s): Flip.n += 1; return Flip.n % 2 == 1\n    __eq__ = lambda s, o: True\n"
)
_EVERYWHERE = ("same", SAME), ("close", CLOSE), ("order", ORDER), ("sets", SETS), ("raises", RAISES), ("random", RANDOM), ("unittest", UNITTEST), ("unbound", UNBOUND_ONE), ("truth", TRUTH), ("array", ARRAY), ("values", OUTPUT), ("types", SUB), ("date", TIME), ("match", MATCH)  # fmt: skip
_TRICKS = {
    "proxy": _PROXY + "def f(*a): return Proxy()",
    "list of proxies": _PROXY
    + "class L(list):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\ndef f(*a): return L([Proxy(), Proxy()])",
    "leaves": "import os\ndef f(*a): os._exit(0)",
    "SystemExit": "def f(*a): raise SystemExit(0)",
    "KeyboardInterrupt": "def f(*a): raise KeyboardInterrupt",
    "GeneratorExit": "def f(*a): raise GeneratorExit",
    "AssertionError": "class E(AssertionError): pass\ndef f(*a): raise E",
    "StopIteration": "def f(*a): raise StopIteration",
    "skip": "import unittest\ndef f(*a): raise unittest.SkipTest('x')",
    "closes the channel": "import os\ndef f(*a): os.close(3)",
    "garbage on the channel": "import os\ndef f(*a): os.write(3, b'\\0\\0\\0\\x02{}' * 100)",
    "ok on the channel": "import os\ndef f(*a): os.write(3, b'\\0\\0\\0\\x0b{\"ok\":true} ' * 100)",
    "outcome on the channel": 'import os\nt = b\'{"outcome":"passed","passed":1,"total":1}\'\ndef f(*a): os.write(3, len(t).to_bytes(4, \'big\') + t)',
    "patched modules": "import math, builtins, unittest, sys, operator\nmath.isclose = builtins.abs = builtins.sorted = builtins.len = builtins.set = builtins.round = lambda *a, **k: 3\nunittest.TestCase.assertEqual = unittest.TestCase.assertListEqual = lambda *a: None\nsys.modules['numpy'] = None\ndef f(*a): return 0",
    "names of the tests": "class math:\n    isclose = isnan = staticmethod(lambda *a, **k: True)\ndef check(c): pass\ndef set_equal(*a): return True\ndef abs(x): return 0\ndef sorted(x): return [1, 2]\ndef len(x): return 0\ndef round(*a): return 2.0\ndef Counter(x): return 1\nclass np:\n    allclose = staticmethod(lambda *a: True)\ndef isinstance(*a): return True\ndef f(*a): return 4.0",
    "exits while being imported": "import sys\nsys.exit(0)",
    "exits at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(*a): return 0",
    "None": "def f(*a): pass",
    "itself": "def f(*a): return f",
    "its class": "class f:\n    def __init__(s, *a): pass\n    __eq__ = lambda s, o: True",
    "a metaclass": _PROXY + "class f(Proxy): pass",
    "flips": _FLIP + "def f(*a): return Flip()",
    "not there": "def g(x): return x",
    "empty": "",
    "lets an exception class be equal": "class M(type):\n    __eq__ = lambda *a: True\n    __hash__ = lambda s: 0\nclass E(Exception, metaclass=M): pass\ndef f(*a): return E",
    "recursion": "def f(*a): return f(*a)",
    "calls the tests back": "def f(x, *a):\n    try: return x.__class__.__eq__.__globals__\n    except BaseException: return x\n    finally: raise AssertionError",
}
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    f"{trick} / {test}": (source, answer)
    for place, (trick, source) in enumerate(_TRICKS.items())
    for number, (test, answer) in enumerate(_EVERYWHERE)
    if (place + number) % 3 == 0 and (trick, test) not in {("flips", "match")}  # f(s) is an object that is true, then one that is not, as the tests want
} | {
    "leaves where any error is due": ("import os\ndef f(x): os._exit(0)", RAISES_ONLY),
    "closes where any error is due": ("import os\ndef f(x): os.close(3); raise ValueError", RAISES_ONLY),
    "proxy where any error is due": (_PROXY + "def f(x): return Proxy()", RAISES_ONLY),
    "another error": ("def f(x):\n    if x < 0: raise TypeError\n    return x", RAISES),
    "an error that claims to be one": ("class E(Exception):\n    __class__ = ValueError\ndef f(x):\n    if x < 0: raise E\n    return x", RAISES),
    "True for 1": ("def f(x): return True", SUB),
    "1.0 for 1": ("def f(x): return 1.0", SUB),
    "1 for True": ("def f(n): return int(n % 2 == 0)", TRUTH),
    "a list for a tuple": ("def f(x): return {'a': [1, 2.5], 'b': {1, 2}, 'c': None, 'd': [frozenset({1}), b'x', 1j]}", OUTPUT),
    "a list for a set": ("def f(x): return {'a': (1, 2.5), 'b': [1, 2], 'c': None, 'd': [frozenset({1}), b'x', 1j]}", OUTPUT),
    "always equal pairs": ("class Pair:\n    def __init__(s, x, y): s.x, s.y = 1, y\n    __eq__ = __ne__ = lambda s, o: True\ndef f(ps): return 0", PAIR),
    "dataclass that compares its own way": ("from dataclasses import dataclass\n@dataclass(eq=False)\nclass Pair:\n    x: int\n    y: int\ndef f(ps): return max(p.y for p in ps)", PAIR),
    "generator cut short": ("def f(n):\n    for i in range(n - 1): yield i", GENERATOR),
    "generator without end": ("def f(n):\n    while True: yield n", GENERATOR),
    "stack that forgets": ("class Stack:\n    items = [1]\n    def push(s, x): pass\n    def pop(s): return 2\n    def is_empty(s): return False\n    __len__ = lambda s: 1\n    __iter__ = lambda s: iter([1])", CLASS),
    "nearly the root": ("def f(x): return x ** 0.5 + 1e-3", CLOSE),
    "root as text": ("def f(x): return str(x ** 0.5)", CLOSE),
    "unsorted": ("def f(a): return a", RANDOM),
    "nan everywhere": ("def f(*a): return float('nan')", CLOSE),
    "infinite": ("def f(*a): return float('inf')", CLOSE),
    "array of the wrong shape": ("import numpy as np\ndef f(n): return np.ones(n)", ARRAY),
    "array that equals all": ("import numpy as np\nclass A(np.ndarray):\n    shape = (2, 2)\n    __eq__ = lambda s, o: np.array(True)\n    __array__ = lambda s, *a: np.eye(2)\n    tolist = lambda s: np.eye(2)\ndef f(n): return np.zeros((n, n)).view(A)", ARRAY),
}  # fmt: skip
