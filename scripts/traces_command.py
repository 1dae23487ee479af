"""`groupzero traces`: gather a teacher's traces, select among them, and show where each went."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.traces import TracesConfig, check_sources, make_traces
from rollout.interrupt import RunInterrupted
from rollout.run import RunRecord
from rollout.toml_config import load_config, to_toml
from scripts.display import Display

INTERRUPTED = 130


def run_traces(config_path: Path, overrides: Sequence[str], *, resume: bool) -> None:
    """Make the traces of a config, go on with a run that was stopped, or show the result of one that is finished."""
    config = load_config(TracesConfig, config_path, overrides)
    if (summary := _finished(config)) is not None:
        print_summary(summary, config.run_path)
        return
    check_sources(config)
    text = to_toml(config)
    record = RunRecord.open(config.run_path, config.model_dump(mode="json"), text, resume=resume, command="traces")
    with record, Display() as display:
        try:
            summary = make_traces(config, record, display)
        except KeyboardInterrupt as interrupt:  # RunInterrupted is one, and says what it has kept
            display.close()
            said = (
                str(interrupt) if isinstance(interrupt, RunInterrupted) else "stopped at once; what is in raw/ is kept"
            )
            console = Console(highlight=False)
            console.print(f"{said}\ngo on with\n  {record.command_to_resume}", markup=False, soft_wrap=True)
            sys.exit(INTERRUPTED)
    print_summary(summary, config.run_path)


def _finished(config: TracesConfig) -> dict[str, Any] | None:
    """The summary of a run that was done before with just this config; None otherwise."""
    path = config.run_path / "summary.json"
    if not path.exists() or (config.run_path / "config.toml").read_text() != to_toml(config):
        return None
    return json.loads(path.read_text())


def print_summary(summary: dict[str, Any], run_dir: Path) -> None:
    """What came of each source, the funnel, and where it is."""
    table = Table("source", "traces", "lost")
    for name, counts in summary["sources"].items():
        lost = ", ".join(f"{count} {kind}" for kind, count in counts["lost"].items())
        table.add_row(name, str(counts["traces"]), lost or "0")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{summary['num_raw']} traces = {summary['num_kept']} kept + {summary['num_dropped']} dropped", style="bold"
    )
    console.print(f"traces   {run_dir / 'traces.parquet'}", markup=False, soft_wrap=True)
    console.print(f"card     {run_dir / 'README.md'}", markup=False, soft_wrap=True)
