"""Answers that are impossible to evaluate, judged in one of four places, with the times and the growth of memory.

`python -m scripts.bench_magnitude PLACE` prints one JSON object; PLACE is main, thread, pool or ray. Each place is a
process of its own, so that the growth is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.bench_sets import Pair

PLACES = ("main", "thread", "pool", "ray")
DEADLINE_S = 5.0

_TOWERS = [
    "9^{9^{9^{9}}}", "10^{10^{10^{10}}}", "2003^{2002^{2001}}", "10^{10^9}", "2^{2^{2^{2^{2^{2}}}}}",
    "0.5^{10^{12}}", "(10^9)!", "100000000!", "((10^6)!)!", "(((((5!)!)!)!)!)!", "\\binom{10^9}{5\\cdot10^8}",
    "\\binom{2000000}{1000000}", "(x+1)^{100000}", "(1+x+x^2)^{20000}", "(a+b+c+d+e)^{500}",
    "\\sum_{k=1}^{10^9}\\frac{1}{k}", "\\prod_{k=1}^{10^8}k", "\\sum_{i=1}^{10^5}\\sum_{j=1}^{10^5}ij",
    "\\sqrt[10^9]{7^{10^9}}", "\\log_2(2^{2^{2^{2^{10}}}})", "e^{e^{e^{e^{e^{e}}}}}", "\\sin(10^{10^{10}})",
    "\\frac{1}{10^{10^{10}}}", "1.5e999999999", "10^{-10^{9}}", "\\frac{5^{5^{5^5}}-5}{16}",
    "x^{2000}-3x^{1999}+1=0", "\\int_0^{10^9} x^{1000}e^{x}dx", "\\lfloor \\pi\\cdot 10^{10^8}\\rfloor",
    "7^{7^{7^7}} \\pmod{10}", "\\underbrace{11\\ldots1}_{10^9}", "\\gcd(10^{10^8}, 6)", "\\max(9^{9^9}, 8^{8^8})",
    "F_{10^{12}}",
]  # fmt: skip
_DEEP = [
    "\\frac{1}{" * 400 + "x" + "}" * 400, "(" * 5000 + "1" + ")" * 5000, "\\sqrt{" * 1000 + "2" + "}" * 1000,
    "x+" * 5000 + "1", "9" * 100_000, "1." + "3" * 50_000, "2^" * 3000 + "2", "\\{" * 2000, "1," * 20_000 + "1",
    "\\left(" * 3000, "\\text{" * 2000, "\\pm 1 " * 500, "\\begin{pmatrix}" * 300,
    "\\begin{pmatrix}" + "1&" * 5000 + "1\\end{pmatrix}", "-" * 10_000 + "1", "!" * 5000, "x^{x^{" * 500,
    "\\cup(1,2)" * 2000, "|" * 3000, "\\sin " * 3000 + "x", "1=" * 3000 + "1", "a_{" * 1000 + "1" + "}" * 1000,
    "\\", "\\" * 50_000, "\\(" * 10_000, "{" * 50_000,
]  # fmt: skip

# Ray runs in a program of its own: what it starts ends with it.
_IN_RAY = """
import json, os, ray
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
from scripts.bench_magnitude import judge_all
print(json.dumps(ray.get(ray.remote(judge_all).remote())))
ray.shutdown()
"""


def magnitude_pairs() -> list[Pair]:
    """Answers that are short to write and impossible to evaluate, or long and deep: each against a small gold and back."""
    pairs = [Pair(f"5 / {text[:24]}", "5", f"\\boxed{{{text}}}", False) for text in (*_TOWERS, *_DEEP)]
    pairs += [Pair(f"{text[:24]} / 5", text, "\\boxed{5}", False) for text in _TOWERS]
    pairs += [Pair(f"{text[:24]} / itself + 1", text, f"\\boxed{{{text}+1}}", False) for text in _TOWERS]
    return pairs


def measure(place: str) -> dict[str, Any]:
    """Run the set in `place` in a new process; raises RuntimeError with its last words if it fails."""
    done = subprocess.run([sys.executable, "-m", __name__, place], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the magnitude set in {place!r} failed: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def judge_all() -> dict[str, Any]:
    """Every pair judged where this is called: seconds per call, statuses, accepted pairs, growth of the peak in MB."""
    from verifiers import resolve
    from verifiers.task import PlainTask

    math = resolve("math")
    math("\\boxed{\\sin^2 x+\\cos^2 x}", PlainTask(answer="1"))  # what is imported once is not growth
    before = peak_mb()
    seconds: list[float] = []
    statuses: Counter[str] = Counter()
    accepted: list[str] = []
    for pair in magnitude_pairs():
        start = time.perf_counter()
        verdict = math(pair.completion, PlainTask(answer=pair.answer))
        seconds.append(time.perf_counter() - start)
        statuses[verdict.status] += 1
        if verdict.score:
            accepted.append(pair.name)
    return _report(seconds, statuses, accepted, peak_mb() - before)


def judge_in_pool() -> dict[str, Any]:
    """The same through `ScorePool`: the growth is that of the largest worker, from the time it is ready."""
    from verifiers.pool import ScorePool, VerifierSpec
    from verifiers.task import PlainTask

    pairs = magnitude_pairs()
    with ScorePool([VerifierSpec("math", "math")], 2, DEADLINE_S) as pool:
        pool.score(["\\boxed{\\sin^2 x+\\cos^2 x}"] * 8, [PlainTask(answer="1")] * 8)
        before = {pid: peak_mb(pid) for pid in pool.worker_pids}
        verdicts = pool.score([pair.completion for pair in pairs], [PlainTask(answer=pair.answer) for pair in pairs])
        growth = [peak_mb(pid) - before[pid] for pid in pool.worker_pids if pid in before]
        replaced = pool.counters["worker_restarts"]
    if replaced:
        raise RuntimeError(f"{replaced} workers were replaced, so that their growth is not known")
    statuses = Counter(verdict.status for verdict in verdicts)
    accepted = [pair.name for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.score]
    return _report([verdict.elapsed_s for verdict in verdicts], statuses, accepted, max(growth))


def peak_mb(pid: int | str = "self") -> float:
    """The largest resident memory that a process has had since it started, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/{pid}/status has no VmHWM line")


def _report(seconds: list[float], statuses: Counter[str], accepted: list[str], growth_mb: float) -> dict[str, Any]:
    ordered = sorted(seconds)
    return {
        "n": len(seconds),
        "median_ms": 1000 * ordered[len(ordered) // 2],
        "max_ms": 1000 * ordered[-1],
        "growth_mb": max(0.0, growth_mb),
        "statuses": dict(statuses),
        "accepted": accepted,
    }


def main(place: str) -> None:
    """Judge in `place` and print the report."""
    if place == "ray":
        done = subprocess.run([sys.executable, "-c", _IN_RAY], capture_output=True, text=True, check=False)
        sys.stderr.write(done.stderr)
        if done.returncode != 0:
            raise SystemExit(done.returncode)
        print(done.stdout.strip().splitlines()[-1])
        return
    if place == "thread":
        found: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: found.append(judge_all()))
        thread.start()
        thread.join()
        report = found[0]
    else:
        report = judge_in_pool() if place == "pool" else judge_all()
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
