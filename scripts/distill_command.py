"""`groupzero distill`: load the config, make the student's base if the config asks for one, train, print before and after."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from distill.lora import check_peft
from distill.sft import SftConfig, train_sft
from distill.student import distill
from distill.student_config import DistillConfig
from rollout.errors import UserError
from rollout.interrupt import RunInterrupted
from rollout.run import Observer, RunRecord
from rollout.toml_config import load_config, to_toml
from rollout.trackers import check_trackers
from scripts.display import Display

INTERRUPTED = 130


def run_distill(config_path: Path, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Train a student, or go on with a run that was stopped or killed; of one that is finished, print the result."""
    config = load_config(DistillConfig, config_path, overrides)
    if (summary := _finished(config)) is not None:
        print_summary(summary, config.run_path)
        return
    base_config = _base_config(config)
    _check_files(config)
    check_trackers(config.tracking.trackers)
    if config.lora is not None:
        check_peft()
    record = RunRecord.open(
        config.run_path, config.model_dump(mode="json"), to_toml(config), resume=resume, command="distill"
    )
    with record, Display() as display:
        try:
            base, base_s = _base(config, base_config, record, display)
            summary = distill(config, base, record, display, base_s=base_s)
        except RunInterrupted as interrupt:
            display.close()
            _stopped(str(interrupt), record.command_to_resume)
        except KeyboardInterrupt:
            display.close()
            _stopped("stopped at once, without saving this step", record.command_to_resume)
    print_summary(summary, record.run_dir)


def print_summary(summary: dict[str, Any], run_dir: Path) -> None:
    """The measurements before and after, and where the student is."""
    console = Console(highlight=False)
    if "pass_at_1_after" in summary:
        table = Table("held-out accuracy", "before", "after")
        k = summary["k_after"]
        for name, key in (
            ("pass@1", "pass_at_1"),
            (f"pass@{k}", "pass_at_k"),
            (f"majority@{k}", "majority_at_k"),
            ("greedy", "greedy"),
        ):
            table.add_row(name, f"{summary[f'{key}_before']:.3f}", f"{summary[f'{key}_after']:.3f}")
        console.print(table)
    spent = ", ".join(f"{stage} {s:.0f}" for stage, s in summary["seconds_by_stage"].items() if s >= 0.05)
    console.print(f"{summary['num_steps']} steps, {summary['wall_s']:.0f} s in all: {spent}", markup=False)
    console.print(f"student  {summary['checkpoint']}", markup=False, soft_wrap=True)
    console.print(f"run      {run_dir}", markup=False, soft_wrap=True)


def _base_config(config: DistillConfig) -> SftConfig | None:
    """The config of the base to make, with this run's seed; None where the student is a checkpoint or new."""
    if config.student.sft_config is None:
        return None
    base = load_config(SftConfig, config.student.sft_config, [f"seed={config.seed}"])
    if base.template != config.template and config.template != "chat":
        raise UserError(
            f"template={config.template!r}, but {config.student.sft_config} trains the base on {base.template!r}."
        )
    return base


def _check_files(config: DistillConfig) -> None:
    """UserError, before anything is made, for a student or traces that are not there."""
    from policy.checkpoint import read_config
    from rollout.tokenizer import load_tokenizer

    if config.student.init is not None:
        read_config(config.student.init)
    if (folder := config.student.init or config.student.tokenizer) is not None:
        load_tokenizer(folder)
    if not config.data.path.exists():
        raise UserError(f"data.path={config.data.path} is not there: make it with `groupzero traces CONFIG`.")


def _base(
    config: DistillConfig, base: SftConfig | None, record: RunRecord, observer: Observer
) -> tuple[Path | None, float]:
    """The folder of the first weights, None for a new student, and the seconds spent on it."""
    if base is None:
        return config.student.init, 0.0
    result = train_sft(base, observer)
    recorded = record.run_dir / "base.json"
    if recorded.exists() and json.loads(recorded.read_text())["folder"] != str(result.folder):
        raise UserError(
            f"{recorded} names another base than {config.student.sft_config} makes now ({result.folder}): the config or the "
            f"code has changed since this run began. Remove {record.run_dir} to begin anew."
        )
    record.write_json("base", {"folder": str(result.folder), "pass_at_1": result.pass_at_1})
    observer.message(f"base of the student: pass@1 {result.pass_at_1:.3f}, {result.folder}")
    return result.folder, result.seconds


def _finished(config: DistillConfig) -> dict[str, Any] | None:
    """The summary of a run that was done before with just this config; None otherwise."""
    path = config.run_path / "summary.json"
    if not path.exists() or (config.run_path / "config.toml").read_text() != to_toml(config):
        return None
    return json.loads(path.read_text())


def _stopped(text: str, command: str) -> NoReturn:
    console = Console(highlight=False)
    console.print(text, markup=False, soft_wrap=True)
    if command not in text:
        console.print(f"go on with\n  {shlex.join(shlex.split(command))}", markup=False, soft_wrap=True)
    sys.exit(INTERRUPTED)
