"""Every recorded answer of another trainer in a folder, computed by groupzero: `python -m scripts.check_parity DIR`.

Reads each *.json in DIR that is a list of cases (see grpo/peers.py). Exit status 1 unless every case of every file
agrees within 1e-8 in advantages, loss and gradient, and there is at least one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python scripts/check_parity.py` works too

from grpo.peers import TOLERANCE, BrokenCaseError, CaseDifference, UnsupportedPeerOptionError, check_case

NAMES = ("advantages", "loss", "grad_logprobs")


@dataclass
class Report:
    """What the cases of a file, or of several, came to."""

    num_cases: int = 0
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Take another report's cases in."""
        self.num_cases += other.num_cases
        self.failures += other.failures
        self.worst = {name: _larger(self.worst[name], other.worst[name]) for name in NAMES}

    def line(self, name: str) -> str:
        """One line of the table."""
        worst = "  ".join(f"{self.worst[key]:>13.3g}" for key in NAMES)
        return f"{name:<32}  {self.num_cases:>5}  {len(self.failures):>8}  {worst}"


def check_file(path: Path) -> Report:
    """Check every case of a file; a file that cannot be read is a failure, one without any case has none."""
    report = Report()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        report.failures.append(f"{path.name}: cannot be read as JSON: {error}")
        return report
    cases = content.get("cases") if isinstance(content, dict) else content
    if not isinstance(cases, list):
        return report
    for place, case in enumerate(cases):
        report.num_cases += 1
        if trouble := _check(case, report):
            report.failures.append(f"{path.name}:{place}: {trouble}")
    return report


def _check(case: Any, report: Report) -> str | None:
    """What is wrong with a case, None if nothing; its differences go into the report."""
    if not isinstance(case, dict):
        return f"not a case but {type(case).__name__}"
    try:
        difference = check_case(case)
    except (UnsupportedPeerOptionError, BrokenCaseError) as error:
        return str(error)
    gaps = {name: getattr(difference, name) for name in NAMES}
    report.worst = {name: _larger(report.worst[name], gaps[name]) for name in NAMES}
    return None if difference.worst <= TOLERANCE else _describe(case, difference)


def _describe(case: dict[str, Any], difference: CaseDifference) -> str:
    gaps = ", ".join(f"{name} {getattr(difference, name):.3g}" for name in NAMES)
    return f"differs by {gaps}: {case['source']} {json.dumps(case['config'])}"


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the failures; 0 if every case agrees."""
    parser = argparse.ArgumentParser(description="Check recorded answers of other trainers against groupzero's loss.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with *.json files of recorded cases")
    folder: Path = parser.parse_args(arguments).folder
    if not folder.is_dir():
        print(f"error: {folder} is not a folder: give the one that holds the recorded cases", file=sys.stderr)
        return 1
    total, skipped = Report(), []
    print(f"{'file':<32}  {'cases':>5}  {'failures':>8}  " + "  ".join(f"{name:>13}" for name in NAMES))
    for path in sorted(folder.glob("*.json")):
        report = check_file(path)
        if not report.num_cases and not report.failures:
            skipped.append(path.name)
            continue
        print(report.line(path.name))
        total.add(report)
    print(total.line("total"))
    for name in skipped:
        print(f"{name}: holds no case, left out")
    for failure in total.failures:
        print(f"FAILED {failure}")
    if not total.num_cases:
        print(f"error: no case in {folder}: it needs *.json files with lists of recorded cases", file=sys.stderr)
        return 1
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
