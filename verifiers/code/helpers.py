"""Helper functions that the tests use and the task's prompt defines: the prompt's own, so that no program can fake them.

HumanEval/32 tests `find_zero` with `poly`, /38 and /50 decode with what their prompts encode with. A helper is taken if
it is a function at the top level of the prompt, or of a fence in it, with a body, and needs nothing but built-ins,
modules of `remote.SHARED_MODULES` and other such functions. Classes stay the program's: it has to know its arguments.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence
from typing import Any

from verifiers.code import remote

_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
_Definition = ast.FunctionDef | ast.Import | ast.ImportFrom


def prompt_text(prompt: object) -> str:
    """A prompt as text: itself, or the contents of its messages."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple):
        return ""
    contents = [message.get("content") for message in prompt if isinstance(message, dict)]
    return "\n\n".join(content for content in contents if isinstance(content, str))


def functions(prompt: str, wanted: Sequence[str], entry: str | None) -> dict[str, Any]:
    """The functions of `wanted`, but for the one under test, that the prompt defines; run only where tests are run."""
    definitions = _definitions(prompt, entry)
    known = _known_names(definitions)
    usable = [node for node in definitions if not isinstance(node, ast.FunctionDef) or _free_names(node) <= known]
    names = {node.name for node in usable if isinstance(node, ast.FunctionDef)} & set(wanted)
    if not names:
        return {}
    namespace: dict[str, Any] = {"__builtins__": builtins}
    tree = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *usable], [])
    exec(compile(ast.fix_missing_locations(tree), "prompt.py", "exec", dont_inherit=True), namespace)
    return {name: namespace[name] for name in names}


def _definitions(prompt: str, entry: str | None) -> list[_Definition]:
    """The functions with a body, the one under test left out, and the imports at the top level of the prompt's code."""
    for text in (prompt, *(match[1] for match in _FENCED.finditer(prompt))):
        try:
            body = ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        found: list[_Definition] = [node for node in body if isinstance(node, ast.Import) and _is_shared(node)]
        found += [node for node in body if isinstance(node, ast.ImportFrom) and node.module in remote.SHARED_MODULES]
        found += [n for n in body if isinstance(n, ast.FunctionDef) and n.name != entry and _has_body(n)]
        if any(isinstance(node, ast.FunctionDef) for node in found):
            return found
    return []


def _is_shared(node: ast.Import) -> bool:
    return all(alias.name in remote.SHARED_MODULES for alias in node.names)


def _has_body(node: ast.FunctionDef) -> bool:
    """Whether a function is more than a docstring, `pass` or `...`."""
    return not all(isinstance(each, ast.Pass) or _is_constant(each) for each in node.body)


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _known_names(definitions: Sequence[_Definition]) -> set[str]:
    names = set(dir(builtins))
    for node in definitions:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        else:
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return names


def _free_names(function: ast.FunctionDef) -> set[str]:
    """The names that a function's body reads and nothing in it binds."""
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return {node.id for node in names} - bound
