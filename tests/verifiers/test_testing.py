"""`check`: a verifier that keeps the laws passes, and each broken law is found and named."""

import pytest

from verifiers import PlainTask, numeric
from verifiers.length import Length
from verifiers.testing import LAWS, check

VERIFIERS = """
import os, random, re, time
from dataclasses import dataclass
from verifiers import GoldAudit, Verdict

kept = []
def stated(completion):
    found = re.findall(r"<answer>(.*?)</answer>", completion[:2000], re.DOTALL)
    return found[-1] if found else None

def good(completion, task): return stated(completion) == str(task.answer)
def lenient(completion, task): return stated(completion) is not None
def never(completion, task): return False
def raises(completion, task): return good(completion, task) if len(completion) < 1000 else 1 / 0
def crashes(completion, task): return os._exit(1) if "import" in completion else good(completion, task)
def hangs(completion, task):
    if completion.startswith("a" * 1000): time.sleep(60)
    return good(completion, task)
def nonsense(completion, task): return "yes" if completion == "None" else good(completion, task)
def rolls(completion, task):
    right = good(completion, task)
    parts = {"r": random.random()}
    return Verdict(score=float(right), status="correct" if right else "wrong", reason="", parts=parts)
def hoards(completion, task):
    kept.append(bytearray(b"x" * 100_000))
    return good(completion, task)
@dataclass(frozen=True)
class Audits:
    fussy: bool = False
    def __call__(self, completion, task): return good(completion, task)
    def prepare(self, task): return GoldAudit(status="ambiguous" if self.fussy and task.answer == 7 else "ok", reason="r")
"""
TASKS = [PlainTask(5), PlainTask(7), PlainTask(11)]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("laws")
    (path / "law_breakers.py").write_text(VERIFIERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path)
        yield


def broken_laws(name, **options):
    report = check(f"law_breakers:{name}", TASKS, timeout_s=1.0, strict=False, **options)
    assert [law.name for law in report.laws] == list(LAWS)
    return [law.name for law in report.broken], report


def test_one_that_keeps_the_laws_passes():
    wrong = [("<answer>6</answer>", TASKS[0])]
    report = check("law_breakers:good", TASKS, wrong)
    assert report.broken == ()
    tried = {law.name: law.num_tried for law in report.laws}
    assert (tried["gold"], tried["other"], tried["wrong"], tried["audit"]) == (3, 6, 1, 0)
    assert tried["junk"] > 150
    assert check("law_breakers:Audits", TASKS).broken == ()


@pytest.mark.parametrize(
    ("name", "laws"),
    [
        ("lenient", ["other", "junk"]),
        ("never", ["gold"]),
        ("raises", ["no_error"]),
        ("crashes", ["no_error"]),
        ("hangs", ["time"]),
        ("nonsense", ["no_error"]),
        ("rolls", ["deterministic"]),
        ("hoards", ["memory"]),
    ],
)
def test_each_broken_law_is_found(name, laws):
    assert broken_laws(name)[0] == laws


def test_golds_are_audited_with_the_options():
    found, report = broken_laws("Audits", options={"fussy": True})
    assert found == ["audit"]
    assert "gold 7: ambiguous, r" in str(report)


def test_a_broken_law_raises_with_the_report_and_may_be_skipped():
    with pytest.raises(AssertionError, match=r"(?s)1 of 9 laws broken.*gold +BROKEN 3x +3 samples.*wrong 0"):
        check("law_breakers:never", TASKS)
    assert check("law_breakers:never", TASKS, skip=["gold"]).broken == ()


def test_wrong_answers_must_not_pass():
    report = check("law_breakers:good", TASKS, [("<answer>5</answer>", TASKS[0])], strict=False)
    assert [law.name for law in report.broken] == ["wrong"]


def test_functions_and_instances_are_found_by_their_own_name():
    assert check(numeric.numeric, TASKS).verifier == "numeric"
    limits = check(Length(longest=10**7), [("short", PlainTask(None))], skip=["gold", "junk"])
    assert (limits.verifier, limits.broken) == ("length", ())
    with pytest.raises(ValueError, match="can't be found by name"):
        check(lambda completion, task: True, TASKS)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one task"):
        check("numeric", [])
    with pytest.raises(ValueError, match="'speed' is no law"):
        check("numeric", TASKS, skip=["speed"])
