"""Times and limits of the GPU: medians with a cold cache, checked results, and what the device can do at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Larger than the 50 MiB second-level cache of Hopper GPUs.
CACHE_BYTES = 256 * 2**20
MEASURED_S = 0.15
PROBLEMS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError, OSError)


class Limits(NamedTuple):
    """Measured on this device: dense bf16 products, and copying (bytes read and written per second)."""

    bf16_flops: float
    bytes_per_s: float

    def floor_s(self, flops: float, num_bytes: float, precision: str) -> float:
        """The least time for this arithmetic and traffic; FP8 products can be twice as fast as bf16's."""
        peak = self.bf16_flops * (2 if precision == "fp8" else 1)
        return max(flops / peak, num_bytes / self.bytes_per_s)


class Result(NamedTuple):
    """Of one contender: the median time, the error of what it computed, the memory it took, or what went wrong."""

    time_s: float
    error: float
    peak_bytes: int = 0
    problem: str = ""


def limits(device: str) -> Limits:
    """Measure what the device does at best."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    multiply, copy = median_s(lambda: a @ b), median_s(lambda: target.copy_(source))
    return Limits(2 * 8192**3 / multiply, 2 * 2**30 / copy)


def median_s(run: Callable[[], Any]) -> float:
    """Median seconds of one run, with nothing of it in the cache, over as many runs as fit into MEASURED_S."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    run()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < MEASURED_S and len(times) < 100):
        cache.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def poison_free_memory(share: float = 0.25) -> None:
    """Leave NaN in memory that is about to be handed out, so that what a kernel does not write is seen."""
    free, _ = torch.cuda.mem_get_info()
    torch.full((int(free * share) // 4,), torch.nan, device="cuda")


def measure(run: Callable[[], Any], error: Callable[[Any], float], tolerance: float | None) -> Result:
    """Check one run over poisoned memory, then time it; an error above `tolerance` is a problem, not a time."""
    try:
        poison_free_memory()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        found = error(made)
        del made
        if tolerance is not None and not found <= tolerance:
            return Result(float("nan"), found, peak, f"WRONG: error {found:.2e} above {tolerance:.0e}")
        return Result(median_s(run), found, peak)
    except PROBLEMS as problem:  # a peer of another version, or short of memory: the table says so
        said = (str(problem).strip() or "no message").splitlines()[0]
        return Result(float("nan"), float("nan"), 0, f"{type(problem).__name__}: {said:.90}")
