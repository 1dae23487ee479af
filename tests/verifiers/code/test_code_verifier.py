"""Options, gold audits and statuses of `code`, apart from any program."""

import json

import pytest

from tests.verifiers.code.support import PlainTask
from verifiers.code import sandbox
from verifiers.code.hostile import ASSERTS, CALL, HONEST, STDIN
from verifiers.code_verifier import CodeVerifier


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sandbox": "none"}, "sandbox is 'none'"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"total_timeout_s": float("nan")}, "total_timeout_s is nan"),
        ({"memory_limit_mb": 1}, "memory_limit_mb is 1"),
        ({"max_processes": True}, "max_processes is True"),
        ({"checker": "no path"}, "checker is 'no path'"),
        ({"language": "cobol"}, "language 'cobol'"),
        ({"several_fences": "all"}, "several_fences is 'all'"),
        ({"output": "loose"}, "output is 'loose'"),
        ({"float_tolerance": -1}, "float_tolerance is -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CodeVerifier(**options)


@pytest.mark.parametrize("answer", [STDIN, CALL, ASSERTS])
def test_good_golds(answer):
    verifier = CodeVerifier()
    for form in (answer, json.dumps(answer)):
        audit = verifier.prepare(PlainTask(form))
        assert (audit.status, answer["mode"] in audit.reason) == ("ok", True)


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (None, "missing", "empty"),
        ("", "missing", "not JSON"),
        ({}, "missing", "empty"),
        ("5", "unparsable", "int"),
        ("{", "unparsable", "not JSON"),
        ([1], "unparsable", "list"),
        ({"mode": "run"}, "unparsable", "'run'"),
        ({"mode": ["stdin"]}, "unparsable", "mode"),
        ({"mode": "stdin"}, "unparsable", "tests"),
        ({"mode": "stdin", "tests": []}, "missing", "empty"),
        ({"mode": "stdin", "tests": [{"input": "x"}]}, "unparsable", "no `output`"),
        ({"mode": "stdin", "tests": [{"input": "x", "output": 3}]}, "unparsable", "int"),
        ({"mode": "call", "tests": [{"args": [], "expected": 1}]}, "unparsable", "fn_name"),
        ({"mode": "call", "fn_name": "f", "tests": [{"args": 3, "expected": 1}]}, "unparsable", "args"),
        ({"mode": "asserts", "entry_point": "f"}, "missing", "test_code"),
        ({"mode": "asserts", "test_code": "assert f(", "entry_point": "f"}, "unparsable", "not Python"),
        ({"mode": "asserts", "test_code": "f(3)", "entry_point": "f"}, "unparsable", "asserts nothing"),
        ({**STDIN, "language": "cobol"}, "unparsable", "cobol"),
    ],
)
def test_bad_golds_are_explained(answer, status, reason):
    audit = CodeVerifier().prepare(PlainTask(answer))
    assert (audit.status, reason in audit.reason) == (status, True), audit.reason


@pytest.mark.parametrize("answer", [None, "{", {"mode": "stdin"}, {"mode": "call", "tests": []}])
def test_a_bad_gold_is_an_error_whatever_the_program(answer):
    verdict = CodeVerifier()("```python\nprint(1)\n```", PlainTask(answer))
    assert (verdict.status, verdict.score) == ("error", 0.0)
    assert "gold answer is unusable" in verdict.reason


def test_no_program_is_unparsable():
    assert CodeVerifier()("<think>hm</think>", PlainTask(STDIN)).status == "unparsable"


def test_prose_without_a_fence_is_unparsable_and_a_broken_program_in_one_is_wrong():
    verifier = CodeVerifier(sandbox="limits-only")
    assert verifier("I would square the number.", PlainTask(STDIN)).status == "unparsable"
    assert verifier("```python\nprint(1\n```", PlainTask(STDIN)).status == "wrong"


def test_without_isolation_it_is_an_error_unless_limits_only_is_said(monkeypatch):
    def refuse(isolation, profile):
        raise sandbox.SandboxError(f"no {isolation}")

    source, answer = HONEST["stdin"]
    sandbox.available.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "Server", refuse)
        verdict = CodeVerifier()(source, PlainTask(answer))
    sandbox.available.cache_clear()
    assert (verdict.status, "limits-only" in verdict.reason) == ("error", True)
    assert CodeVerifier(sandbox="limits-only")(source, PlainTask(answer)).status == "correct"


def test_the_time_that_a_task_may_take():
    verifier = CodeVerifier(timeout_s=2.0, total_timeout_s=3.0)
    assert verifier.timeout_for(PlainTask({**STDIN, "tests": STDIN["tests"][:1]})) == 4.0
    assert verifier.timeout_for(PlainTask({**STDIN, "tests": STDIN["tests"] * 5})) == 5.0
    assert verifier.timeout_for(PlainTask(None)) == 2.0
