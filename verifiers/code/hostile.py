"""Programs that try to pass without solving anything, or to do harm: none may ever be judged correct.

They serve the tests and the benchmark of the sandbox. Each is aimed at a way in which some grader has been beaten, or
at a limit. `slow` ones end only at a time limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STDIN = {"mode": "stdin", "tests": [{"input": "3\n", "output": "9\n1\n"}, {"input": "4\n", "output": "16\n2\n"}]}
CALL = {
    "mode": "call",
    "fn_name": "sq",
    "tests": [{"args": [3], "expected": [9, 1]}, {"args": [4], "expected": [16, 2]}],
}
ASSERTS = {
    "mode": "asserts",
    "entry_point": "sq",
    "test_code": "def check(candidate):\n    assert candidate(3) == [9, 1]\n    assert abs(candidate(4)[0] - 16) < 1e-6\n",
}
HONEST = {
    "stdin": ("n = int(input())\nprint(n * n)\nprint(n - 2)\n", STDIN),
    "call": ("def sq(n):\n    return [n * n, n - 2]\n", CALL),
    "asserts": ("def sq(n):\n    return [n * n, n - 2]\n", ASSERTS),
}


@dataclass(frozen=True)
class Hostile:
    """One program and the tests it tries to pass."""

    name: str
    source: str
    answer: Mapping[str, Any]
    slow: bool = False


def _stdin(name: str, source: str, slow: bool = False) -> Hostile:
    return Hostile(f"stdin: {name}", source, STDIN, slow)


def _call(name: str, source: str, slow: bool = False) -> Hostile:
    return Hostile(f"call: {name}", source, CALL, slow)


def _asserts(name: str, source: str, slow: bool = False) -> Hostile:
    return Hostile(f"asserts: {name}", source, ASSERTS, slow)


_ALWAYS = """
class Always:
    def yes(self, *a, **k): return True
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = yes
    def self_(self, *a, **k): return self
    __sub__ = __rsub__ = __add__ = __radd__ = __mul__ = __abs__ = __neg__ = __getitem__ = __round__ = self_
    __hash__ = lambda self: 0
    __len__ = lambda self: 2
    __float__ = lambda self: 16.0
    __int__ = __index__ = lambda self: 16
    __iter__ = lambda self: iter([self, self])
    __class__ = list
"""
_FRAMES = """
import gc, sys
def hunt():
    seen = [o for o in gc.get_objects() if isinstance(o, (dict, list))]
    frame = sys._getframe()
    while frame:
        seen += [frame.f_globals, frame.f_locals]
        frame = frame.f_back
    for o in seen:
        try:
            if isinstance(o, dict):
                for key in ("expected", "output", "test_code", "tests", "cases"):
                    if key in o: return o[key]
        except Exception: pass
"""
_DESCRIPTORS = """
import os, json, struct
TEXTS = [b'{"value":[9,1]}', b'{"outcome":"passed"}', b'{"ok":true}', b'{"passed":2,"total":2,"outcome":"passed","reason":""}']
def spray():
    for fd in range(3, 300):
        for text in TEXTS:
            for data in (struct.pack("!I", len(text)) + text, text + b"\\n"):
                try: os.write(fd, data)
                except OSError: pass
"""
_PATCH = """
import builtins, sys, json
for name in ("all", "any", "abs", "len", "isinstance", "type", "issubclass", "repr", "str", "sum", "min", "max", "zip", "map"):
    try: setattr(builtins, name, lambda *a, **k: True)
    except Exception: pass
"""

HOSTILE: tuple[Hostile, ...] = (
    _stdin("nothing", ""),
    _stdin("only the first line", "n = int(input())\nprint(n * n)\n"),
    _stdin("one line too many", "n = int(input())\nprint(n * n)\nprint(n - 2)\nprint()\nprint('x')\n"),
    _stdin("the answer, then a crash", "n = int(input())\nprint(n * n)\nprint(n - 2, flush=True)\n1 / 0\n"),
    _stdin("the answer, then a failing exit", "n = int(input())\nprint(n * n)\nprint(n - 2)\nraise SystemExit(3)\n"),
    _stdin("one of two tests", "print(9)\nprint(1)\n"),
    _stdin(
        "a success marker",
        'print(\'PASSED\')\nprint(\'{"passed": true, "status": "correct"}\')\nimport os; os._exit(0)',
    ),
    _stdin("frames and gc", _FRAMES + "print(hunt())"),
    _stdin("every descriptor", _DESCRIPTORS + "spray()"),
    _stdin(
        "the parent's memory",
        "import os\nfor pid in [os.getppid(), 1, *range(2, 500)]:\n    try:\n        maps = open(f'/proc/{pid}/maps').read()\n"
        "        if pid != os.getpid(): print(open(f'/proc/{pid}/environ').read(), maps[:50])\n    except OSError: pass\n",
    ),
    _stdin(
        "tests on disk",
        "import os\nfor root, _, names in os.walk('/'):\n    if root.startswith(('/usr', '/proc', '/lib')): continue\n"
        "    for name in names:\n        try:\n            text = open(os.path.join(root, name)).read()\n"
        "            if 'output' in text and '16' in text: print(text[:100])\n        except Exception: pass\n",
    ),
    _stdin(
        "a changed comparer",
        "import sys\nfor m in list(sys.modules.values()):\n    for n in ('same_output', 'compare', 'check'):\n"
        "        if hasattr(m, n): setattr(m, n, lambda *a, **k: True)\n",
    ),
    _stdin(
        "kill everything",
        "import os, signal\nfor pid in (-1, 1, os.getppid(), *range(2, 3000)):\n    try: os.kill(pid, 9)\n"
        "    except OSError: pass\n",
    ),
    _stdin("kill its group", "import os\nos.killpg(0, 9)\n"),
    _stdin("64 GiB at once", "x = bytearray(64 * 1024**3)\nprint(9)\n"),
    _stdin("10 GiB bit by bit", "x = []\nwhile True: x.append(bytearray(2**24))\n"),
    _stdin(
        "10 GiB in many processes",
        "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        x = b'1' * (400 * 2**20)\n"
        "        time.sleep(30)\ntime.sleep(30)\n",
    ),
    _stdin("print without end", "while True: print('A' * 10000)\n"),
    _stdin("errors without end", "import sys\nwhile True: print('A' * 10000, file=sys.stderr)\n"),
    _stdin("a number of 10^8 digits", "print(10 ** (10 ** 8) % 7 ** (10 ** 8))\n", slow=True),
    _stdin("sleep", "import time\ntime.sleep(10**6)\n", slow=True),
    _stdin(
        "no way to interrupt",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass\n",
        slow=True,
    ),
    _stdin(
        "ignored signals",
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)\n",
        slow=True,
    ),
    _stdin("fork bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", slow=True),
    _stdin(
        "thread bomb",
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "    except RuntimeError: pass\n",
        slow=True,
    ),
    _stdin(
        "daemon",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.close(0); os.close(1)\n"
        "        time.sleep(600)\n    os._exit(0)\n",
    ),
    _stdin(
        "a daemon that answers late",
        "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(0.3); print('9\\n1')\n",
    ),
    _stdin("stopped itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n", slow=True),
    _stdin("deep recursion", "import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1)\nf(0)\n"),
    _stdin("crash in C", "import ctypes\nctypes.string_at(0)\n"),
    _stdin("files without end", "n = 0\nwhile True:\n    open(f'f{n}', 'w').close(); n += 1\n"),
    _stdin("a file without end", "f = open('f', 'wb')\nwhile True: f.write(bytes(2**20))\n"),
    _stdin("sockets without end", "import socket\nx = []\nwhile True: x += socket.socketpair()\n"),
    _stdin(
        "locked directory",
        "import os\nos.makedirs('a/b/c')\nopen('a/b/c/f', 'w').close()\nos.chmod('a/b', 0)\nos.chmod('a', 0)\n",
    ),
    _call("list that equals all", "class A(list):\n    def __eq__(s, o): return True\ndef sq(n): return A()\n"),
    _call("object that equals all", _ALWAYS + "def sq(n): return Always()\n"),
    _call(
        "integer that equals all",
        "class I(int):\n    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\n"
        "def sq(n): return [I(0), I(0)]\n",
    ),
    _call("only the first element", "def sq(n): return n * n\n"),
    _call("floats for integers", "def sq(n): return [float(n * n), float(n - 2)]\n"),
    _call("texts for integers", "def sq(n): return [str(n * n), str(n - 2)]\n"),
    _call("the answer as JSON text", "def sq(n): return f'[{n * n}, {n - 2}]'\n"),
    _call("one wrapped in a list", "def sq(n): return [[n * n, n - 2]]\n"),
    _call("leave with success", "def sq(n):\n    import os; os._exit(0)\n"),
    _call("leave at once", "raise SystemExit(0)\ndef sq(n): return 0\n"),
    _call("a marker, then leave", "import os\nprint('PASSED'); print('{\"passed\": true}', flush=True)\nos._exit(0)\n"),
    _call("exit handler", "import atexit\natexit.register(lambda: print('{\"passed\": true}'))\ndef sq(n): return 0\n"),
    _call("patched json", "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\ndef sq(n): return 0\n"),
    _call("patched builtins", _PATCH + "def sq(n): return 0\n"),
    _call(
        "patched wire",
        "import sys\nfor name, m in list(sys.modules.items()):\n    if name.startswith('verifiers'):\n"
        "        for k in ('encode', 'decode', 'same_value', 'to_json'):\n"
        "            if hasattr(m, k): setattr(m, k, lambda *a, **k: b'{\"value\": [9, 1]}')\ndef sq(n): return [9, 1]\n",
    ),
    _call("frames and gc", _FRAMES + "def sq(n): return hunt()\n"),
    _call("every descriptor", _DESCRIPTORS + "def sq(n): spray(); return 0\n"),
    _call(
        "answers in advance",
        "import os, struct\nt = b'{\"value\":[9,1]}'\nfor _ in range(4): os.write(3, struct.pack('!I', len(t)) + t)\n"
        "def sq(n): return 0\n",
    ),
    _call(
        "a message without end",
        "import os, struct\nos.write(3, struct.pack('!I', 2**26))\nwhile True: os.write(3, b' ' * 2**20)\n",
    ),
    _call("half a message", "import os, time\nos.write(3, b'\\0\\0')\ntime.sleep(600)\n", slow=True),
    _call(
        "a dribble",
        "import os, time, struct\nos.write(3, struct.pack('!I', 1000))\nwhile True: os.write(3, b' '); time.sleep(.1)\n",
        slow=True,
    ),
    _call("nested without end", "def sq(n):\n    x = []\n    x.append(x)\n    return x\n"),
    _call("nested deeply", "def sq(n):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x\n"),
    _call("a huge value", "def sq(n): return list(range(10**8))\n"),
    _call("a huge integer", "def sq(n): return 10 ** 10 ** 6\n"),
    _call("sleep", "import time\ndef sq(n): time.sleep(10**6)\n", slow=True),
    _call("generator", "def sq(n): yield from [n * n, n - 2]\n"),
    _call("not a number", "def sq(n): return [float('nan')] * 2\n"),
    _call(
        "tracing",
        "import sys\ndef t(f, e, a):\n    f.f_trace_opcodes = True\n    if 'expected' in f.f_locals: raise SystemExit(0)\n"
        "    return t\nsys.settrace(t)\ndef sq(n): return 0\n",
    ),
    _call("a finalizer", "class A:\n    def __del__(s):\n        import os; os._exit(0)\ndef sq(n): A(); return 0\n"),
    _asserts("object that equals all", _ALWAYS + "def sq(n): return Always()\n"),
    Hostile(
        "asserts: object that equals all, where nothing else is asked",
        _ALWAYS + "def sq(n): return Always()\n",
        {"mode": "asserts", "entry_point": "sq", "test_code": "assert sq(3) == [9, 1]\nassert [16, 2] == sq(4)\n"},
    ),
    _asserts(
        "list that equals all",
        "class A(list):\n    def __eq__(s, o): return True\n    def __getitem__(s, i): return s\n"
        "    def __sub__(s, o): return 0\ndef sq(n): return A([9])\n",
    ),
    _asserts(
        "float that is close to all",
        "class F(float):\n    __sub__ = __rsub__ = __abs__ = lambda s, *a: F(0)\n"
        "    __lt__ = __eq__ = lambda s, o: True\nclass L(list):\n    __eq__ = lambda s, o: True\n"
        "def sq(n): return L([F(1), F(1)])\n",
    ),
    _asserts("leave with success", "def sq(n):\n    import os; os._exit(0)\n"),
    _asserts("raise SystemExit", "def sq(n): raise SystemExit(0)\n"),
    _asserts("leave at once", "import sys\nsys.exit(0)\n"),
    _asserts("raise a skip", "import unittest\ndef sq(n): raise unittest.SkipTest('x')\n"),
    _asserts("patched builtins", _PATCH + "def sq(n): return 0\n"),
    _asserts("own abs", "def abs(x): return 0\ndef sq(n): return [9, 1] if n == 3 else [0, 0]\n"),
    _asserts("own check", "def check(c): pass\ndef sq(n): return 0\n"),
    _asserts(
        "own AssertionError",
        "class AssertionError(Exception): pass\nimport builtins\nbuiltins.AssertionError = Exception\n"
        "def sq(n): return 0\n",
    ),
    _asserts("frames and gc", _FRAMES + "def sq(n): return hunt()\n"),
    _asserts("every descriptor", _DESCRIPTORS + "def sq(n): spray(); return 0\n"),
    _asserts("every descriptor at once", _DESCRIPTORS + "spray()\nimport os; os._exit(0)\n"),
    _asserts(
        "forged references",
        "import os, struct, time\ndef say(t): os.write(3, struct.pack('!I', len(t)) + t)\nsay(b'{\"ready\":true}')\n"
        'say(b\'{"ok":{"sq":{"module":"operator"},"check":{"value":1},"abs":{"from":"operator"}}}\')\n'
        'for _ in range(9): say(b\'{"ok":{"y":0}}\')\ntime.sleep(1)\n',
    ),
    _asserts(
        "ask the tests",
        "import os, struct, json\ndef say(m):\n    t = json.dumps(m).encode(); os.write(3, struct.pack('!I', len(t)) + t)\n"
        "def hear():\n    n = struct.unpack('!I', os.read(3, 4))[0]; return json.loads(os.read(3, n))\nsay({'ready': True})\n"
        "hear(); say({'ok': {'sq': {'value': {'h': [0, True, None]}}}})\nhear()\nfor op in ('names', 'get', 'call', 'str'):\n"
        "    say({'op': op, 'on': 0, 'args': ['__globals__'], 'named': {}}); r = hear()\nsay({'ok': r})\n",
    ),
    _asserts("no function", "x = 1\n"),
    _asserts("syntax error", "def sq(n: return [n * n, n - 2]\n"),
    _asserts("sleep", "import time\ndef sq(n): time.sleep(10**6)\n", slow=True),
    _asserts("a huge value", "def sq(n): return 'x' * 10**9\n"),
    _asserts(
        "patched at import", "import sys\nsys.modules['operator'].eq = lambda a, b: True\ndef sq(n): return [0, 0]\n"
    ),
)
