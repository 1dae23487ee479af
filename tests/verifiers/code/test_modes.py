"""Honest programs in all three modes, in every isolation here: what they may rely on, and how they are judged."""

# ruff: noqa: E501  (programs, as texts)

import pytest

from tests.verifiers.code.support import PlainTask, need_namespaces
from verifiers.code.hostile import CALL, HONEST, STDIN
from verifiers.code_verifier import CodeVerifier

ECHO = {"mode": "stdin", "tests": [{"input": "a b\nc\n", "output": "a b\nc\n"}]}


@pytest.mark.parametrize("mode", sorted(HONEST))
def test_honest_programs_pass(judge, mode):
    source, answer = HONEST[mode]
    verdict = judge(source, answer)
    assert (verdict.status, verdict.score, verdict.reason) == ("correct", 1.0, verdict.reason)
    assert verdict.parts["passed"] == verdict.parts["tests"] >= 1


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.stdout.write(sys.stdin.read())",
        "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())",
        "print(open(0).read(), end='')",
        "print(open('/dev/stdin').read(), end='')",
        "import os\nos.write(1, os.read(0, 100))",
        "import sys\nfor line in sys.stdin: print(line, end='')",
        "while True:\n    try: print(input())\n    except EOFError: break",
        "def main():\n    print(input()); print(input())\nif __name__ == '__main__':\n    main()",
        "x = 0\ndef f():\n    global x\n    x = input()\nf()\nprint(x); print(input())",
        "print(input()); print(input()); exit()",
        "import sys\nprint(input()); print(input()); sys.exit(0)",
        "import threading\nt = threading.Thread(target=lambda: [print(input()) for _ in 'ab'])\nt.start()",
        "import atexit\natexit.register(lambda: print('c'))\nprint(input())",
        "class A:\n    def __del__(self): print('c')\na = A()\nprint(input())",
        "import sys\nprint('noise', file=sys.stderr)\nprint(input()); print(input())",
        "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n    f.write(input()); f.seek(0); print(f.read(), 'c', sep='\\n')",
        "import sys\nsys.setrecursionlimit(10**5)\nf = lambda n: n and f(n - 1)\nf(20000)\nprint(input()); print(input())",
        "import dataclasses, typing\n@dataclasses.dataclass\nclass P:\n    x: 'typing.List[int]'\nP([1])\nprint(input()); print(input())",
    ],
)
def test_programs_read_and_write_as_they_like(judge, source):
    verdict = judge(source, ECHO)
    assert verdict.status == "correct", verdict.reason


def test_a_program_may_use_several_processes():
    need_namespaces()
    source = "import multiprocessing as m\nq = m.get_context('fork').Queue()\n"
    source += "p = m.get_context('fork').Process(target=q.put, args=('c',))\np.start()\nprint(input(), q.get(), sep='\\n')\np.join()"
    verdict = CodeVerifier()(source, PlainTask(ECHO))
    assert verdict.status == "correct", verdict.reason


def test_what_a_program_writes_in_any_encoding_is_compared(judge):
    answer = {"mode": "stdin", "tests": [{"input": "é\n", "output": "日本 é\n"}]}
    assert judge("print('日本', input())", answer).status == "correct"
    assert judge("import sys\nsys.stdout.buffer.write(b'\\xff')", answer).status == "wrong"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("print(1)", r"test 1 of 2: wrong output '1\n'"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(2)", "exit status 2"),
        ("n = int(input())\nprint(n * n)\nprint(n - 2)\nraise SystemExit('no')", "exit status 1"),
        ("import os\nos.kill(os.getpid(), 9)", "killed by signal 9"),
        ("x = bytearray(64 * 2**30)", "MemoryError"),
        ("print('x' * 2**26)", "exit status"),
    ],
)
def test_why_a_program_fails(judge, source, reason):
    verdict = judge(source, STDIN)
    assert verdict.status == "wrong"
    assert reason in verdict.reason


def test_out_of_time(judge):
    slept = judge("import time\ntime.sleep(60)", STDIN, timeout_s=0.4)
    assert (slept.status, slept.score) == ("timeout", 0.0)
    assert "time limit" in slept.reason
    total = judge(
        "import time\ntime.sleep(0.2)\nn = int(input())\nprint(n * n)\nprint(n - 2)", STDIN, total_timeout_s=0.3
    )
    assert total.status == "timeout"


def test_partial_credit(judge):
    halves = "n = int(input())\nprint(9)\nprint(1)"
    assert judge(halves, STDIN).score == 0.0
    partial = judge(halves, STDIN, partial_credit=True)
    assert (partial.score, partial.status, partial.parts) == (0.5, "wrong", {"tests": 2.0, "passed": 1.0})
    crashing = "def sq(n):\n    if n == 3:\n        import os; os._exit(0)\n    return [n * n, n - 2]"
    assert judge(crashing, CALL, partial_credit=True).score == 0.5
    asserts = {
        "mode": "asserts",
        "entry_point": "f",
        "test_code": "assert f(1) == 1\nassert f(2) == 2\nassert f(3) == 4",
    }
    assert judge("def f(x): return x", asserts, partial_credit=True).score == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("class Solution:\n    def sq(self, n): return [n*n, n-2]", "correct"),
        ("class Solution:\n    def __init__(self): self.k = 2\n    def sq(self, n: int) -> List[int]: return [n*n, n-self.k]", "correct"),
        ("class Solution:\n    @staticmethod\n    def sq(n): return (n*n, n-2)", "correct"),
        ("def sq(n):\n    print('debug')\n    return [n*n, n-2]", "correct"),
        ("sq = lambda n: [n*n, n-2]", "correct"),
        ("def sq(n): return [n*n, True if n == 3 else 2]", "wrong"),
        ("def sq(n): return {n*n, n-2}", "wrong"),
        ("def other(n): return [n*n, n-2]", "wrong"),
    ],
)  # fmt: skip
def test_calls(judge, source, status):
    assert judge(source, CALL).status == status


def test_calls_by_keyword_dotted_name_and_nested_values(judge):
    answer = {
        "mode": "call",
        "fn_name": "A.f",
        "tests": [{"args": {"x": [1], "y": {"k": None}}, "expected": {"a": [[1], 0.5]}}],
    }
    source = "class A:\n    def f(self, y, x): return {'a': (x, 0.5)} if y == {'k': None} else 0"
    assert judge(source, answer).status == "correct"


def test_a_checker_decides_where_several_answers_are_right(judge):
    answer = {"mode": "call", "fn_name": "f", "tests": [{"args": [10], "expected": None}]}
    good = judge("def f(n): return [3, 7]", answer, checker="tests.verifiers.code.support:sums_to_argument")
    bad = judge("def f(n): return [3, 8]", answer, checker="tests.verifiers.code.support:sums_to_argument")
    broken = judge("def f(n): return 3", answer, checker="tests.verifiers.code.support:sums_to_argument")
    assert [verdict.status for verdict in (good, bad, broken)] == ["correct", "wrong", "error"]
    missing = judge("def f(n): return 3", answer, checker="tests.verifiers.code.support:no_such")
    assert (missing.status, "no_such" in missing.reason) == ("error", True)


def test_language_by_tag_by_option_and_by_answer(judge):
    bash = "read n; echo $((n * n)); echo $((n - 2))"
    assert judge(bash, STDIN, tag="bash").status == "correct"
    assert judge(bash, {**STDIN, "language": "bash"}, tag="").status == "correct"
    assert judge(bash, STDIN, tag="", language="bash").status == "correct"
    refused = judge("x", CALL, tag="bash")
    assert (refused.status, "mode 'call' is for Python" in refused.reason) == ("error", True)
    unknown = judge("x", {**STDIN, "language": "cobol"})
    assert (unknown.status, "cobol" in unknown.reason) == ("error", True)
