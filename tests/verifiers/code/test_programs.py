"""Programs in many styles pass, wrong ones and tricks do not, in all three modes; several at once, as a pool runs them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.verifiers.code import programs_asserts, programs_call, programs_stdin
from tests.verifiers.code.support import PlainTask, need_namespaces
from verifiers.code_verifier import CodeVerifier

TABLES = {"stdin": programs_stdin, "call": programs_call, "asserts": programs_asserts}


def judged(verifier, table):
    """The verdicts on a table of programs: name -> (verdict, source)."""
    with ThreadPoolExecutor(4) as executor:
        verdicts = executor.map(lambda each: verifier(f"```python\n{each[0]}\n```", PlainTask(each[1])), table.values())
        return dict(zip(table, verdicts, strict=True))


@pytest.mark.parametrize("mode", sorted(TABLES))
def test_honest_programs_pass(mode):
    need_namespaces()
    verdicts = judged(CodeVerifier(timeout_s=20.0), TABLES[mode].HONEST)
    assert {name: verdict.reason for name, verdict in verdicts.items() if verdict.status != "correct"} == {}


@pytest.mark.parametrize("mode", sorted(TABLES))
def test_wrong_programs_and_tricks_do_not(mode):
    """Nor is any of them an error of the verifier's own."""
    need_namespaces()
    verdicts = judged(CodeVerifier(timeout_s=0.7), TABLES[mode].WRONG)
    bad = {name: verdict.status for name, verdict in verdicts.items() if verdict.status not in ("wrong", "timeout")}
    assert bad == {}
    assert {verdict.score for verdict in verdicts.values()} == {0.0}


# Its semaphores are files in the host's /dev/shm, which is closed to programs here.
NEEDS_NAMESPACES = ("process pool",)


def test_limits_only_judges_alike():
    honest = {**programs_stdin.HONEST, **programs_call.HONEST, **programs_asserts.HONEST}
    for name in NEEDS_NAMESPACES:
        del honest[name]
    few = {name: program for place, (name, program) in enumerate(honest.items()) if place % 3 == 0}
    few |= {name: program for name, program in honest.items() if "numpy" in name}
    verdicts = judged(CodeVerifier(timeout_s=20.0, sandbox="limits-only"), few)
    assert {name: verdict.reason for name, verdict in verdicts.items() if verdict.status != "correct"} == {}
    tricks = {name: programs_stdin.WRONG[name] for name in ("deep directories", "kill everybody", "delete files")}
    verdicts = judged(CodeVerifier(timeout_s=0.7, sandbox="limits-only"), tricks)
    assert {verdict.status for verdict in verdicts.values()} <= {"wrong", "timeout"}


def test_helpers_are_the_prompts_own():
    """A program that defines the helper of its tests to suit itself is judged by the prompt's."""
    need_namespaces()
    faked = "def encode(s): return s\ndef decode(s): return s"
    source, answer = programs_asserts.HONEST["helper of the program"]
    prompt = programs_asserts.SHIFT_PROMPT
    verifier = CodeVerifier()
    prompts = (prompt, f"Complete this:\n```python\n{prompt}```\n", [{"role": "user", "content": prompt}])
    for each in prompts:
        assert verifier(source, PlainTask(answer, each)).status == "correct"
        assert verifier(faked, PlainTask(answer, each)).status == "wrong"
    for each in (
        "",
        "Write decode.",
        "class A: pass\n" + prompt.replace("def encode(s):", "def encode(s, a=A):\n    A\n"),
    ):
        assert verifier(source, PlainTask(answer, each)).status == "correct"
