"""Names, plug-in paths, and what a plug-in may return."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from rollout.records import Task
from verifiers import Verdict, VerifierLookupError, known_names, register, resolve
from verifiers.numeric import numeric
from verifiers.registry import as_verdict

PLUGIN = """
import numpy as np
constant = 3
def by_length(completion, task):
    return len(completion) / task.answer
def needs_three(a, b, c): return 1.0
async def waits(completion, task): return 1.0
class Judge:
    def __call__(self, completion, task): return completion == task.answer
judge = Judge()
"""


@pytest.fixture(autouse=True)
def plugin(tmp_path, monkeypatch):
    (tmp_path / "registry_plugin.py").write_text(PLUGIN)
    (tmp_path / "registry_broken.py").write_text("import no_such_thing_at_all\n")
    (tmp_path / "registry_quits.py").write_text("raise SystemExit('bye')\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_built_in_names():
    assert {"numeric", "format"} <= set(known_names())
    assert resolve("numeric") is numeric


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numric", "unknown verifier 'numric', did you mean 'numeric'.*known: format, numeric"),
        ("registry_plugn:f", "importing 'registry_plugn' failed with ModuleNotFoundError"),
        ("registry_broken:f", "importing 'registry_broken' failed with ModuleNotFoundError: .*no_such_thing_at_all"),
        ("registry_quits:f", "importing 'registry_quits' failed with SystemExit: bye"),
        ("registry_plugin:by_lenght", "has no 'by_lenght', did you mean 'by_length'"),
        ("registry_plugin:constant", "is a int, not a function"),
        ("registry_plugin:needs_three", "can't be called as f.completion, task.: missing a required argument: 'c'"),
        ("registry_plugin:waits", "is async"),
        ("registry_plugin:", "is not of the form"),
        ("a:b:c", "is not of the form"),
        ("../x:f", "is not of the form"),
        ("__main__:f", "out of '__main__'"),
    ],
)
def test_unusable_names_say_why(name, message):
    with pytest.raises(VerifierLookupError, match=message):
        resolve(name)


def test_plugins_by_path():
    task = Task(task_id="t", prompt="", answer=4, metadata={})
    verdict = resolve("registry_plugin:by_length")("ab", task)
    assert (verdict.score, verdict.status) == (0.5, "wrong")
    assert resolve("registry_plugin:judge")("x", replace(task, answer="x")).status == "correct"


@pytest.mark.parametrize(
    ("result", "score", "status"),
    [
        (True, 1.0, "correct"), (False, 0.0, "wrong"), (1.0, 1.0, "correct"), (0.99, 0.99, "wrong"),
        (2, 2.0, "correct"),
        (-1, -1.0, "wrong"), (Fraction(1, 2), 0.5, "wrong"), (np.float32(1), 1.0, "correct"),
        (np.bool_(True), 1.0, "correct"), (np.array(0.5), 0.5, "wrong"),
    ],
)  # fmt: skip
def test_numbers_become_verdicts(result, score, status):
    verdict = as_verdict("v", result)
    assert (verdict.score, verdict.status, type(verdict.score)) == (score, status, float)


def with_fields(**fields):
    return Verdict(**{"score": 1.0, "status": "correct", "reason": "r", **fields})


@pytest.mark.parametrize(
    "result",
    [None, "1", [1.0], {"score": 1.0}, 1j, float("nan"), float("inf"), -float("inf"), 10**400, np.ones(2),
     np.array(np.nan),
     with_fields(score=float("nan")), with_fields(score="1"), with_fields(score=None), with_fields(status="right"),
     with_fields(status=None), with_fields(reason=None), with_fields(extracted=5), with_fields(parts=None),
     with_fields(parts=[1]),
     with_fields(parts={"a": float("nan")}), with_fields(parts={"a": "x"})],
)  # fmt: skip
def test_anything_else_is_an_error_that_names_the_verifier(result):
    verdict = as_verdict("my:v", result)
    assert (verdict.score, verdict.status) == (0.0, "error")
    assert "'my:v' returned" in verdict.reason


def test_a_good_verdict_passes_as_it_is():
    verdict = with_fields(score=0.25, status="timeout", extracted="x", parts={"a": 1.0})
    assert as_verdict("v", verdict) == verdict


def test_register_refuses_a_second_owner_and_bad_names():
    assert register("numeric")(numeric) is numeric
    with pytest.raises(ValueError, match="registered already"):
        register("numeric")(resolve("format"))
    with pytest.raises(ValueError, match="without ':'"):
        register("a:b")
