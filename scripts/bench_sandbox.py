"""`code` and its sandbox, measured: verdicts on labelled sets, speed, hostile runs beside honest ones, what they leave.

`python -m scripts.bench_sandbox [DATA_FOLDER] [--sets cases,humaneval,...,neighbours,speed] [--json FILE]`
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from scripts.bench_sandbox_sets import SETS, Row
from verifiers.code import sandbox
from verifiers.code.hostile import HONEST, HOSTILE
from verifiers.code.isolation import describe_isolation, prove_isolation
from verifiers.code_verifier import CodeVerifier
from verifiers.verdict import Verdict

DATA = Path(__file__).resolve().parents[2] / "shared/data"
PARTS = (*SETS, "neighbours", "speed", "escape")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Task:
    answer: Any
    prompt: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Verdicts on one set: how many are as labelled, and which are not."""

    set_name: str
    n: int
    agreeing: int
    statuses: dict[str, int]
    seconds: float
    slowest_s: float
    mistakes: list[str]


def judge(verifier: CodeVerifier, row: Row) -> Verdict:
    """The verdict on one row, its program in a fence, with the time it took."""
    start = time.perf_counter()
    verdict = verifier(f"```python\n{row.source}\n```", _Task(row.answer))
    return Verdict(**{**verdict.to_dict(), "elapsed_s": time.perf_counter() - start})


def run_set(name: str, data: Path, verifier: CodeVerifier, num_threads: int) -> Agreement:
    """Judge a whole set, `num_threads` programs at once."""
    rows = list(SETS[name](data))
    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as executor:
        verdicts = list(executor.map(lambda row: judge(verifier, row), rows))
    seconds = time.perf_counter() - start
    wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if not _agrees(row, v)]
    return Agreement(
        set_name=name,
        n=len(rows),
        agreeing=len(rows) - len(wrong),
        statuses=dict(Counter(verdict.status for verdict in verdicts)),
        seconds=seconds,
        slowest_s=max(verdict.elapsed_s for verdict in verdicts),
        mistakes=[f"{row.name}: {verdict.status}: {verdict.reason}" for row, verdict in wrong],
    )


def _agrees(row: Row, verdict: Verdict) -> bool:
    return verdict.status != "error" and (verdict.status == "correct") == row.expected


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Hostile runs with honest ones among them: how many of each were misjudged, and what was left of it all.

    `left_*`: beyond what was there before, after the last fork server ended. `worst_overrun_s`: by how much the slowest
    hostile verdict exceeded the time limit.
    """

    hostile_runs: int
    honest_runs: int
    hostile_accepted: int
    honest_refused: int
    errors: int
    seconds: float
    worst_overrun_s: float
    left_processes: list[str]
    left_files: list[str]
    left_sockets: int
    left_descriptors: int


def run_neighbours(num_runs: int, num_at_once: int, timeout_s: float) -> Neighbours:
    """`num_runs` hostile runs, `num_at_once` at a time, an honest one after every fourth."""
    verifier = CodeVerifier(timeout_s=timeout_s, total_timeout_s=20 * timeout_s)
    honest = [Row(f"honest: {name}", source, answer, True) for name, (source, answer) in HONEST.items()]
    hostile = [Row(each.name, each.source, each.answer, False) for each in HOSTILE]
    rows: list[Row] = []
    for number in range(num_runs):
        rows.append(hostile[number % len(hostile)])
        if number % 4 == 3:
            rows.append(honest[number // 4 % len(honest)])
    sandbox.close_all()
    before = _Traces.take()
    start = time.perf_counter()
    with ThreadPoolExecutor(num_at_once) as executor:
        verdicts = list(executor.map(lambda row: judge(verifier, row), rows))
    seconds = time.perf_counter() - start
    sandbox.close_all()
    after = _Traces.take()
    for _ in range(50):  # the kernel takes a moment to bury the last ones on a busy machine
        if after.processes <= before.processes:
            break
        time.sleep(0.1)
        after = _Traces.take()
    pairs = list(zip(rows, verdicts, strict=True))
    return Neighbours(
        hostile_runs=num_runs,
        honest_runs=len(rows) - num_runs,
        hostile_accepted=sum(not row.expected and v.status == "correct" for row, v in pairs),
        honest_refused=sum(row.expected and v.status != "correct" for row, v in pairs),
        errors=sum(v.status == "error" for v in verdicts),
        seconds=seconds,
        worst_overrun_s=max(v.elapsed_s for row, v in pairs if not row.expected) - timeout_s,
        left_processes=sorted(after.processes - before.processes),
        left_files=sorted(after.files - before.files),
        left_sockets=after.sockets - before.sockets,
        left_descriptors=after.descriptors - before.descriptors,
    )


@dataclass(frozen=True)
class _Traces:
    """What runs could leave behind: processes of ours or of the sandbox's users, files in /tmp, sockets, descriptors."""

    processes: frozenset[str]
    files: frozenset[str]
    sockets: int
    descriptors: int

    @classmethod
    def take(cls) -> _Traces:
        own = os.readlink("/proc/self/ns/pid")
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                is_ours = "verifiers.code" in command or os.readlink(entry / "ns/pid") != own
            except OSError:
                continue
            if is_ours:
                found.add(f"{entry.name} {command[:60]}")
        files = {str(path) for folder in ("/tmp", "/dev/shm") for path in Path(folder).glob("groupzero-*")}
        links = [_link(path) for path in Path("/proc/self/fd").iterdir()]
        return cls(frozenset(found), frozenset(files), sum(link.startswith("socket") for link in links), len(links))


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Trivial programs, one after another: per second of wall time, and per second of processor time (one core)."""

    mode: str
    per_second: float
    per_core_second: float


def run_speed(num_runs: int) -> list[Speed]:
    """The three modes, each a whole verdict with one test."""
    verifier = CodeVerifier()
    one = {
        "stdin": ("print(int(input()) ** 2)", {"mode": "stdin", "tests": [{"input": "3\n", "output": "9\n"}]}),
        "call": (
            "def f(x):\n    return x * x",
            {"mode": "call", "fn_name": "f", "tests": [{"args": [3], "expected": 9}]},
        ),
        "asserts": (
            "def f(x):\n    return x * x",
            {"mode": "asserts", "test_code": "assert f(3) == 9", "entry_point": "f"},
        ),
    }
    results = []
    for mode, (source, answer) in one.items():
        row = Row(mode, source, answer, True)
        for _ in range(5):
            judge(verifier, row)
        cpu, start = _family_cpu_s(), time.perf_counter()
        if any(judge(verifier, row).status != "correct" for _ in range(num_runs)):
            raise RuntimeError(f"a trivial program was not judged correct in mode {mode}")
        seconds, cpu = time.perf_counter() - start, _family_cpu_s() - cpu
        results.append(Speed(mode=mode, per_second=num_runs / seconds, per_core_second=num_runs / cpu))
    return results


def _family_cpu_s() -> float:
    """Processor seconds of this process and all its descendants, dead ones included."""
    stats: dict[int, tuple[int, int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            stats[int(entry)] = (int(fields[1]), sum(map(int, fields[11:15])))
    family, grown = {os.getpid()}, True
    while grown:
        children = {pid for pid, (parent, _) in stats.items() if parent in family}
        grown = not children <= family
        family |= children
    return sum(stats[pid][1] for pid in family if pid in stats) / _TICKS


def _show(console: Console, title: str, records: Sequence[Any], fields: Sequence[str]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in fields:
        table.add_column(name.replace("_", " "), overflow="fold", justify="left" if name == fields[0] else "right")
    for record in records:
        values = record if isinstance(record, dict) else asdict(record)
        table.add_row(
            *(f"{values[name]:.2f}" if isinstance(values[name], float) else str(values[name]) for name in fields)
        )
    console.print(table, "")


def main(
    data: Annotated[Path, typer.Argument(help="folder of the labelled sets")] = DATA,
    sets: Annotated[str, typer.Option(help=f"which parts, by comma: {', '.join(PARTS)}")] = ",".join(PARTS),
    json_path: Annotated[Path | None, typer.Option("--json", help="write all figures here")] = None,
    num_threads: Annotated[int, typer.Option(min=1, help="programs at once on the labelled sets")] = 2,
    hostile_runs: Annotated[int, typer.Option(min=1)] = 1000,
    at_once: Annotated[int, typer.Option(min=1)] = 8,
    timeout_s: Annotated[float, typer.Option(min=0.1)] = 6.0,
) -> None:
    """Measure and print; exit status 1 if a labelled program was misjudged or something was left behind."""
    parts = [name.strip() for name in sets.split(",")]
    if unknown := [name for name in parts if name not in PARTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PARTS)}", param_hint="--sets")
    console = Console(width=None if Console().is_terminal else 170)
    document: dict[str, Any] = {"isolation": asdict(describe_isolation()), "cores": os.cpu_count()}
    console.print(f"isolation: {document['isolation']['isolation']}: {document['isolation']['detail']}\n")
    runs: dict[str, Callable[[], list[Any]]] = {
        "neighbours": lambda: [run_neighbours(hostile_runs, at_once, 1.0)],
        "speed": lambda: run_speed(300),
        "escape": lambda: [attempt._asdict() for attempt in prove_isolation()],
    }
    verifier = CodeVerifier(timeout_s=timeout_s, total_timeout_s=120.0)
    agreements = [run_set(name, data, verifier, num_threads) for name in parts if name in SETS]
    if agreements:
        _show(console, "agreement with the labels", agreements, ("set_name", "agreeing", "n", "seconds", "slowest_s"))
        for each in agreements:
            for mistake in each.mistakes:
                console.print(f"  {each.set_name} {mistake}", markup=False)
    document["agreement"] = [asdict(each) for each in agreements]
    for name in parts:
        if name in runs:
            results = [each if isinstance(each, dict) else asdict(each) for each in runs[name]()]
            _show(console, name, results, tuple(results[0]))
            document[name] = results
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=2) + "\n")
    raise typer.Exit(0 if _is_good(document) else 1)


def _is_good(document: dict[str, Any]) -> bool:
    left = [each for each in document.get("neighbours", []) if each["left_processes"] or each["left_files"]]
    misjudged = any(each["agreeing"] < each["n"] for each in document["agreement"])
    escaped = any(not each["held"] for each in document.get("escape", []))
    return not (left or misjudged or escaped)


if __name__ == "__main__":
    typer.run(main)
