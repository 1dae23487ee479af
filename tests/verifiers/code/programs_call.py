"""Programs for tests by calls, many styles and many tricks, with whether each should pass."""

# ruff: noqa: E501  (programs, as texts)

from __future__ import annotations

from typing import Any


def _call(name: str, *tests: tuple[Any, Any]) -> dict[str, Any]:
    return {"mode": "call", "fn_name": name, "tests": [{"args": args, "expected": value} for args, value in tests]}


SQ = _call("sq", ([3], [9, 1]), ([4], [16, 2]))
TWO_SUM = _call("twoSum", ([[2, 7, 11], 9], [0, 1]), ([[3, 3], 6], [0, 1]))
MAYBE = _call("find", ([[1, 2], 2], 1), ([[1, 2], 5], None))
FLAG = _call("even", ([2], True), ([3], False))
RATIO = _call("half", ([1], 0.5), ([4], 2.0))
ONE = _call("one", ([], 1))
ZERO = _call("zero", ([], 0.0))
TEXT = _call("name", (["é漢😀\ud800"], "é漢😀\ud800"), ([""], ""))
TABLE = _call("table", ([["a", "b", "a"]], {"a": 2, "b": 1}))
BIG = _call("big", ([5000], 10**5000))
NESTED = _call("rows", ([2], [[0, 0], [0, 1]]))

HONEST: dict[str, tuple[str, dict[str, Any]]] = {
    "function": ("def sq(n):\n    return [n * n, n - 2]", SQ),
    "tuple": ("def sq(n):\n    return n * n, n - 2", SQ),
    "Solution with typing unimported": ("class Solution:\n    def twoSum(self, nums: List[int], target: int) -> Optional[List[int]]:\n        seen: Dict[int, int] = defaultdict(int)\n        seen.clear()\n        for i, x in enumerate(nums):\n            if target - x in seen: return [seen[target - x], i]\n            seen[x] = i", TWO_SUM),
    "Solution with helper methods": ("class Solution:\n    memo = {}\n    def twoSum(self, nums, target):\n        return self.search(nums, target)\n    def search(self, nums, target):\n        return next([i, j] for i in range(len(nums)) for j in range(i + 1, len(nums)) if nums[i] + nums[j] == target)", TWO_SUM),
    "Solution that inherits": ("class Base:\n    def twoSum(self, nums, target): return [0, 1]\nclass Solution(Base): pass", TWO_SUM),
    "Solution with cached method": ("class Solution:\n    @lru_cache(None)\n    def sq(self, n): return [n * n, n - 2]", SQ),
    "Solution with class method": ("class Solution:\n    @classmethod\n    def sq(cls, n): return [n * n, n - 2]", SQ),
    "function beside Solution": ("class Solution: pass\ndef sq(n): return [n * n, n - 2]", SQ),
    "judge's imports": ("def sq(n):\n    q = deque([n]); h = []; heappush(h, n)\n    return [int(sqrt(n ** 4)), sum(accumulate([n, -2])) - n + bisect_left([1, 2], 0) * 0 + math.gcd(0, 0)]", SQ),
    "imports of its own": ("from typing import List, Tuple\nimport math\nfrom functools import cache\n@cache\ndef f(n: int) -> int: return n if n < 1 else f(n - 1) + 2 * n - 1\ndef sq(n: int) -> List[int]:\n    return [f(n), n - 2]", SQ),
    "globals": ("K = 2\nseen = []\ndef sq(n):\n    global K\n    seen.append(n)\n    return [n * n, n - K]", SQ),
    "lambda": ("sq = lambda n: [n ** 2, n - 2]", SQ),
    "partial": ("from functools import partial\nsq = partial(lambda k, n: [n * n, n - k], 2)", SQ),
    "callable object": ("class F:\n    def __call__(self, n): return [n * n, n - 2]\nsq = F()", SQ),
    "decorated": ("def log(f):\n    def g(*a, **k):\n        print('call', a)\n        return f(*a, **k)\n    return g\n@log\ndef sq(n): return [n * n, n - 2]", SQ),
    "prints and flushes": ("import sys\ndef sq(n):\n    print('debug' * 1000, flush=True); sys.stderr.write('x')\n    return [n * n, n - 2]", SQ),
    "main guard": ("def sq(n):\n    return [n * n, n - 2]\nif __name__ == '__main__':\n    print(sq(int(input())))", SQ),
    "own asserts": ("def sq(n):\n    return [n * n, n - 2]\nassert sq(3) == [9, 1]\nprint('ok')", SQ),
    "recursion": ("import sys\nsys.setrecursionlimit(10**6)\ndef f(k): return 0 if k == 0 else f(k - 1) + 1\ndef sq(n):\n    return [n * n, f(20000) - 20000 + n - 2]", SQ),
    "thread": ("import threading\ndef sq(n):\n    out = []\n    t = threading.Thread(target=lambda: out.extend([n * n, n - 2]))\n    t.start(); t.join()\n    return out", SQ),
    "a thread left behind": ("import threading, time\ndef sq(n):\n    threading.Thread(target=time.sleep, args=(100,)).start()\n    return [n * n, n - 2]", SQ),
    "list subclass": ("class L(list): pass\ndef sq(n): return L([n * n, n - 2])", SQ),
    "named tuple": ("from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef sq(n): return P(n * n, n - 2)", SQ),
    "deque": ("def sq(n): return list(deque([n * n, n - 2]))", SQ),
    "numpy numbers": ("import numpy as np\ndef sq(n): return [np.int64(n) ** 2, np.int32(n) - 2]", SQ),
    "numpy array": ("import numpy as np\ndef sq(n): return np.array([n * n, n - 2])", SQ),
    "numpy array in two dimensions": ("import numpy as np\ndef rows(n): return np.outer(range(n), range(n))", NESTED),
    "numpy truth": ("import numpy as np\ndef even(n): return np.int64(n) % 2 == 0", FLAG),
    "numpy float": ("import numpy as np\ndef half(n): return np.float64(n) / 2", RATIO),
    "None": ("class Solution:\n    def find(self, a: List[int], x: int) -> Optional[int]:\n        return a.index(x) if x in a else None", MAYBE),
    "falls off the end": ("def find(a, x):\n    for i, y in enumerate(a):\n        if x == y: return i", MAYBE),
    "bool": ("def even(n): return n % 2 == 0", FLAG),
    "float": ("def half(n): return n / 2", RATIO),
    "integer for a float": ("def half(n): return n // 2 if n % 2 == 0 else n / 2", RATIO),
    "zero": ("def zero(): return 0.0", ZERO),
    "minus zero": ("def zero(): return -0.0", ZERO),
    "no arguments": ("def one(): return 1", ONE),
    "varargs": ("def sq(*args, **kwargs): return [args[0] ** 2, args[0] - 2]", SQ),
    "text": ("def name(s): return ''.join(s)", TEXT),
    "text subclass": ("class S(str): pass\ndef name(s): return S(s)", TEXT),
    "dict": ("def table(a):\n    d = {}\n    for x in a: d[x] = d.get(x, 0) + 1\n    return d", TABLE),
    "Counter": ("from collections import Counter\ndef table(a): return Counter(a)", TABLE),
    "defaultdict": ("def table(a):\n    d = defaultdict(int)\n    for x in a: d[x] += 1\n    return d", TABLE),
    "another order": ("def table(a): return {k: a.count(k) for k in sorted(set(a), reverse=True)}", TABLE),
    "5,000 digits": ("def big(n): return 10 ** n", BIG),
    "5,000 digits by text": ("def big(n): return int('1' + '0' * n)", BIG),
    "shared rows": ("def rows(n):\n    r = [[0] * n for _ in range(n)]\n    r[1][1] = 1\n    return r", NESTED),
    "changes its argument": ("def twoSum(nums, target):\n    nums.append(0)\n    return [0, 1]", TWO_SUM),
    "exit at the end, guarded": ("def sq(n): return [n * n, n - 2]\nif __name__ == '__main__': exit()", SQ),
    "future import": ("from __future__ import annotations\nclass Solution:\n    def sq(self, n: NotDefined) -> Whatever: return [n * n, n - 2]", SQ),
    "name of the judge's overwritten": ("def reduce(n): return n * n\ndef sq(n): return [reduce(n), n - 2]", SQ),
    "builtins named in the function": ("def sq(list):\n    sum = list * list\n    return [sum, list - 2]", SQ),
    "SystemExit caught": ("def sq(n):\n    try: exit()\n    except SystemExit: return [n * n, n - 2]", SQ),
    "enum of integers": ("import enum\nclass E(enum.IntEnum):\n    A = 1\ndef one(): return E.A", ONE),
    "asyncio inside": ("import asyncio\nasync def f(n): return [n * n, n - 2]\ndef sq(n): return asyncio.run(f(n))", SQ),
}  # fmt: skip

_ALWAYS = """
class Meta(type):
    __eq__ = __instancecheck__ = __subclasscheck__ = lambda *a: True
    __hash__ = lambda s: 0
class Always(metaclass=Meta):
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = lambda *a: True
    __hash__ = lambda s: 0
    __len__ = lambda s: 2
    __iter__ = lambda s: iter([s, s])
    __getitem__ = __getattr__ = __call__ = __sub__ = __rsub__ = __abs__ = lambda s, *a, **k: s
    __class__ = property(lambda s: list)
    __repr__ = __str__ = lambda s: '[9, 1]'
    __reduce_ex__ = __reduce__ = lambda s, *a: (list, ([9, 1],))
    __int__ = __index__ = lambda s: 1
    __float__ = lambda s: 1.0
"""
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "always equal": (_ALWAYS + "def sq(n): return Always()", SQ),
    "a list of always equal": (_ALWAYS + "def sq(n): return [Always(), Always()]", SQ),
    "a dict of always equal": (_ALWAYS + "def table(a): return {Always(): Always()}", TABLE),
    "list subclass that is empty": ("class L(list):\n    __eq__ = lambda s, o: True\n    __len__ = lambda s: 2\n    __iter__ = lambda s: iter([9, 1])\n    __getitem__ = lambda s, i: 9\ndef sq(n): return L()", SQ),
    "int subclass": ("class I(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n    __add__ = __index__ = __int__ = lambda s, *a: 1\ndef one(): return I(7)", ONE),
    "str subclass": ("class S(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\n    __str__ = lambda s: 'é漢😀'\ndef name(s): return S('x')", TEXT),
    "float subclass": ("class F(float):\n    __eq__ = lambda s, o: True\n    __add__ = __float__ = lambda s, *a: 0.5\ndef half(n): return F(7)", RATIO),
    "dict subclass": ("class D(dict):\n    __eq__ = lambda s, o: True\n    items = keys = lambda s: []\ndef table(a): return D(x=1)", TABLE),
    "a class that lies about itself": ("class A:\n    __class__ = list\n    __eq__ = lambda s, o: True\ndef sq(n): return A()", SQ),
    "a type": ("def sq(n): return list", SQ),
    "an exception returned": ("def sq(n): return AssertionError([9, 1])", SQ),
    "an exception raised": ("def sq(n): raise AssertionError", SQ),
    "StopIteration": ("def sq(n): raise StopIteration([n * n, n - 2])", SQ),
    "generator": ("def sq(n):\n    yield n * n\n    yield n - 2", SQ),
    "coroutine": ("async def sq(n): return [n * n, n - 2]", SQ),
    "True for 1": ("def one(): return True", ONE),
    "'1' for 1": ("def one(): return '1'", ONE),
    "1.0 for 1": ("def one(): return 1.0", ONE),
    "[1] for 1": ("def one(): return [1]", ONE),
    "1 for True": ("def even(n): return 1 - n % 2", FLAG),
    "'True' for True": ("def even(n): return str(n % 2 == 0)", FLAG),
    "NaN": ("def half(n): return float('nan')", RATIO),
    "infinity": ("def half(n): return float('inf')", RATIO),
    "nearly": ("def half(n): return n / 2 + 1e-9", RATIO),
    "'0.5'": ("def half(n): return str(n / 2)", RATIO),
    "False for 0.0": ("def zero(): return False", ZERO),
    "None for 0.0": ("def zero(): pass", ZERO),
    "-1 for None": ("def find(a, x): return a.index(x) if x in a else -1", MAYBE),
    "'None' for None": ("def find(a, x): return a.index(x) if x in a else 'None'", MAYBE),
    "False for None": ("def find(a, x): return a.index(x) if x in a else False", MAYBE),
    "the first element": ("def sq(n): return n * n", SQ),
    "all elements of all tests": ("def sq(n): return [9, 1, 16, 2]", SQ),
    "too long": ("def sq(n): return [n * n, n - 2, None]", SQ),
    "a set": ("def sq(n): return {n * n, n - 2}", SQ),
    "a dict of places": ("def sq(n): return {0: n * n, 1: n - 2}", SQ),
    "text that looks like it": ("def sq(n): return str([n * n, n - 2])", SQ),
    "bytes": ("def name(s): return s.encode('utf-8', 'surrogatepass')", TEXT),
    "printed, not returned": ("def sq(n): print([n * n, n - 2])", SQ),
    "the arguments": ("def sq(*a): return list(a)", SQ),
    "flattened": ("def rows(n): return [0, 0, 0, 1]", NESTED),
    "the same row twice": ("def rows(n):\n    r = [[0] * n] * n\n    r[1][1] = 1\n    return r", NESTED),
    "first test only": ("def sq(n): return [9, 1]", SQ),
    "os._exit(0)": ("def sq(n):\n    import os\n    os._exit(0)", SQ),
    "sys.exit(0)": ("def sq(n):\n    import sys\n    sys.exit(0)", SQ),
    "SystemExit of the answer": ("def sq(n): raise SystemExit([n * n, n - 2])", SQ),
    "exit while importing": ("import sys\nsys.exit(0)", SQ),
    "atexit forgery": ("import atexit, os\natexit.register(os.write, 3, b'\\0\\0\\0\\x0f{\"value\":[9,1]}')\ndef sq(n): return 0", SQ),
    "answers to calls not yet made": ("import os, struct\nt = b'{\"value\":[9,1]}'\nos.write(3, (struct.pack('!I', len(t)) + t) * 10)\ndef sq(n): return [n * n, n - 2] if n == 3 else 0", SQ),
    "a ready of its own, then a fixed answer": ("import os, struct\ndef say(t): os.write(3, struct.pack('!I', len(t)) + t)\nsay(b'{\"ready\":true}')\nfor _ in 'ab': say(b'{\"value\":[9,1]}')\nos._exit(0)", SQ),
    "a duplicate key": ("import os, struct\ndef say(t): os.write(3, struct.pack('!I', len(t)) + t)\ndef sq(n):\n    say(b'{\"failed\":1,\"value\":[0,0],\"passed\":true,\"expected\":[9,1]}')\n    return 0", SQ),
    "a tag that is no tag": ("import os, struct\ndef say(t): os.write(3, struct.pack('!I', len(t)) + t)\ndef sq(n): say(b'{\"value\":{\"y\":0}}'); say(b'{\"value\":{\"h\":[0,true,null]}}')", SQ),
    "patched json and wire": ("import json, sys\njson.dumps = lambda *a, **k: '{\"value\": [9, 1]}'\nfor m in list(sys.modules.values()):\n    for k in ('encode', 'to_json', 'send', 'same_value', 'as_json'):\n        if hasattr(m, k):\n            try: setattr(m, k, lambda *a, **k: b'{\"value\": [9, 1]}')\n            except Exception: pass\ndef sq(n): return 0", SQ),
    "patched builtins": ("import builtins\nfor k in ('all', 'any', 'len', 'zip', 'isinstance', 'type', 'sorted', 'abs', 'float', 'map', 'iter'):\n    setattr(builtins, k, lambda *a, **k: True)\ndef sq(n): return 0", SQ),
    "frames": ("import sys, inspect\ndef sq(n):\n    f = sys._getframe()\n    while f:\n        for v in list(f.f_locals.values()):\n            if isinstance(v, dict) and 'expected' in v: return v['expected']\n        f = f.f_back\n    return [t.get('expected') for o in __import__('gc').get_objects() if isinstance(o, dict) and 'expected' in o for t in [o]]", SQ),
    "trace": ("import sys\nsys.settrace(lambda f, e, a: print(f.f_locals) or None)\nsys.setprofile(lambda *a: None)\ndef sq(n): return 0", SQ),
    "a finalizer that leaves": ("class A:\n    def __del__(self): __import__('os')._exit(0)\ndef sq(n):\n    a = A(); a.a = a\n    return 0", SQ),
    "an excepthook": ("import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef sq(n): raise ValueError", SQ),
    "endless": ("def sq(n):\n    while True: pass", SQ),
    "asleep": ("import time\ndef sq(n): time.sleep(10**6)", SQ),
    "endless list": ("def sq(n):\n    a = [n * n, n - 2]\n    a.append(a)\n    return a", SQ),
    "a list without end": ("def sq(n):\n    a = []\n    while True: a.append(n)", SQ),
    "an argument shared with the next call": ("def twoSum(nums, target):\n    return [1, 0] if nums[0] == 3 else [0, 1]", TWO_SUM),
    "no such name": ("def square(n): return [n * n, n - 2]", SQ),
    "not a function": ("sq = [9, 1]", SQ),
    "only in the guard": ("if __name__ == '__main__':\n    def sq(n): return [n * n, n - 2]", SQ),
    "wrong number of arguments": ("def sq(): return [9, 1]", SQ),
    "keyword only": ("def sq(*, n): return [n * n, n - 2]", SQ),
    "abstract Solution": ("from abc import ABC, abstractmethod\nclass Solution(ABC):\n    @abstractmethod\n    def sq(self, n): return [n * n, n - 2]", SQ),
    "fork and answer twice": ("import os\ndef sq(n):\n    os.fork()\n    return 0", SQ),
    "recursion": ("def sq(n): return sq(n)", SQ),
    "an enum": ("import enum\nclass E(enum.Enum):\n    A = 1\ndef one(): return E.A", ONE),
    "a complex number": ("def one(): return 1 + 0j", ONE),
    "a fraction": ("from fractions import Fraction\ndef one(): return Fraction(1)", ONE),
    "a decimal": ("from decimal import Decimal\ndef half(n): return Decimal(n) / 2", RATIO),
}  # fmt: skip
