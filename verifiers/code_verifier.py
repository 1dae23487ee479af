"""`code`: the program in a completion passes the task's tests, run in a sandbox."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verifiers.registry import register
from verifiers.verdict import GoldAudit, Status, TaskLike, Verdict

if TYPE_CHECKING:
    from verifiers.code.answers import Tests
    from verifiers.code.extract_program import Program
    from verifiers.code.limits import Limits
    from verifiers.code.modes import Result, Rules

_MIN_MEMORY_MB = 64
_OVERHEAD_S = 2.0


@register("code")
@dataclass(frozen=True)
class CodeVerifier:
    """Runs the program of a completion against `task.answer`, which is one of

    - `{"mode": "stdin", "tests": [{"input", "output"}]}`,
    - `{"mode": "call", "fn_name", "tests": [{"args", "expected"}]}`,
    - `{"mode": "asserts", "test_code", "entry_point"}`, each as an object or its JSON text.

    `sandbox`: `auto` (namespaces, else bubblewrap, else a verdict `error`) or `limits-only`. `timeout_s` holds per test
    (for asserts: for all), `total_timeout_s` per sample. `partial_credit` scores the share of tests passed, otherwise
    all must. `checker` ("package.module:function", trusted, run here) decides by `(test, output)` where several answers
    are right. `language` is `auto` (the fence's tag, else Python) or a language's name; an answer may state its own.
    """

    sandbox: str = "auto"
    timeout_s: float = 4.0
    total_timeout_s: float = 30.0
    memory_limit_mb: int = 1024
    max_processes: int = 64
    partial_credit: bool = False
    checker: str | None = None
    language: str = "auto"
    several_fences: str = "last"
    output: str = "lines"
    float_tolerance: float = 0.0

    def __post_init__(self) -> None:
        from verifiers.code.compare import OUTPUT_RULES
        from verifiers.code.languages import LanguageError, canonical
        from verifiers.code.sandbox import CHOICES

        for name, choices in (("sandbox", CHOICES), ("several_fences", _SEVERAL), ("output", OUTPUT_RULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for name in ("timeout_s", "total_timeout_s"):
            if not (_is_number(getattr(self, name)) and 0 < getattr(self, name) <= 86_400):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a positive number of seconds")
        if not (_is_number(self.float_tolerance) and 0 <= self.float_tolerance < 1):
            raise ValueError(f"float_tolerance is {self.float_tolerance!r}; it must be at least 0 and less than 1")
        for name, least in (("memory_limit_mb", _MIN_MEMORY_MB), ("max_processes", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
        if self.checker is not None and not _is_path(self.checker):
            raise ValueError(f'checker is {self.checker!r}; it must be of the form "package.module:function"')
        if self.language != "auto":
            try:
                canonical(self.language)
            except LanguageError as exc:
                raise ValueError(str(exc)) from exc

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        """1 if all tests pass (or the share that does, with `partial_credit`), else 0; `parts` counts the tests.

        `wrong`: a test failed, a limit was hit, it crashed. `unparsable`: no program. `timeout`: out of time without
        having used it, or the sample's time is over. `error`: the answer is unusable, the language's tools are missing,
        or the sandbox can't be had.
        """
        from verifiers.code.answers import AnswerError, parse_answer
        from verifiers.code.extract_program import extract_program
        from verifiers.code.languages import LanguageError
        from verifiers.code.modes import CheckerError
        from verifiers.code.sandbox import SandboxError

        try:
            tests = parse_answer(task.answer)
        except AnswerError as exc:
            return _verdict("error", f"the gold answer is unusable: {exc}")
        names = [tests.entry_point] if tests.entry_point else []
        try:
            language = self._language(tests)
        except LanguageError as exc:
            return _verdict("error", str(exc))
        program = extract_program(completion, names, self.several_fences, language)  # type: ignore[arg-type]
        if program is None:
            return _verdict("unparsable", "no program after the thinking")
        try:
            result = self._judge(program, tests, language, task.prompt)
        except (LanguageError, SandboxError, CheckerError) as exc:
            return _verdict("error", str(exc), program.source)
        return self._verdict(result, program)

    def _language(self, tests: Tests) -> str | None:
        """The language that the answer or the option asks for, if any; raises `LanguageError`."""
        from verifiers.code.languages import canonical

        named = tests.language or (None if self.language == "auto" else self.language)
        return None if named is None else canonical(named)

    def _judge(self, program: Program, tests: Tests, language: str | None, prompt: object) -> Result:
        from verifiers.code import languages, modes

        language = language or program.language or "python"
        tool = languages.toolchain(language, program.source)
        rules = self._rules()
        if tests.mode == "stdin":
            return modes.judge_stdin(tool, program.source, tests, rules)
        if language != "python":
            raise languages.LanguageError(f"mode {tests.mode!r} is for Python; {language} programs are run by stdin")
        if tests.mode == "call":
            return modes.judge_calls(program.source, tests, rules)
        return modes.judge_asserts(program.source, tests, rules, prompt)

    def _rules(self) -> Rules:
        from verifiers.code.modes import Rules

        return Rules(
            choice=self.sandbox,  # type: ignore[arg-type]
            limits=self._limits(),
            total_timeout_s=self.total_timeout_s,
            stops_at_first_failure=not self.partial_credit,
            output=self.output,  # type: ignore[arg-type]
            float_tolerance=self.float_tolerance,
            checker=None if self.checker is None else _load(self.checker),
        )

    def _limits(self) -> Limits:
        from verifiers.code.limits import Limits

        return Limits(
            wall_s=self.timeout_s,
            cpu_s=self.timeout_s,
            memory_mb=self.memory_limit_mb,
            num_processes=self.max_processes,
        )

    def _verdict(self, result: Result, program: Program) -> Verdict:
        passed = float(sum(result.credits))
        parts = {"tests": float(result.num_tests), "passed": passed}
        if result.passed:
            reason = f"all {result.num_tests} tests pass" if result.num_tests > 1 else "the test passes"
            return Verdict(score=1.0, status="correct", reason=reason, extracted=program.source, parts=parts)
        score = passed / result.num_tests if self.partial_credit else 0.0
        status: Status = "error" if result.is_gold else "timeout" if result.is_time else "wrong"
        problem = result.problem or "not all tests pass"
        if status == "timeout" and score > 0:  # some tests were judged: the rest counts as failed
            status = "wrong"
        if not program.is_fenced and ("SyntaxError" in problem or "IndentationError" in problem):
            status = "unparsable"
        return Verdict(score=score, status=status, reason=problem, extracted=program.source, parts=parts)

    def prepare(self, task: TaskLike) -> GoldAudit:
        """Whether the task's tests can be used: their form, and for asserts that the code is Python and asserts something."""
        from verifiers.code.answers import AnswerError, check_test_code, parse_answer
        from verifiers.code.languages import LanguageError, canonical

        try:
            tests = parse_answer(task.answer)
            if tests.language is not None:
                canonical(tests.language)
            if tests.mode == "asserts":
                check_test_code(tests.test_code)
        except AnswerError as exc:
            return GoldAudit(status="missing" if exc.is_missing else "unparsable", reason=str(exc))
        except LanguageError as exc:
            return GoldAudit(status="unparsable", reason=str(exc))
        what = f"{len(tests.cases)} tests" if tests.cases else "asserts"
        return GoldAudit(status="ok", reason=f"{what} by {tests.mode}", parsed=tests.entry_point)

    def timeout_for(self, task: TaskLike) -> float:
        """The longest that one sample of this task may take, in seconds: what a pool's deadline must leave room for."""
        from verifiers.code.answers import AnswerError, parse_answer

        try:
            tests = parse_answer(task.answer)
        except AnswerError:
            return _OVERHEAD_S
        return min(self.total_timeout_s, self.timeout_s * tests.num_tests) + _OVERHEAD_S


_SEVERAL = ("last", "first", "join")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_path(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    module, _, name = text.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


@functools.cache
def _load(path: str) -> Callable[..., Any]:
    from verifiers.code.modes import CheckerError, load_checker

    try:
        return load_checker(path)
    except (ImportError, AttributeError, TypeError) as exc:
        raise CheckerError(f"checker {path!r} can't be used: {type(exc).__name__}: {exc}") from exc


def _verdict(status: Status, reason: str, extracted: str | None = None) -> Verdict:
    return Verdict(score=0.0, status=status, reason=reason, extracted=extracted)
