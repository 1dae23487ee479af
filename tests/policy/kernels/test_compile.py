"""Every kernel compiles for Hopper, without spills, with the FP8 matrix instruction, and to the committed figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest

from policy.kernels.compile_cases import Figures, problems

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "policy" / "kernels" / "compiled.json"
GPU_TRITON = "3.6.0"
GPU_TRITON_PATH = ROOT / ".venv" / f"triton-{GPU_TRITON}"
INSTALL = f".venv/bin/pip install --no-deps --target .venv/triton-{GPU_TRITON} -r requirements/triton-gpu.txt"
GOOD = Figures(
    registers=168, spill_bytes=0, shared_bytes=1024, qgmma=8, hgmma=0, tma=3, fp8_products=1, default=True
)  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton's assembler runs on Linux")


@pytest.fixture
def compile_kernels(pytestconfig: pytest.Config):
    """Run the script with triton's cache in pytest's, so that only changed kernels compile again."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        assert pytestconfig.cache is not None
        environment = {**os.environ, "TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton"))}
        command = [sys.executable, "-m", "scripts.compile_kernels", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run


def recorded(triton_version: str) -> dict[str, dict[str, object]]:
    return json.loads(TABLE.read_text()).get(triton_version, {})


def assert_compiles_as_recorded(result: subprocess.CompletedProcess[str], triton_version: str) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"triton {triton_version}, sm_90" in result.stdout
    rows = [line.split(" | ")[0][2:] for line in result.stdout.splitlines() if line.startswith("| ")][2:]
    assert rows == sorted(recorded(triton_version))


def test_the_pinned_triton_compiles_every_kernel_to_the_recorded_figures(compile_kernels) -> None:
    installed = version("triton")
    if not recorded(installed):
        pytest.skip(f"no figures for triton {installed}: python -m scripts.compile_kernels --update records them")
    assert_compiles_as_recorded(compile_kernels(), installed)


@pytest.mark.skipif(not GPU_TRITON_PATH.is_dir(), reason=f"needs triton {GPU_TRITON} beside the pinned one: {INSTALL}")
def test_the_triton_of_gpu_machines_compiles_every_kernel_to_the_recorded_figures(compile_kernels) -> None:
    assert_compiles_as_recorded(compile_kernels("--triton-path", str(GPU_TRITON_PATH)), GPU_TRITON)


def test_the_table_holds_the_gpu_machines_triton_and_the_same_cases_for_each_version() -> None:
    table = json.loads(TABLE.read_text())
    assert GPU_TRITON in table
    assert len({frozenset(cases) for cases in table.values()}) == 1
    for cases in table.values():
        assert problems(cases, {name: Figures(**row) for name, row in cases.items()}) == []


def test_a_changed_figure_fails_until_it_is_announced(compile_kernels, tmp_path: Path) -> None:
    table = tmp_path / "compiled.json"
    assert compile_kernels("--table", str(table), "--update", "quantize/rows").returncode == 0
    written = json.loads(table.read_text())
    (cases,) = written.values()
    cases["quantize/rows"]["registers"] += 1
    before = cases["quantize/rows"]["registers"]
    table.write_text(json.dumps(written))
    result = compile_kernels("--table", str(table), "quantize/rows")
    assert result.returncode == 1
    assert f"quantize/rows: registers was {before}, is {before - 1}" in result.stdout


def test_an_unfit_triton_path_is_an_error(compile_kernels, tmp_path: Path) -> None:
    result = compile_kernels("--triton-path", str(tmp_path))
    assert result.returncode == 1
    assert f"{tmp_path} holds no triton" in result.stderr


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"spill_bytes": 360}, ["a default configuration spills 360 bytes", "spill_bytes was 0, is 360"]),
        ({"spill_bytes": 360, "default": False}, ["spill_bytes was 0, is 360", "default was True, is False"]),
        ({"qgmma": 0}, ["multiplies FP8 tiles without QGMMA", "qgmma was 8, is 0"]),
        ({"registers": 255, "tma": 0}, ["registers was 168, is 255", "tma was 3, is 0"]),
        ({}, []),
    ],
)
def test_what_counts_as_a_problem(changed: dict[str, int], says: list[str]) -> None:
    found = problems({"a": asdict(GOOD)}, {"a": replace(GOOD, **changed)})
    assert len(found) == len(says)
    for line, words in zip(found, says, strict=True):
        assert line.startswith("a: ")
        assert words in line


def test_cases_that_come_or_go_are_problems() -> None:
    assert problems({}, {"new": GOOD}) == ["new: is not in the table"]
    assert problems({"old": asdict(GOOD)}, {}) == ["old: in the table, but no such case is left"]
    spilling = replace(GOOD, spill_bytes=8, default=False, fp8_products=0, qgmma=0)
    assert problems({"a": asdict(spilling)}, {"a": spilling}) == []
