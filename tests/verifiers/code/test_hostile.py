"""Programs that cheat or do harm are never judged correct, nor an error of ours, and honest ones beside them still pass."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.verifiers.code.support import PlainTask, need_namespaces
from verifiers.code.hostile import HONEST, HOSTILE
from verifiers.code_verifier import CodeVerifier

SLOW_SAMPLE = ("fork bomb", "ignored signals", "thread bomb", "half a message", "stopped itself")


@pytest.mark.parametrize("mode", ["stdin", "call", "asserts"])
def test_no_hostile_program_passes(judge, mode):
    hostile = [each for each in HOSTILE if not each.slow and each.name.startswith(f"{mode}: ")]
    assert len(hostile) > 10
    with ThreadPoolExecutor(4) as executor:
        verdicts = list(executor.map(lambda each: judge(each.source, each.answer, timeout_s=1.5), hostile))
    pairs = list(zip(hostile, verdicts, strict=True))
    assert {each.name: v.reason for each, v in pairs if v.status not in ("wrong", "timeout")} == {}
    assert {verdict.score for verdict in verdicts} == {0.0}


def test_honest_neighbours_of_hostile_programs_pass():
    need_namespaces()
    verifier = CodeVerifier(timeout_s=0.7)
    patient = CodeVerifier(timeout_s=20.0)
    slow = [each for each in HOSTILE if each.slow and each.name.partition(": ")[2] in SLOW_SAMPLE]
    assert len(slow) == len(SLOW_SAMPLE)
    work = [(verifier, each.source, each.answer, False) for each in slow]
    work += [(patient, *each, True) for each in HONEST.values()] * 2
    with ThreadPoolExecutor(4) as executor:
        verdicts = list(executor.map(lambda item: item[0](f"```python\n{item[1]}\n```", PlainTask(item[2])), work))
    assert [verdict.status == "correct" for verdict in verdicts] == [item[3] for item in work]
    assert all(verdict.status != "error" for verdict in verdicts)
