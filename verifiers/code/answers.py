"""The gold of a programming task: its tests, read and checked once."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["stdin", "call", "asserts"]


class AnswerError(ValueError):
    """The gold can't be used; `status` is that of the audit."""

    def __init__(self, message: str, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


@dataclass(frozen=True)
class Tests:
    """Tests of one task: `cases` hold `input`/`output` (stdin) or `args`/`expected` (call); asserts are one text."""

    mode: Mode
    cases: tuple[Mapping[str, Any], ...] = ()
    entry_point: str | None = None
    test_code: str = ""
    language: str | None = None

    @property
    def num_tests(self) -> int:
        return max(1, len(self.cases))


def parse_answer(answer: Any) -> Tests:
    """The tests in a task's `answer` (an object, or its JSON text); raises `AnswerError` with what is wrong."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except (ValueError, RecursionError) as exc:
            raise AnswerError(f"it is text, but not JSON ({exc})", is_missing=not answer.strip()) from exc
    if answer is None or (isinstance(answer, Mapping) and not answer):
        raise AnswerError("it is empty; it needs `mode` and tests", is_missing=True)
    if not isinstance(answer, Mapping):
        raise AnswerError(f"it is a {type(answer).__name__}, not an object with `mode` and tests")
    readers = {"stdin": _stdin, "call": _call, "asserts": _asserts}
    mode = answer.get("mode")
    if not isinstance(mode, str) or mode not in readers:
        raise AnswerError(f"`mode` is {mode!r:.60}, not one of {', '.join(readers)}")
    language = answer.get("language")
    if language is not None and not isinstance(language, str):
        raise AnswerError(f"`language` is a {type(language).__name__}, not text")
    return readers[mode](answer, language)


def _cases(answer: Mapping[str, Any], wanted: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    tests = answer.get("tests")
    if not isinstance(tests, Sequence) or isinstance(tests, str):
        raise AnswerError(f"`tests` is {type(tests).__name__}, not a list")
    if not tests:
        raise AnswerError("`tests` is empty", is_missing=True)
    for number, test in enumerate(tests):
        if not isinstance(test, Mapping):
            raise AnswerError(f"test {number} is a {type(test).__name__}, not an object")
        if missing := [key for key in wanted if key not in test]:
            raise AnswerError(f"test {number} has no `{missing[0]}`; it has {', '.join(map(repr, test))}")
    return tuple(tests)


def _stdin(answer: Mapping[str, Any], language: str | None) -> Tests:
    cases = _cases(answer, ("input", "output"))
    for number, test in enumerate(cases):
        for key in ("input", "output"):
            if not isinstance(test[key], str):
                raise AnswerError(f"`{key}` of test {number} is a {type(test[key]).__name__}, not text")
    return Tests("stdin", cases, language=language)


def _call(answer: Mapping[str, Any], language: str | None) -> Tests:
    name = answer.get("fn_name")
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise AnswerError(f"`fn_name` is {name!r:.60}, not the name of a function")
    cases = _cases(answer, ("args", "expected"))
    for number, test in enumerate(cases):
        if not isinstance(test["args"], list | tuple | Mapping):
            raise AnswerError(f"`args` of test {number} is a {type(test['args']).__name__}, not a list or an object")
    return Tests("call", cases, entry_point=name, language=language)


def _asserts(answer: Mapping[str, Any], language: str | None) -> Tests:
    code, entry = answer.get("test_code"), answer.get("entry_point")
    if isinstance(code, list) and all(isinstance(line, str) for line in code):
        code = "\n".join(code)
    if not isinstance(code, str) or not code.strip():
        raise AnswerError("`test_code` is not text with tests", is_missing=not code)
    if entry is not None and (not isinstance(entry, str) or not entry.isidentifier()):
        raise AnswerError(f"`entry_point` is {entry!r:.60}, not the name of a function")
    return Tests("asserts", entry_point=entry, test_code=code, language=language)


def check_test_code(code: str) -> None:
    """Raise `AnswerError` unless `code` is Python and tests something."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        raise AnswerError(f"`test_code` is not Python: {exc}") from exc
    tests = any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(tree))
    if not tests and "TestCase" not in code:
        raise AnswerError("`test_code` asserts nothing")
