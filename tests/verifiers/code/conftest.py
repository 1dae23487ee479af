"""A verifier in each isolation that this machine offers."""

from __future__ import annotations

import pytest

from tests.verifiers.code.support import PlainTask, need_namespaces
from verifiers.code_verifier import CodeVerifier


@pytest.fixture(params=["auto", "limits-only"])
def sandbox(request):
    """Each isolation in turn; `limits-only` is there on every Linux."""
    if request.param == "auto":
        need_namespaces()
    return request.param


@pytest.fixture
def judge(sandbox):
    """`judge(program, answer, **options)`: the verdict on a program in a fence."""

    def judged(source, answer, tag="python", **options):
        verifier = CodeVerifier(**{"sandbox": sandbox, "timeout_s": 3.0, **options})
        return verifier(f"```{tag}\n{source}\n```", PlainTask(answer))

    return judged
