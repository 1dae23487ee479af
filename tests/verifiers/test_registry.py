"""Names, options, plug-in paths, entry points, and what a plug-in may return."""

import importlib.metadata
import subprocess
import sys
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest

from rollout.records import Task
from verifiers import GoldAudit, Verdict, VerifierLookupError, known_names, prepare, register, registry, resolve
from verifiers.calling import as_verdict, timeout_of
from verifiers.numeric import Numeric, numeric

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

from dataclasses import dataclass
from verifiers import GoldAudit

@dataclass(frozen=True)
class Near:
    tolerance: float
    unit: str = "m"
    timeout_s = 30.0
    def __post_init__(self):
        if self.tolerance < 0: raise ValueError(f"tolerance is {self.tolerance}; it must not be negative")
    def __call__(self, completion, task): return abs(float(completion) - task.answer) <= self.tolerance
    def prepare(self, task): return GoldAudit(status="ok", reason=self.unit)
class Anything:
    def __init__(self, **options): self.options = options
    def __call__(self, completion, task): return len(self.options)
class Silent:
    pass
"""


@pytest.fixture(autouse=True)
def plugin(tmp_path, monkeypatch):
    (tmp_path / "registry_plugin.py").write_text(PLUGIN)
    (tmp_path / "registry_broken.py").write_text("import no_such_thing_at_all\n")
    (tmp_path / "registry_quits.py").write_text("raise SystemExit('bye')\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_built_in_names():
    assert {"numeric", "format"} <= set(known_names())
    assert resolve("numeric") == numeric


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numric", "unknown verifier 'numric', did you mean 'numeric'.*known: all_of, .*numeric"),
        ("registry_plugn:f", "importing 'registry_plugn' failed with ModuleNotFoundError"),
        ("registry_broken:f", "importing 'registry_broken' failed with ModuleNotFoundError: .*no_such_thing_at_all"),
        ("registry_quits:f", "importing 'registry_quits' failed with SystemExit: bye"),
        ("registry_plugin:by_lenght", "has no 'by_lenght', did you mean 'by_length'"),
        ("registry_plugin:constant", "is a int, not a function"),
        ("registry_plugin:needs_three", "can't be called as f.completion, task.: missing a required argument: 'c'"),
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
    assert register("numeric")(Numeric) is Numeric
    with pytest.raises(ValueError, match="registered already"):
        register("numeric")(resolve("format"))
    with pytest.raises(ValueError, match="without ':'"):
        register("a:b")


TASK = Task(task_id="t", prompt="", answer=4, metadata={})


def test_an_async_plugin_is_awaited():
    assert resolve("registry_plugin:waits")("x", TASK).score == 1.0


def test_a_class_takes_its_fields_as_options():
    near = resolve("registry_plugin:Near", {"tolerance": 0.5})
    assert [near(text, TASK).status for text in ("4.4", "4.6")] == ["correct", "wrong"]
    assert (prepare(near, TASK), timeout_of(near, TASK)) == (GoldAudit(status="ok", reason="m"), 30.0)
    assert resolve("registry_plugin:Anything", {"a": 1, "b": 2})("", TASK).score == 2.0
    assert (prepare(resolve("registry_plugin:judge"), TASK), timeout_of(numeric, TASK)) == (None, 0.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("registry_plugin:Near", {"tolerance": 1, "unt": "m"}, "no option 'unt', did you mean 'unit'.; options: tol"),
        ("registry_plugin:Near", {}, "needs the option 'tolerance'"),
        ("registry_plugin:Near", {"tolerance": -1}, "'registry_plugin:Near': tolerance is -1; it must not be negative"),
        ("registry_plugin:Near", {"tolerance": "x"}, "'registry_plugin:Near': TypeError"),
        ("registry_plugin:by_length", {"a": 1}, "is a function and takes no options, but was given 'a'"),
        ("registry_plugin:Silent", {}, "is a Silent, not a function"),
        ("numeric", {"tolerance": 1}, "'numeric' has no option 'tolerance'; options: it has none"),
        ("length", {"longst": 5}, "verifier 'length' has no option 'longst', did you mean 'longest'"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(VerifierLookupError, match=message):
        resolve(name, options)


def test_every_built_in_is_known_without_being_imported():
    expected = "math numeric choice exact code json_schema format language length repetition by_task all_of first_of"
    assert set(expected.split()) | {"weighted", "trl", "verl", "reasoning_gym"} <= set(known_names())
    code = (
        "import sys, verifiers; print(*sorted(n for n in sys.modules if n.startswith(('verifiers.', 'sympy', 'json'))))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert loaded == {"verifiers.calling", "verifiers.registry", "verifiers.task", "verifiers.verdict"}


def test_registering_classes_and_names_that_are_taken():
    @register("registry_test_scale")
    @dataclass(frozen=True)
    class Scale:
        factor: float = 1.0

        def __call__(self, completion, task):
            return self.factor * len(completion)

    assert resolve("registry_test_scale", {"factor": 0.25})("ab", TASK).score == 0.5
    with pytest.raises(TypeError, match="must be a frozen dataclass"):
        register("registry_test_other")(type("Loose", (), {}))
    with pytest.raises(ValueError, match="'length' is registered already"):
        register("length")(Scale)


def test_entry_points_are_found_by_name(monkeypatch):
    points = [
        importlib.metadata.EntryPoint("by_length", "registry_plugin:by_length", registry.ENTRY_POINT_GROUP),
        importlib.metadata.EntryPoint("gone", "no_such_module_here:f", registry.ENTRY_POINT_GROUP),
        importlib.metadata.EntryPoint("numeric", "registry_plugin:by_length", registry.ENTRY_POINT_GROUP),
    ]
    asked = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: asked.append(group) or points)
    registry._entry_points.cache_clear()
    try:
        assert resolve("numeric") == numeric
        assert asked == []
        assert resolve("by_length")("ab", TASK).score == 0.5
        assert {"by_length", "gone"} <= set(known_names())
        with pytest.raises(VerifierLookupError, match="'gone': loading its entry point 'no_such_module_here:f' failed"):
            resolve("gone")
        assert set(asked) == {"groupzero.verifiers"}
    finally:
        registry._entry_points.cache_clear()
