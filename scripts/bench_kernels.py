"""Time and check the FP8 and learner kernels on one GPU beside their peers, as one Markdown table.

    python -m scripts.bench_kernels --out kernels.md          # all, in under ten minutes; needs a Hopper GPU
    python -m scripts.bench_kernels --only grouped_wgrad      # operations whose name or shape contains it
    python -m scripts.bench_kernels --dry-run                 # lists the cases, on any machine

Every result is checked before it is timed: ours must be right, of a peer the error is shown. The floor of a case is the
larger of its arithmetic at this device's measured speed of dense bf16 products (FP8: twice that) and its bytes at the
measured speed of copying. Exit code 2: there is no such GPU; 1: a result was wrong or failed; 3: time ran out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from policy.kernels.dispatch import choose_backend
from policy.kernels.errors import KernelUnavailableError
from scripts.kernel_benchmarks import SHAPES, BenchCase, Shape, bench_layer, bench_learner, bench_products, bench_rows
from scripts.kernel_benchmarks.measure import Limits, Result, limits, measure

# The most telling first, should time run out.
MODULES = (bench_layer, bench_products, bench_learner, bench_rows)
COLUMNS = ("Operation", "Shape", "Contender", "ms", "TFLOP/s", "GB/s", "of floor", "its time / ours", "error", "MiB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="part of the name of an operation or shape; repeat")
    parser.add_argument("--budget-s", type=float, default=560, help="begin no case after this many seconds")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--dry-run", action="store_true", help="list the cases and measure nothing")
    options = parser.parse_args(arguments)
    chosen = list(select(all_cases(SHAPES, "cuda"), options.only))
    if options.dry_run:
        print("\n".join(f"{case.name:32} {case.shape:20} {case.flops / 1e12:8.2f} TFLOP" for case in chosen))
        return 0
    if problem := missing_gpu():
        print(f"bench_kernels: {problem}", file=sys.stderr)
        return 2
    return report(chosen, options.budget_s, options.out)


def all_cases(shapes: Sequence[Shape], device: str) -> list[BenchCase]:
    """Every case of every module; nothing is allocated yet."""
    return [case for module in MODULES for case in module.cases(shapes, device)]


def select(cases: Sequence[BenchCase], only: Sequence[str]) -> Iterator[BenchCase]:
    """The cases whose name or shape contains one of `only`; all if there is none."""
    for case in cases:
        if not only or any(part.lower() in f"{case.name} {case.shape}".lower() for part in only):
            yield case


def missing_gpu() -> str:
    """Why nothing can be measured here, empty if it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU here; run it on a machine with a Hopper GPU, or with --dry-run"
    try:
        choose_backend("bench_kernels", torch.empty(0, device="cuda"))
    except KernelUnavailableError as error:
        return str(error)
    return ""


def report(cases: Sequence[BenchCase], budget_s: float, out: Path | None) -> int:
    """Measure and print; the table is written after every case, so that a run that is cut off leaves what it had."""
    started = time.monotonic()
    best = limits("cuda")
    lines, failed, left_out = heading(best), False, []
    for number, case in enumerate(cases, 1):
        if time.monotonic() - started > budget_s:
            left_out.append(f"{case.name} ({case.shape})")
            continue
        print(f"[{time.monotonic() - started:4.0f} s] {number}/{len(cases)} {case.name}, {case.shape}", file=sys.stderr)
        rows, right = measured_rows(case, best)
        failed |= not right
        lines += rows
        if out:
            out.write_text("\n".join(lines) + "\n")
    if left_out:
        lines += ["", f"Not measured, because {budget_s:.0f} s were over: {', '.join(left_out)}."]
    lines += ["", f"{time.monotonic() - started:.0f} s in all."]
    print("\n".join(lines))
    if out:
        out.write_text("\n".join(lines) + "\n")
    return 1 if failed else 3 if left_out else 0


def heading(best: Limits) -> list[str]:
    """What was measured with, and the table's head."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    speeds = (
        f"bf16 {best.bf16_flops / 1e12:.0f} TFLOP/s (FP8 taken as twice that), copy {best.bytes_per_s / 1e9:.0f} GB/s"
    )
    return [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {version}. Measured limits: {speeds}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]


def measured_rows(case: BenchCase, best: Limits) -> tuple[list[str], bool]:
    """The table's rows of one case, and whether all of ours are right."""
    contenders = case.prepare()
    ours = {name: measure(run, contenders.error, contenders.tolerance) for name, run in contenders.ours.items()}
    peers = {name: measure(run, contenders.error, None) for name, run in contenders.peers.items()}
    reference = next(iter(ours.values())).time_s
    rows = [row(case, name, result, best, reference) for name, result in {**ours, **peers}.items()]
    del contenders
    gc.collect()
    torch.cuda.empty_cache()
    return rows, not any(result.problem for result in ours.values())


def row(case: BenchCase, name: str, result: Result, best: Limits, reference_s: float) -> str:
    """One line of the table."""
    if result.problem:
        cells = ["-", "-", "-", "-", "-", result.problem, "-"]
    else:
        seconds = result.time_s
        floor = best.floor_s(case.flops, case.bytes, case.precision)
        cells = [
            f"{seconds * 1e3:.3f}",
            f"{case.flops / seconds / 1e12:.0f}" if case.flops else "-",
            f"{case.bytes / seconds / 1e9:.0f}",
            f"{floor / seconds:.2f}",
            f"{seconds / reference_s:.2f}",
            f"{result.error:.1e}",
            f"{result.peak_bytes / 2**20:.0f}",
        ]
    return f"| {' | '.join([case.name, case.shape, name, *cells])} |"


if __name__ == "__main__":
    sys.exit(main())
