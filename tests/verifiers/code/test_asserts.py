"""Assert-style tests across the border: objects that stay with the program, arguments changed in place, callbacks."""

# ruff: noqa: E501  (programs, as texts)

import pytest


def asserts(code, entry=None):
    return {"mode": "asserts", "test_code": code, "entry_point": entry}


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("def f(x): x.sort()", "a = [3, 1]\nf(a)\nassert a == [1, 3]"),
        ("def f(x): x[0].append(9)", "inner = [1]\na = [inner]\nf(a)\nassert inner == [1, 9] and a[0] is inner"),
        ("def f(d): d['k'] = {1}", "d = {}\nf(d)\nassert d == {'k': {1}}"),
        ("def f(g, x): return g(g(x))", "assert f(lambda v: v + 1, 1) == 3"),
        ("def f(it): return sum(it)", "assert f(x for x in (1, 2)) == 3"),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2]"),
        ("def f(n):\n    i = 0\n    while True:\n        yield i\n        i += 1", "g = f(0)\nassert [next(g), next(g)] == [0, 1]"),
        ("def f(n):\n    def inner(x): return x + n\n    return inner", "assert f(1)(2) == 3"),
        ("class Node:\n    def __init__(self, v): self.v, self.next = v, None",
         "a, b = Node(1), Node(2)\na.next = b\nassert a.next.v == 2 and a.next is b and isinstance(a, Node)"),
        ("class Node:\n    def __init__(self, v): self.v = v\ndef f(node): return node.v", "assert f(Node(7)) == 7"),
        ("def f(node): return node.left.val + node.val",
         "class T:\n    def __init__(self, val, left=None): self.val, self.left = val, left\nassert f(T(1, T(2))) == 3"),
        ("def f(x):\n    if x < 0: raise ValueError('negative')", ("try:\n    f(-1)\nexcept ValueError as e:\n    assert str(e) == 'negative'\n"
         "else:\n    assert False")),
        ("class MyError(Exception): pass\ndef f(): raise MyError('m')", ("try:\n    f()\nexcept MyError as e:\n    assert 'm' in str(e)\n"
         "else:\n    assert False")),
        ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
        ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(2) ** 2, 2)"),
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == Counter('aab') and f('a')['z'] == 0"),
        ("import collections\nP = collections.namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "assert f().x == 1 and f() == (1, 2)"),
        ("def f(): return {1, 2}, (1.5, 2j), b'x', None, range(3), 10**40",
         "assert f() == ({1, 2}, (1.5, 2j), b'x', None, range(3), 10**40)"),
        ("def f(x): return x", "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(3), 3)"),
        ("def f(x): return x", "def test_f():\n    assert f(3) == 3"),
        ("def f(x): return x", "def check(c):\n    assert c(3) == 3\ncheck(f)"),
        ("memo = {}\ndef f(x):\n    return memo.setdefault(x, len(memo))", "assert [f(5), f(6), f(5)] == [0, 1, 0]"),
        ("def f(x): return print", "assert callable(f(1))"),
    ],
)  # fmt: skip
def test_tests_work_as_in_one_process(judge, source, code):
    verdict = judge(source, asserts(code, "f" if "def f" in source else None))
    assert verdict.status == "correct", verdict.reason


@pytest.mark.parametrize(
    ("source", "code", "reason"),
    [
        ("def f(x): return x + 1", "assert f(3) == 3", "AssertionError"),
        ("def f(x): return x", "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(3), 4)", "3 != 4"),
        ("def f(x): raise KeyError(x)", "f(3)", "KeyError: 3"),
        ("def g(x): return x", "def check(c):\n    assert c(3) == 3", "defines no 'f'"),
        ("def g(x): return x", "assert f(3) == 3", "NameError"),
        ("1 / 0", "assert f(3) == 3", "ZeroDivisionError"),
        ("import os\nos._exit(0)", "assert f(3) == 3", "ended before its tests"),
        ("def f(x):\n    import os\n    os._exit(0)", "assert f(3) == 3", "ended while"),
        ("def f(x): return all", "assert f(3)([0])", "AssertionError"),
        ("def all(x): return True\ndef f(x): return x", "assert all([f(0)])", "AssertionError"),
    ],
)  # fmt: skip
def test_why_tests_fail(judge, source, code, reason):
    verdict = judge(source, asserts(code, "f"))
    assert (verdict.status, reason in verdict.reason) == ("wrong", True), verdict.reason


def test_the_program_reaches_nothing_of_the_tests(judge):
    source = """
def f(g, o):
    found = []
    for path in ("__globals__", "__closure__", "__code__", "__self__", "__class__", "__dict__", "__init__", "func_globals"):
        for target in (g, o, o.method):
            try: found.append(getattr(target, path))
            except (TypeError, AttributeError): pass
    try: g.attribute = 1
    except TypeError: pass
    else: found.append("set")
    return [str(x) for x in found if "Remote" not in str(type(x)) and "remote" not in str(x)[:60]]
"""
    code = "SECRET = 42\nclass O:\n    def method(self): return SECRET\nresult = f(lambda: SECRET, O())\n"
    code += "assert not any('42' in x or 'SECRET' in x for x in result), result"
    verdict = judge(source, asserts(code, "f"))
    assert verdict.status == "correct", verdict.reason


def test_broken_tests_are_the_golds_fault(judge):
    assert judge("def f(x): return x", asserts("assert f(3 == 3", "f")).status == "error"
