"""The command line: what reaches the commands, how errors look, and how fast help answers."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rollout.errors import UserError
from rollout.toml_config import describe
from scripts.cli import TRACEBACK_VARIABLE, app, config_model, summary_lines
from scripts.score import ScoreSummary

ROOT = Path(__file__).resolve().parents[2]


class Recorder(types.ModuleType):
    """Stands in for scripts.train_command: keeps every call, and raises `error` if there is one."""

    def __init__(self) -> None:
        super().__init__("scripts.train_command")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def record(*args: Any, **kwargs: Any) -> None:
            self.calls.append((name, args, kwargs))
            if self.error:
                raise self.error

        return record


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "scripts.train_command", recorder)
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    return recorder


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["train", "c.toml"], ("run_train", (Path("c.toml"), []), {"resume": False})),
        (
            ["train", "c.toml", "seed=7", "optimizer.lr=-1"],
            ("run_train", (Path("c.toml"), ["seed=7", "optimizer.lr=-1"]), {"resume": False}),
        ),
        (["train", "c.toml", "seed=7", "--resume"], ("run_train", (Path("c.toml"), ["seed=7"]), {"resume": True})),
        (["sft", "c.toml", "seed=1"], ("run_sft", (Path("c.toml"), ["seed=1"]), {})),
        (["eval", "runs/a/checkpoints/5", "k=4"], ("run_eval", ("runs/a/checkpoints/5", ["k=4"]), {})),
        (
            ["sample", "ckpt", "1 + 1?", "--temperature", "0", "--num-samples", "3", "--template", "plain"],
            (
                "run_sample",
                (Path("ckpt"), "1 + 1?"),
                {"temperature": 0.0, "num_samples": 3, "template": "plain", "max_completion_tokens": 256},
            ),
        ),
    ],
)
def test_arguments_reach_the_command(commands: Recorder, arguments: list[str], call: tuple) -> None:
    result = run(*arguments)
    assert (result.exit_code, commands.calls) == (0, [call]), result.output


def test_user_error_is_shown_without_traceback_and_exits_2(commands: Recorder) -> None:
    commands.error = UserError("c.toml: 1 mistake\n  seed: [x] is not a number")
    result = run("train", "c.toml")
    assert result.exit_code == 2
    assert result.stderr == "error: c.toml: 1 mistake\n  seed: [x] is not a number\n"
    assert result.stdout == ""


def test_an_error_class_of_ours_exits_1(commands: Recorder) -> None:
    error_class = type("WeightSyncError", (RuntimeError,), {"__module__": "rollout.weights"})
    commands.error = error_class("engine-0 does not compute with version 3")
    result = run("train", "c.toml")
    assert (result.exit_code, result.stderr) == (1, "error: engine-0 does not compute with version 3\n")


def test_any_other_error_keeps_its_traceback(commands: Recorder) -> None:
    commands.error = ValueError("a mistake of the program")
    result = run("train", "c.toml")
    assert result.exception is commands.error
    assert "error: a mistake" not in result.output


def test_the_variable_adds_the_traceback(commands: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    commands.error = UserError("no such thing")
    code = (
        "import sys, types; m = types.ModuleType('scripts.train_command')\n"
        "from rollout.errors import UserError\n"
        "def fail(*a, **k): raise UserError('no such thing')\n"
        "m.run_train = fail; sys.modules[m.__name__] = m\n"
        "from scripts.cli import app; app(['train', 'c.toml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("error: no such thing\n")


def test_an_interrupt_exits_130_quietly(commands: Recorder) -> None:
    commands.error = KeyboardInterrupt()
    result = run("train", "c.toml")
    assert (result.exit_code, result.output) == (130, "")


def test_a_command_can_choose_its_exit_status(commands: Recorder) -> None:
    commands.error = SystemExit(130)
    assert run("train", "c.toml").exit_code == 130


@pytest.mark.parametrize(
    "arguments", [["train"], ["nonsense"], ["score", "x.jsonl"], ["sample", "c", "q", "--num-samples", "0"]]
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_help_answers_in_under_a_second() -> None:
    """CPU seconds of the fastest of three, so that a busy machine does not decide."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "scripts.cli", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        for command in ("train", "sft", "eval", "score", "sample", "report", "doctor", "config"):
            assert f" {command} " in done.stdout
    assert min(seconds) < 1.0


def test_score_scores_a_file(tmp_path: Path) -> None:
    rows = [
        {"completion": "<answer>42</answer>", "answer": 42},
        {"completion": "<answer>41</answer>", "answer": 42},
        {"completion": "no idea", "answer": 42},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("score", str(source), "--verifier", "numeric", "--out", str(out), "--num-workers", "1")
    assert result.exit_code == 0, result.output
    verdicts = [json.loads(line)["verdict"] for line in out.read_text().splitlines()]
    assert [verdict["status"] for verdict in verdicts] == ["correct", "wrong", "unparsable"]
    assert "mean score 0.3333" in result.output
    assert f"written to {out}" in result.output


def test_score_names_a_missing_file(tmp_path: Path) -> None:
    result = run("score", str(tmp_path / "none.jsonl"), "--verifier", "numeric", "--out", str(tmp_path / "out.jsonl"))
    assert result.exit_code == 2
    assert "none.jsonl" in result.stderr
    assert "Traceback" not in result.stderr


def test_summary_lines() -> None:
    summary = ScoreSummary(
        num_rows=200,
        counts={"correct": 150, "wrong": 50, "unparsable": 0, "timeout": 0, "error": 0},
        mean_score=0.75,
        seconds=0.5,
        rows_per_s=400.0,
        worker_restarts=2,
    )
    assert summary_lines(summary) == [
        "200 rows in 0.5 s (400 rows/s)",
        "mean score 0.7500",
        "  correct         150   75.0%",
        "  wrong            50   25.0%",
        "  verifier processes replaced: 2",
    ]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_config_lists_every_field_with_its_description(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    result = run("config", command)
    assert result.exit_code == 0, result.output
    rows = describe(config_model(command))
    assert len(rows) > 20
    assert [row.path for row in rows if row.path not in result.output] == []
    assert [row.path for row in rows if not row.description] == []


def test_config_prints_a_good_file_resolved() -> None:
    path = ROOT / "configs" / "quickstart.toml"
    result = run("config", "train", str(path), "seed=11")
    assert result.exit_code == 0, result.output
    resolved = tomllib.loads(result.stdout)
    assert resolved["seed"] == 11
    assert {row.path.partition(".")[0] for row in describe(config_model("train"))} >= resolved.keys()


def test_config_rejects_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("no_such_key = 1\n")
    result = run("config", "train", str(path))
    assert result.exit_code == 2
    assert "no_such_key: unknown key" in result.stderr


def test_config_of_an_unknown_command_exits_2() -> None:
    result = run("config", "report")
    assert result.exit_code == 2
    assert "'report' has no config" in result.stderr


def test_report_of_a_folder_that_is_no_run_exits_2(tmp_path: Path) -> None:
    result = run("report", str(tmp_path))
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr


def test_running_without_a_command_prints_help() -> None:
    assert "Usage" in run().output


def test_nothing_heavy_is_needed_to_start(tmp_path: Path) -> None:
    """With torch, ray, vllm and transformers unimportable, help still answers."""
    for name in ("torch", "ray", "vllm", "transformers", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "scripts.cli", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
