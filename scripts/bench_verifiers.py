"""`math` on labelled sets, and math-verify beside it on the same rows in the same run.

`python -m scripts.bench_verifiers DATA_FOLDER [--math-verify-python PATH] [--json FILE]`. math-verify is optional: it is
run by the Python given, or by this one if it can import it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from scripts.bench_magnitude import DEADLINE_S, PLACES, measure
from scripts.bench_sets import SET_NAMES, BenchDataError, Pair, load_set

WIDE = 170  # characters, for a file or a pipe


@dataclass(frozen=True, kw_only=True)
class Result:
    """One verifier on one set. `false_positives` are of the `negatives`, `false_negatives` of the positives."""

    verifier: str
    set_name: str
    n: int
    accuracy: float
    false_positives: int
    negatives: int
    false_negatives: int
    positives: int
    unparsable: int | None
    errors: int | None
    median_ms: float
    p99_ms: float
    max_ms: float
    calls_per_s: float
    mistakes: list[str]


def run_ours(set_name: str, pairs: Sequence[Pair]) -> Result:
    """`math` on every pair, one after another in this thread."""
    from verifiers import resolve
    from verifiers.task import PlainTask

    math = resolve("math")
    accepted: list[bool] = []
    seconds: list[float] = []
    statuses: Counter[str] = Counter()
    for pair in pairs:
        start = time.perf_counter()
        verdict = math(pair.completion, PlainTask(answer=pair.answer))
        seconds.append(time.perf_counter() - start)
        accepted.append(verdict.score == 1.0)
        statuses[verdict.status] += 1
    failed = statuses["error"] + statuses["timeout"]
    return _result("math", set_name, pairs, accepted, seconds, (statuses["unparsable"], failed))


def run_peer(set_name: str, pairs: Sequence[Pair], python: str) -> Result:
    """math-verify on every pair, one after another in the main thread of a process of its own."""
    lines = "".join(json.dumps({"answer": pair.answer, "completion": pair.completion}) + "\n" for pair in pairs)
    peer = Path(__file__).with_name("math_verify_peer.py")
    done = subprocess.run([python, str(peer)], input=lines, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if len(rows) != len(pairs) + 1:
        raise BenchDataError(f"math-verify under {python} stopped after {len(rows) - 1} rows: {done.stderr[-300:]}")
    accepted, seconds = [row["accepted"] for row in rows[1:]], [row["seconds"] for row in rows[1:]]
    return _result(f"math-verify {rows[0]['math-verify']}", set_name, pairs, accepted, seconds, (None, None))


def _result(
    verifier: str,
    set_name: str,
    pairs: Sequence[Pair],
    accepted: Sequence[bool],
    seconds: Sequence[float],
    failures: tuple[int | None, int | None],
) -> Result:
    ordered = sorted(seconds)
    judged = list(zip(pairs, accepted, strict=True))
    false_positives = sum(1 for pair, yes in judged if yes and not pair.expected)
    false_negatives = sum(1 for pair, yes in judged if pair.expected and not yes)
    positives = sum(pair.expected for pair in pairs)
    return Result(
        verifier=verifier,
        set_name=set_name,
        n=len(pairs),
        accuracy=1 - (false_positives + false_negatives) / len(pairs),
        false_positives=false_positives,
        negatives=len(pairs) - positives,
        false_negatives=false_negatives,
        positives=positives,
        unparsable=failures[0],
        errors=failures[1],
        median_ms=1000 * ordered[len(ordered) // 2],
        p99_ms=1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        max_ms=1000 * ordered[-1],
        calls_per_s=len(pairs) / sum(ordered),
        mistakes=[("FP " if yes else "FN ") + pair.name for pair, yes in judged if yes != pair.expected],
    )


def results_table(results: Sequence[Result]) -> Table:
    """One row per verifier and set."""
    table = Table(title="Verdicts against labels (disputed rows left out)")
    for name in ("set", "verifier", "n", "accuracy", "FP / negatives", "FN / positives", "unparsable", "errors"):
        table.add_column(name, justify="left" if name in ("set", "verifier") else "right")
    for name in ("median ms", "p99 ms", "max ms", "calls/s"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            row.set_name,
            row.verifier,
            str(row.n),
            f"{row.accuracy:.2%}",
            f"{row.false_positives} / {row.negatives}",
            f"{row.false_negatives} / {row.positives}",
            "" if row.unparsable is None else str(row.unparsable),
            "" if row.errors is None else str(row.errors),
            f"{row.median_ms:.2f}",
            f"{row.p99_ms:.1f}",
            f"{row.max_ms:.0f}",
            f"{row.calls_per_s:,.0f}",
        )
    return table


def magnitude_table(reports: dict[str, dict[str, Any]]) -> Table:
    """One row per place in which the magnitude set ran."""
    table = Table(title=f"Answers impossible to evaluate (deadline {DEADLINE_S:g} s)")
    for name in ("place", "n", "accepted", "statuses", "median ms", "max ms", "growth MB"):
        table.add_column(name, justify="left" if name in ("place", "statuses") else "right")
    for place, row in reports.items():
        statuses = ", ".join(f"{status} {count}" for status, count in sorted(row["statuses"].items()))
        cells = (f"{row['median_ms']:.2f}", f"{row['max_ms']:.0f}", f"{row['growth_mb']:.0f}")
        table.add_row(place, str(row["n"]), str(len(row["accepted"])), statuses, *cells)
    return table


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    from importlib.metadata import version

    cpu = "unknown CPU"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.partition(":")[2].strip() for line in info.open() if line.startswith("model name")), cpu)
    load = f"{os.getloadavg()[0]:.1f}"
    versions = {"python": platform.python_version(), "sympy": version("sympy")}
    return {"cpu": cpu, "cores": str(os.cpu_count()), "load": load, **versions}


def main(
    data: Annotated[Path, typer.Argument(help="The folder that holds the labelled data sets.")],
    sets: Annotated[str, typer.Option(help="Sets to run, separated by commas.")] = ",".join(SET_NAMES),
    places: Annotated[str, typer.Option(help="Where to run the magnitude set; empty for nowhere.")] = ",".join(PLACES),
    math_verify_python: Annotated[str | None, typer.Option(help="A Python that has math-verify.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    mistakes: Annotated[bool, typer.Option(help="Name the rows judged wrongly by math.")] = False,
) -> None:
    """Run the sets through `math`, and through math-verify where there is one, and print the figures."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    if math_verify_python is None and importlib.util.find_spec("math_verify") is not None:
        math_verify_python = sys.executable
    loaded = {name: load_set(data, name) for name in sets.split(",") if name}
    results: list[Result] = []
    for name, pairs in loaded.items():
        results.append(run_ours(name, pairs))
        if math_verify_python is not None:
            results.append(run_peer(name, pairs, math_verify_python))
    console.print(results_table(results))
    reports = {place: measure(place) for place in places.split(",") if place}
    facts = machine()
    console.print(magnitude_table(reports))
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if mistakes:
        for row in results:
            if row.verifier == "math" and row.mistakes:
                console.print(*(f"{row.set_name}: {mistake}" for mistake in row.mistakes), sep="\n", markup=False)
    if json_path is not None:
        report = {"machine": facts, "sets": [asdict(row) for row in results], "magnitude": reports}
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
