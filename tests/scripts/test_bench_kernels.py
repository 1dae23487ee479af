"""The kernels' benchmark: its cases are computed and checked on small shapes, its exit codes and table on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import bench_kernels
from scripts.kernel_benchmarks import BenchCase, Shape, bench_layer, bench_learner, bench_products, bench_rows, measure
from scripts.kernel_benchmarks.measure import Limits, Result

SMALL = Shape("small", 512, 2, 4, 256, 128)
HEAD = bench_learner.Head("small", 64, 32, 300)
ATTENTION = bench_learner.Attention("small", (40, 24), 2, 16, 16, 16)


def small_cases() -> list[BenchCase]:
    learner = bench_learner.cases([], "cpu", [HEAD], [ATTENTION])
    return [
        *(case for module in (bench_layer, bench_products, bench_rows) for case in module.cases([SMALL], "cpu")),
        *learner,
    ]


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
def test_every_contender_of_every_case_is_checked_and_right(case: BenchCase) -> None:
    contenders = case.prepare()
    assert case.flops + case.bytes > 0
    for name, run in contenders.ours.items():
        assert contenders.error(run()) <= contenders.tolerance, name
    for name, run in contenders.peers.items():
        assert contenders.error(run()) < 0.5, name  # bf16 against FP8, and padding that is not zero


def test_the_check_finds_what_is_wrong() -> None:
    case = next(case for case in small_cases() if case.name == "grouped_wgrad down")
    contenders = case.prepare()
    got = contenders.ours["ours"]()
    assert contenders.error(got * 1.01) > contenders.tolerance
    got[-1].fill_(torch.nan)
    assert contenders.error(got) == float("inf")


def test_flops_of_the_layer_are_those_of_its_products() -> None:
    layer = bench_layer.cases([SMALL], "cpu")[0]
    products = {case.name: case.flops for case in bench_products.cases([SMALL], "cpu")}
    passes = 2 * products["grouped_gemm gate+up"] + 2 * products["grouped_gemm down"]
    assert layer.flops == passes + products["grouped_wgrad gate+up"] + products["grouped_wgrad down"]


def test_without_a_gpu_it_says_so_and_exits_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernels.main([]) == 2
    assert "sees no GPU here" in capsys.readouterr().err


def test_a_dry_run_lists_the_chosen_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main(["--dry-run", "--only", "grouped_wgrad gate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["grouped_wgrad gate+up"] * 4
    assert all("TFLOP" in line for line in lines)


def test_a_row_has_speeds_floor_and_ratio() -> None:
    case = BenchCase("op", "shape", lambda: None, flops=2e12, bytes=1e9)  # type: ignore[arg-type,return-value]
    best = Limits(bf16_flops=5e14, bytes_per_s=1e12)  # floor: 2 ms for the FP8 products, 1 ms for the bytes
    cells = bench_kernels.row(case, "ours", Result(0.004, 1e-3, 2**20), best, 0.002).strip("| ").split(" | ")
    assert cells == ["op", "shape", "ours", "4.000", "500", "250", "0.50", "2.00", "1.0e-03", "1"]
    failed = bench_kernels.row(case, "peer", Result(1.0, 1.0, 0, "RuntimeError: no"), best, 0.002)
    assert failed == "| op | shape | peer | - | - | - | - | - | RuntimeError: no | - |"


def test_wrong_results_and_a_spent_budget_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "limits", lambda device: Limits(5e14, 1e12))
    monkeypatch.setattr(bench_kernels, "heading", lambda best: ["head"])
    monkeypatch.setattr(bench_kernels, "measured_rows", lambda case, best: ([f"| {case.name} |"], case.name != "bad"))
    good, bad = (BenchCase(name, "s", lambda: None) for name in ("good", "bad"))  # type: ignore[arg-type,return-value]
    assert bench_kernels.report([good], 60, tmp_path / "table.md") == 0
    assert (tmp_path / "table.md").read_text().startswith("head\n| good |\n")
    assert bench_kernels.report([bad, good], 60, None) == 1
    assert bench_kernels.report([good], -1, None) == 3
    assert "Not measured, because -1 s were over: good (s)." in capsys.readouterr().out


def test_a_contender_that_is_wrong_or_fails_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "poison_free_memory", lambda: None)
    monkeypatch.setattr(measure, "median_s", lambda run: 1.0)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    assert measure.measure(lambda: 1, lambda got: 0.5, None) == Result(1.0, 0.5)
    assert measure.measure(lambda: 1, lambda got: 0.5, 0.1).problem == "WRONG: error 5.00e-01 above 1e-01"
    assert measure.measure(lambda: 1, lambda got: float("nan"), 0.1).problem.startswith("WRONG")

    def fail() -> None:
        raise NotImplementedError("not on this device\nsecond line")

    assert measure.measure(fail, lambda got: 0.0, 0.1).problem == "NotImplementedError: not on this device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the suite would run")
def test_the_gpu_suite_says_what_is_missing(tmp_path: Path) -> None:
    script = Path(bench_kernels.__file__).with_name("gpu_suite.sh")
    done = subprocess.run(
        [script, tmp_path / "results"], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "sees no GPU: run this on a machine with a Hopper GPU" in done.stderr
    assert not (tmp_path / "results").exists()
