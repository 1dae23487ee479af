"""How a program meets its tests: by standard input, by calls of a function, by asserts. Judged outside the sandbox."""

from __future__ import annotations

import importlib
import math
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from verifiers.code import wire
from verifiers.code.answers import Tests
from verifiers.code.compare import OutputRule, as_json, same_output, same_value
from verifiers.code.helpers import prompt_text
from verifiers.code.languages import ENVIRONMENT, Toolchain
from verifiers.code.limits import Ending, Limits
from verifiers.code.remote import as_text
from verifiers.code.sandbox import Choice, Run, Session

_MIN_COMPILE_S, _COMPILE_MB, _WORK_MB = 10.0, 2048, 256


class CheckerError(RuntimeError):
    """The checker function, which is the task's own, failed or gave no usable answer."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How to run and to compare; the options of the verifier in the form that the modes need."""

    choice: Choice
    limits: Limits
    total_timeout_s: float
    stops_at_first_failure: bool
    output: OutputRule = "lines"
    float_tolerance: float = 0.0
    checker: Callable[[Mapping[str, Any], Any], Any] | None = None


@dataclass
class Result:
    """Credit in [0, 1] per test that was run, of `num_tests`; `problem` says what went wrong with the first that failed.

    `is_time` if it was out of time without having used it (it slept, or the machine was busy); `is_gold` if the tests
    themselves are at fault.
    """

    num_tests: int
    credits: list[float] = field(default_factory=list)
    problem: str | None = None
    is_time: bool = False
    is_gold: bool = False
    ran_out: bool = False

    def fail(self, test: int, problem: str, is_time: bool = False) -> None:
        """Note a failed test."""
        self.credits.append(0.0)
        if self.problem is None:
            self.problem, self.is_time = f"test {test + 1} of {self.num_tests}: {problem}", is_time

    @property
    def passed(self) -> bool:
        return self.problem is None and len(self.credits) == self.num_tests and min(self.credits) >= 1


class _Clock:
    """What is left of a sample's time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def cut(self, limits: Limits) -> Limits | None:
        """The limits of the next run within the time that is left, or None if there is none."""
        left = self._end - time.monotonic()
        if left <= 0.01:
            return None
        return replace(limits, wall_s=min(limits.wall_s, left), cpu_s=min(limits.cpu_s, left))


def judge_stdin(tool: Toolchain, source: str, tests: Tests, rules: Rules) -> Result:
    """Run the program once per test with its input; compare what it wrote with the output."""
    result = Result(len(tests.cases))
    clock = _Clock(rules.total_timeout_s)
    with Session(rules.choice, "python" if tool.language == "python" else "native") as session:
        if problem := _compile(session, tool, source, clock, rules):
            result.fail(0, problem)
            return result
        for number, test in enumerate(tests.cases):
            limits = clock.cut(_run_limits(tool, rules.limits))
            if limits is None:
                result.ran_out = True
                result.fail(number, f"the sample's {rules.total_timeout_s:g} s are over", is_time=True)
                break
            role, job = _job(tool, source, limits)
            with session.run(role, job, limits, stdin=_to_bytes(test["input"])) as run:
                ending = run.wait()
                problem = _ending_problem(ending, limits, run)
                output = run.output()
            if problem is None:
                _credit_output(result, number, test, output, rules)
            else:
                result.fail(number, problem, _is_idle(ending, limits))
            if result.problem is not None and rules.stops_at_first_failure:
                break
    return result


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _credit_output(result: Result, number: int, test: Mapping[str, Any], output: bytes, rules: Rules) -> None:
    text = output.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    if rules.checker is not None:
        _credit_checked(result, number, test, text, rules.checker)
    elif same_output(test["output"].replace("\r\n", "\n"), text, rules.output, rules.float_tolerance):
        result.credits.append(1.0)
    else:
        result.fail(number, f"wrong output {_shown(text)}")


def _credit_checked(
    result: Result, number: int, test: Mapping[str, Any], given: Any, checker: Callable[[Mapping[str, Any], Any], Any]
) -> None:
    try:
        credit = float(checker(dict(test), given))
    except Exception as exc:  # (the checker is the task's own code; the verdict says it)
        raise CheckerError(f"the checker failed on test {number + 1}: {type(exc).__name__}: {exc}") from exc
    if not 0 <= credit <= 1:  # NaN included
        raise CheckerError(f"the checker gave {credit} for test {number + 1}, not a bool or a share from 0 to 1")
    if credit >= 1:
        result.credits.append(1.0)
        return
    result.fail(number, f"the checker gave {credit:g} to {_shown(given)}")
    result.credits[-1] = credit


def _shown(value: Any) -> str:
    """A value in at most 80 characters, whatever its size."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else f"{value[:79]}…")
    if isinstance(value, list | dict) and len(value) > 40:
        return f"a {type(value).__name__} of {len(value)} items"
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):  # an integer too long to print, a value too deep
        return f"a {type(value).__name__} too large to show"


def load_checker(path: str) -> Callable[[Mapping[str, Any], Any], Any]:
    """The function at `"package.module:function"`: `(test, output or returned value) -> bool or share`."""
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise TypeError(f"{path} is not a function")
    return found


def _run_limits(tool: Toolchain, limits: Limits) -> Limits:
    if tool.language == "python":
        return limits
    extra = 0 if tool.limits_address_space else 256  # the runtime's own
    return replace(
        limits, limits_address_space=tool.limits_address_space, memory_mb=limits.memory_mb + extra, num_open_files=256
    )


def _job(tool: Toolchain, source: str, limits: Limits) -> tuple[Any, dict[str, Any]]:
    if tool.language == "python":
        return "program", {"source": source}
    arguments = [each.replace("{memory_mb}", str(max(16, limits.memory_mb - 256))) for each in tool.run]
    return "command", {"files": {}, "arguments": arguments, "environment": ENVIRONMENT}


def _compile(session: Session, tool: Toolchain, source: str, clock: _Clock, rules: Rules) -> str | None:
    """Put the program into the session's /program, compiled if it must be; what went wrong."""
    if tool.language == "python":
        return None
    session.make_work(_WORK_MB)
    seconds = max(_MIN_COMPILE_S, rules.limits.wall_s)
    compiling = Limits(
        wall_s=seconds, cpu_s=seconds, memory_mb=_COMPILE_MB, limits_address_space=False, file_mb=_WORK_MB, tmp_mb=256
    )
    limits = clock.cut(compiling) or replace(compiling, wall_s=0.1)
    arguments = list(tool.compile or ("/bin/true",))
    job = {"files": {tool.source_name: source}, "arguments": arguments, "environment": ENVIRONMENT}
    with session.run("command", job, limits, writes_work=True, keeps_output=True) as run:
        ending = run.wait()
        if tool.compile is None or (ending.exit_status == 0 and ending.killed is None):
            return None
        text = run.output(2000).decode(errors="replace") + run.errors()
        return f"it does not compile: {_ending_words(ending, limits)}: {text.strip()[-400:]}"


def _is_idle(ending: Ending, limits: Limits) -> bool:
    """Whether it was stopped by the clock although it had hardly used the processor."""
    return ending.killed == "time" and ending.cpu_s < 0.8 * limits.wall_s


def _ending_words(ending: Ending, limits: Limits) -> str:
    if ending.killed in ("time", "cpu") or ending.exit_status == -24:
        return f"time limit: not done after {ending.wall_s:.1f} s ({ending.cpu_s:.1f} s of processor time)"
    if ending.killed == "memory":
        return f"memory limit: {ending.max_memory_mb:.0f} MiB in use, {limits.memory_mb} allowed"
    if ending.killed == "files":
        return f"file limit: more than {limits.num_files} files or {limits.tmp_mb} MiB"
    if ending.killed == "processes":
        return f"process limit: more than {limits.num_processes}"
    if ending.exit_status < 0:
        return f"killed by signal {-ending.exit_status}"
    return f"exit status {ending.exit_status}"


def _ending_problem(ending: Ending, limits: Limits, run: Run) -> str | None:
    """Why a run does not count, whatever it wrote; None if it ended well."""
    if ending.killed is None and ending.exit_status == 0:
        return None
    words = _ending_words(ending, limits)
    lines = run.errors().strip().splitlines()
    return f"{words} ({lines[-1][:200]})" if lines and ending.killed is None else words


def judge_calls(source: str, tests: Tests, rules: Rules) -> Result:
    """Call the program's function with each test's arguments and compare the values that come back.

    One process answers all calls as long as it behaves; after a crash or a timeout the next test gets a new one.
    """
    result = Result(len(tests.cases))
    clock = _Clock(rules.total_timeout_s)
    job = {"source": source, "entry": tests.entry_point, "prelude": True}
    with Session(rules.choice) as session:
        while len(result.credits) < result.num_tests:
            first = len(result.credits)
            limits = clock.cut(rules.limits)
            if limits is None:
                result.ran_out = True
                result.fail(first, f"the sample's {rules.total_timeout_s:g} s are over", is_time=True)
                break
            # The limits are per call: the clock of each call is kept here, the run as a whole may take them all.
            whole = clock.cut(replace(limits, wall_s=math.inf, cpu_s=math.inf)) or limits
            with session.run("calls", job, whole, keeps_output=False) as run:
                _call_all(run, result, tests, limits, rules)
            if result.problem is not None and rules.stops_at_first_failure:
                break
    return result


def _call_all(run: Run, result: Result, tests: Tests, limits: Limits, rules: Rules) -> None:
    """Put tests to one process until it is through, is out of order, or a test fails and that settles it."""
    assert run.channel is not None
    channel = wire.Channel(run.channel)
    first = len(result.credits)
    try:
        channel.expect_within(limits.wall_s)
        state = channel.receive()
        if not isinstance(state, dict) or "ready" not in state:
            result.fail(first, as_text(state.get("failed") if isinstance(state, dict) else None))
            return
        for number in range(first, result.num_tests):
            test = tests.cases[number]
            channel.expect_within(limits.wall_s)
            channel.send(wire.encode(_plain(test["args"])))
            answer = channel.receive()
            _credit_value(result, number, test, answer, rules)
            if result.problem is not None and rules.stops_at_first_failure:
                return
    except TimeoutError:
        ending = run.stop()
        is_idle = ending.cpu_s < 0.8 * limits.wall_s
        result.fail(len(result.credits), f"time limit: no answer within {limits.wall_s:.1f} s", is_idle)
    except wire.ClosedError:
        ending = run.wait()
        words = _ending_words(ending, limits)
        result.fail(len(result.credits), f"it ended before it answered ({words})", _is_idle(ending, limits))
    except wire.NotPlainError as exc:
        result.fail(len(result.credits), str(exc))


def _plain(args: Any) -> Any:
    return dict(args) if isinstance(args, Mapping) else list(args)


def _credit_value(result: Result, number: int, test: Mapping[str, Any], answer: Any, rules: Rules) -> None:
    if not isinstance(answer, dict) or "value" not in answer:
        failed = answer.get("failed") if isinstance(answer, dict) else None
        not_plain = answer.get("not plain") if isinstance(answer, dict) else None
        result.fail(number, str(not_plain) if not_plain else as_text(failed))
        return
    try:
        value = as_json(wire.decode(answer["value"]))
    except (ValueError, RecursionError) as exc:
        result.fail(number, f"the returned value can't be compared: {exc}")
        return
    if rules.checker is not None:
        _credit_checked(result, number, test, value, rules.checker)
    elif same_value(test["expected"], value, rules.float_tolerance):
        result.credits.append(1.0)
    else:
        result.fail(number, f"wrong value {_shown(value)}")


def judge_asserts(source: str, tests: Tests, rules: Rules, prompt: object = None) -> Result:
    """Run the test code in one sandbox and the program in another; only calls and plain values pass between them.

    Functions that the tests use and the task's `prompt` defines are taken from there (`verifiers.code.helpers`).
    """
    result = Result(1)
    limits = rules.limits
    seconds = min(limits.wall_s, rules.total_timeout_s)
    limits = replace(limits, wall_s=seconds, cpu_s=seconds)
    theirs, ours = socket.socketpair()
    job = {
        "test_code": tests.test_code,
        "entry_point": tests.entry_point,
        "partial": not rules.stops_at_first_failure,
        "prompt": prompt_text(prompt),
    }
    tester_limits = replace(limits, wall_s=seconds + 1, cpu_s=seconds + 1)
    with Session(rules.choice) as program_session, Session(rules.choice) as test_session, theirs, ours:
        program_job = {"source": source, "channel": "peer"}
        with (
            program_session.run("calls", program_job, limits, keeps_output=False, channel=theirs) as program,
            test_session.run("tests", job, tester_limits, keeps_output=False, peer=ours) as tester,
        ):
            outcome = _outcome(tester, tester_limits)
            program_ending = program.stop()
            tester.stop()
    _credit_asserts(result, outcome, program_ending, limits)
    return result


def _outcome(tester: Run, limits: Limits) -> dict[str, Any]:
    assert tester.channel is not None
    channel = wire.Channel(tester.channel)
    channel.expect_within(limits.wall_s + 1)
    try:
        outcome = channel.receive()
    except TimeoutError:
        outcome = {"outcome": "failed", "reason": "time limit: the tests did not end"}
    except wire.ClosedError:
        words = _ending_words(tester.wait(), limits)
        outcome = {"outcome": "failed", "reason": f"the tests ended without an outcome ({words})"}
    except wire.NotPlainError as exc:
        outcome = {"outcome": "failed", "reason": str(exc)}
    return {"passed": 0, "total": 0, "reason": "", **outcome}


def _credit_asserts(result: Result, outcome: dict[str, Any], program: Ending, limits: Limits) -> None:
    if outcome["outcome"] == "passed":
        result.num_tests = max(1, outcome["total"])
        result.credits = [1.0] * result.num_tests
        return
    if outcome["outcome"] == "tests":
        result.is_gold = True
    result.problem = outcome["reason"]
    if program.killed not in (None, "cancelled"):
        result.problem, result.is_time = _ending_words(program, limits), _is_idle(program, limits)
    if outcome["total"] > 1:
        result.num_tests = outcome["total"]
        result.credits = [1.0] * outcome["passed"]
