"""DESIGN's arrows, walked: which folder may import which, the three homes, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "verifiers": set(),
    "policy": set(),
    "rollout": {"policy", "verifiers"},
    "grpo": {"rollout", "verifiers", "policy"},
    "distill": {"rollout", "verifiers", "policy"},
    "scripts": {"grpo", "distill", "rollout", "verifiers", "policy"},
    "tests": {"grpo", "distill", "rollout", "verifiers", "policy", "scripts"},
}
HOMES: dict[str, tuple[str, ...]] = {
    "ray": ("rollout/cluster.py",),
    "vllm": ("rollout/vllm_engine.py", "rollout/vllm_worker.py"),
    "triton": ("policy/kernels/*_triton.py",),
}
NOT_IN: dict[str, set[str]] = {
    "policy": {"pydantic", "ray", "vllm", "datasets"},
    "verifiers": {"torch", "transformers", "ray", "vllm", "datasets"},
}
# vLLM loads its worker extension by name, in its own process; kernels are imported only where they are launched.
TOP_LEVEL_ALLOWED = {"vllm": {"rollout/vllm_worker.py"}, "triton": {"policy/kernels/*_triton.py"}}
# The command line's own tests, those beside this file, which drive the whole program through it, and the GPU's, which
# check what the benchmarks measure.
SCRIPTS_MAY_BE_IMPORTED_BY = ("tests/scripts/*.py", "tests/*.py", "tests/policy/kernels/test_gpu.py")
DYNAMIC = {"importlib.import_module", "import_module", "__import__"}


@dataclass(frozen=True)
class Import:
    """One import of one module: the top-level name, and whether it runs as soon as the module is imported."""

    path: str
    line: int
    name: str
    is_top_level: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.name}"


def imports_of(path: str, source: str) -> Iterator[Import]:
    """Every absolute import in a module, `importlib.import_module("x")` included; type-checking blocks never run."""

    def walk(node: ast.AST, is_top_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for inner in child.body:
                    yield from walk(ast.Module([inner], []), False)
                for inner in child.orelse:
                    yield from walk(ast.Module([inner], []), is_top_level)
                continue
            for name, line in names_in(child):
                yield Import(path, line, name, is_top_level)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, is_top_level and not inside)

    return walk(ast.parse(source, path), True)


def names_in(node: ast.AST) -> list[tuple[str, int]]:
    """Top-level names of what one node imports."""
    if isinstance(node, ast.Import):
        return [(alias.name.partition(".")[0], node.lineno) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = (node.module or "").partition(".")[0]
        return [(package if node.level == 0 else "." * node.level, node.lineno)]
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in {
        "importlib.import_module",
        "import_module",
        "__import__",
    }
    if is_call and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
        return [(node.args[0].value.partition(".")[0], node.lineno)]
    return []


def modules() -> list[Path]:
    return sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def all_imports() -> list[Import]:
    found: list[Import] = []
    for path in modules():
        found += imports_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    return found


def is_at(path: str, patterns: tuple[str, ...] | set[str]) -> bool:
    return any(Path(path).match(pattern) for pattern in patterns)


def breaches(found: list[Import]) -> list[str]:
    """What breaks the table, the homes or the lightness rules, one line each."""
    lines: list[str] = []
    for item in found:
        folder = item.path.partition("/")[0]
        if item.name in MAY_IMPORT and item.name != folder and item.name not in MAY_IMPORT[folder]:
            allowed = ", ".join(sorted(MAY_IMPORT[folder])) or "none of our folders"
            lines.append(f"{item}, but {folder}/ may import {allowed}")
        if item.name == "scripts" and folder == "tests" and not is_at(item.path, SCRIPTS_MAY_BE_IMPORTED_BY):
            lines.append(f"{item}, but only tests/scripts/ and the tests of the whole may")
        if item.name in NOT_IN.get(folder, set()):
            lines.append(f"{item}, but {folder}/ never does")
        if item.name in HOMES and folder != "tests":
            if not is_at(item.path, HOMES[item.name]):
                lines.append(f"{item}, but its home is {', '.join(HOMES[item.name])}")
            elif item.is_top_level and not is_at(item.path, TOP_LEVEL_ALLOWED.get(item.name, set())):
                lines.append(f"{item} when it is imported itself: import it inside the function that needs it")
        if item.name.startswith("."):
            lines.append(f"{item}: write the full module name")
    return lines


def test_every_import_follows_the_table() -> None:
    assert modules(), "no modules found: the walk looks in the wrong place"
    assert breaches(all_imports()) == []


def test_a_launcher_of_kernels_imports_them_lazily() -> None:
    """Without triton `policy` must import: a *_triton module is imported inside functions only."""
    eager: list[str] = []
    for path in modules():
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith("tests/") or relative.endswith("_triton.py"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and "_triton" in ast.unparse(node):
                eager.append(f"{relative}:{node.lineno}")
    assert eager == []


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("policy/a.py", "from rollout.records import Task", "may import none of our folders"),
        ("verifiers/a.py", "def f():\n    import torch", "verifiers/ never does"),
        ("policy/a.py", "import pydantic.fields", "policy/ never does"),
        ("grpo/a.py", "import distill", "grpo/ may import"),
        ("distill/a.py", "from grpo import losses", "distill/ may import"),
        ("grpo/a.py", "import scripts.cli", "grpo/ may import"),
        ("tests/grpo/a.py", "import scripts.cli", "only tests/scripts/"),
        ("grpo/a.py", "def f():\n    import ray", "its home is rollout/cluster.py"),
        ("grpo/a.py", "import importlib\nimportlib.import_module('vllm.config')", "its home is rollout/vllm_engine.py"),
        ("rollout/cluster.py", "import ray", "inside the function"),
        ("rollout/cluster.py", "try:\n    import ray\nexcept ImportError:\n    ray = None", "inside the function"),
        ("rollout/cluster.py", "class A:\n    import ray", "inside the function"),
        ("rollout/vllm_engine.py", "from vllm import LLM", "inside the function"),
        ("policy/kernels/x.py", "import triton", "its home is policy/kernels/*_triton.py"),
        ("rollout/a.py", "from . import records", "full module name"),
    ],
)
def test_a_breach_is_found(path: str, source: str, says: str) -> None:
    found = breaches(list(imports_of(path, source)))
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rollout/cluster.py", "def f():\n    import ray"),
        ("rollout/cluster.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray"),
        ("rollout/vllm_worker.py", "from vllm.v1 import x"),
        ("policy/kernels/norm_triton.py", "import triton.language as tl"),
        ("policy/a.py", "from policy.config import PolicyConfig"),
        ("tests/scripts/test_cli.py", "from scripts.cli import app"),
        ("tests/test_end_to_end.py", "from scripts.cli import app"),
        ("tests/rollout/test_a.py", "import ray"),
    ],
)
def test_an_allowed_import_is_not_a_breach(path: str, source: str) -> None:
    assert breaches(list(imports_of(path, source))) == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("grpo.learner", {"ray", "vllm"}),
        ("grpo.losses", {"ray", "vllm", "transformers", "datasets"}),
        ("policy.deepseek", {"ray", "vllm", "pydantic", "datasets", "triton.language"}),
        ("rollout.cluster", {"ray", "vllm", "torch"}),
        ("rollout.vllm_engine", {"ray", "vllm"}),
        ("verifiers.worker", {"torch", "transformers", "ray", "vllm", "datasets", "numpy"}),
        ("verifiers.pool", {"torch", "transformers", "ray", "vllm", "datasets", "numpy"}),
        ("scripts.cli", {"torch", "transformers", "ray", "vllm", "pydantic", "datasets", "numpy"}),
    ],
)
def test_importing_it_loads_none_of_these(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({unwanted!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
