"""Inside a sandbox of its own: runs assert-style tests against a program that lives in another sandbox.

The program's functions are references (`verifiers.code.remote`): each call is a message, each result a plain value
built here. The expected values, the asserts and the verdict's channel are out of the program's reach.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import sys
import types
from typing import Any

from verifiers.code import helpers, remote, wire

_MODULE = "__main__"
_FILE = "tests.py"


class _ProgramError(Exception):
    """The program did not get as far as its tests."""


def run(results: wire.Channel, program: wire.Channel, job: dict[str, Any]) -> None:
    """Run the tests of the job, send their outcome, and end."""
    tally = {"passed": 0, "total": 0, "reason": ""}
    sys.set_int_max_str_digits(0)
    try:
        _run(program, job, tally)
        outcome = {"outcome": "passed"}
    except _ProgramError as exc:
        outcome = {"outcome": "program", "reason": str(exc)}
    except wire.ClosedError:
        outcome = {"outcome": "program", "reason": "the program ended while it was being tested"}
    except SyntaxError as exc:
        outcome = {"outcome": "tests" if exc.filename == _FILE else "failed", "reason": f"{type(exc).__name__}: {exc}"}
    except BaseException as exc:  # noqa: BLE001  (whatever it is, the tests did not pass)
        outcome = {"outcome": "failed", "reason": _explain(exc)}
    results.send({**tally, **outcome})
    os._exit(0)


def _explain(exc: BaseException) -> str:
    place, frame = "", exc.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == _FILE:
            place = f" (line {frame.tb_lineno} of the tests)"
        frame = frame.tb_next
    return f"{remote.as_text(remote.describe(exc))}{place}"


def _run(channel: wire.Channel, job: dict[str, Any], tally: dict[str, Any]) -> None:
    tree = ast.parse(job["test_code"], _FILE)
    entry: str | None = job["entry_point"]
    try:
        state = channel.receive()
    except wire.ClosedError as exc:
        raise _ProgramError("the program ended before its tests began") from exc
    if not isinstance(state, dict) or "ready" not in state:
        raise _ProgramError(remote.as_text(state.get("failed") if isinstance(state, dict) else None))
    endpoint = remote.Endpoint(channel, remote.TestSide(_MODULE))
    module = types.ModuleType(_MODULE)
    sys.modules[_MODULE] = module
    namespace = module.__dict__
    namespace["__builtins__"] = builtins
    wanted = _wanted_names(tree, entry)
    namespace.update(_meanings(endpoint, wanted, entry))
    namespace.update(helpers.functions(job["prompt"], wanted, entry))
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if job["partial"]:
        tree = _Counted().visit(tree)
        namespace[_TALLY] = tally
        namespace["__groupzero_closed__"] = wire.ClosedError
    if "unittest" in job["test_code"]:
        import unittest

        unittest.main = lambda *_, **__: None  # type: ignore[assignment, misc]  (its cases are run below)
    exec(compile(ast.fix_missing_locations(tree), _FILE, "exec", dont_inherit=True), namespace)
    _run_definitions(tree, namespace, own, entry)
    if endpoint.failure is not None:  # the tests may have taken it for an exception of the program's
        raise endpoint.failure
    if tally["passed"] < tally["total"]:
        raise AssertionError(tally["reason"] or f"{tally['passed']} of {tally['total']} asserts hold")


def _run_definitions(tree: ast.Module, namespace: dict[str, Any], own: set[str], entry: str | None) -> None:
    """Call what the tests only define: `check(candidate)`, `test_*()` functions, unittest's cases."""
    called = {
        node.func.id
        for statement in tree.body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    if "check" in own and "check" not in called:
        if entry is None or entry not in namespace:
            raise NameError(f"the program defines no {entry!r}")
        namespace["check"](namespace[entry])
    for name in sorted(own - called):
        if name.startswith("test") and namespace[name].__code__.co_argcount == 0:
            namespace[name]()
    if "unittest" in sys.modules:
        _run_cases(namespace)


def _run_cases(namespace: dict[str, Any]) -> None:
    import unittest

    suite = unittest.TestSuite()
    for value in list(namespace.values()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase) and value.__module__ == _MODULE:
            suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(value))
    result = unittest.TestResult()
    if suite.countTestCases():
        suite.run(result)
    for _, text in [*result.failures, *result.errors]:
        raise AssertionError(text.strip().rpartition("\n")[2])


def _wanted_names(tree: ast.Module, entry: str | None) -> list[str]:
    """The names that the tests read and do not import themselves; a name bound only inside a function does no harm."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    if entry is not None:
        names.add(entry)
    return sorted(names)


def _meanings(endpoint: remote.Endpoint, wanted: list[str], entry: str | None) -> dict[str, Any]:
    """What those names stand for. A built-in is the program's only if it is the function under test.

    Where no function under test is named, it is one if the program defines nothing else that the tests use.
    """
    meanings = endpoint.names(wanted)
    shadowing = {name for name in meanings if hasattr(builtins, name)}
    if entry is not None or set(meanings) - shadowing:
        shadowing.discard(entry or "")
        meanings = {name: meaning for name, meaning in meanings.items() if name not in shadowing}
    found: dict[str, Any] = {}
    for name in wanted:
        meaning = meanings.get(name)
        is_module = name in remote.SHARED_MODULES and name != entry  # no class of that name stands in for a module
        if isinstance(meaning, dict) and not (is_module and "value" in meaning):
            _add_meaning(found, name, meaning, endpoint)
        elif name in remote.SHARED_MODULES:
            found[name] = importlib.import_module(name)
    return found


def _add_meaning(found: dict[str, Any], name: str, meaning: dict[str, Any], endpoint: remote.Endpoint) -> None:
    module = meaning.get("module", meaning.get("from"))
    if "value" in meaning:
        found[name] = endpoint.decode(meaning["value"])
        endpoint.note_class(found[name])
    elif "from" in meaning and module in remote.SHARED_MODULES:
        found[name] = getattr(importlib.import_module(module), name)
    elif isinstance(module, str) and module.partition(".")[0] in (*sys.stdlib_module_names, "numpy"):
        found[name] = importlib.import_module(module)


_TALLY = "__groupzero_tally__"


class _Counted(ast.NodeTransformer):
    """Each assert at the top level, or in a function called by no other, counts by itself instead of ending the tests."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        source = f"""
{_TALLY}["total"] += 1
try:
    pass
except __groupzero_closed__:
    raise
except Exception as __groupzero_error__:
    {_TALLY}["reason"] = {_TALLY}["reason"] or f"{{type(__groupzero_error__).__name__}}: {{__groupzero_error__}}"[:500]
else:
    {_TALLY}["passed"] += 1
"""
        wrapper = ast.parse(source)
        attempt = wrapper.body[1]
        assert isinstance(attempt, ast.Try)
        attempt.body = [node]
        block = ast.If(test=ast.Constant(True), body=wrapper.body, orelse=[])
        for each in ast.walk(block):
            if not hasattr(each, "lineno") or each is not node:
                ast.copy_location(each, node)
        return block
