"""`groupzero distill`: from a config file to a student, once; and what is refused before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from policy.checkpoint import load_policy
from rollout.errors import UserError
from scripts.distill_command import run_distill
from tests.distill.student_builders import LLAMA, make_traces, save_student, write_traces

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = {"source": "generator", "generator": "arithmetic", "split": "heldout"}
BASE: dict[str, Any] = {
    "name": "base",
    "max_steps": 4,
    "num_documents": 4,
    "num_threads": 1,
    "tokenizer_documents": 60,
    "data": {"source": "generator", "generator": "arithmetic_corpus"},
    "model": LLAMA,
    "optimizer": {"decay_steps": 2},
    "eval": {
        "data": HELD_OUT,
        "num_problems": 1,
        "num_samples": 1,
        "every_steps": 2,
        "max_completion_tokens": 4,
        "decay_at_pass_at_1": 0.0,
    },
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config file beside its traces and its student."""
    monkeypatch.chdir(ROOT)
    write_traces(tmp_path / "traces.parquet", make_traces(6))
    save_student(tmp_path / "init")
    values = {
        "name": "student",
        "run_dir": str(tmp_path / "run"),
        "num_traces": 3,
        "student": {"init": str(tmp_path / "init")},
        "data": {"path": str(tmp_path / "traces.parquet"), "max_tokens": 128},
        "trainer": {"lr": 1e-3, "num_threads": 1},
        "engine": {"kind": "torch", "placement": "in_process", "max_model_len": 128},
        "eval": {
            "data": HELD_OUT,
            "verifier": "numeric",
            "num_problems": 2,
            "max_completion_tokens": 4,
            "num_workers": 1,
        },
    }
    (tmp_path / "student.toml").write_text(tomli_w.dumps(values))
    return tmp_path / "student.toml"


def test_it_prints_before_and_after_and_is_done_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_distill(config, [])
    said = capsys.readouterr().out
    assert "pass@1" in said
    assert f"student  {config.parent / 'run' / 'checkpoints' / 'step-000002'}" in said
    metrics = (config.parent / "run" / "metrics.jsonl").read_bytes()
    run_distill(config, [])
    assert "pass@1" in capsys.readouterr().out
    assert (config.parent / "run" / "metrics.jsonl").read_bytes() == metrics
    with pytest.raises(UserError, match=r"trainer.lr: 0.001 -> 0.1"):
        run_distill(config, ["trainer.lr=0.1"])


def test_the_base_of_the_student_is_made_where_the_config_asks_for_one(config: Path, tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(tomli_w.dumps(BASE | {"output_dir": str(tmp_path / "bases")}))
    changes = ["student.init=null", f"student.sft_config={tmp_path / 'base.toml'}", "template=r1_zero", "eval=null"]
    run_distill(config, changes)
    base = json.loads((tmp_path / "run" / "base.json").read_text())
    student = load_policy(tmp_path / "run" / "checkpoints" / "step-000002").config
    assert student == load_policy(Path(base["folder"])).config
    with pytest.raises(UserError, match="trains the base on 'r1_zero'"):
        run_distill(config, [*changes, "template=plain", f"run_dir={tmp_path / 'other'}"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.path=nowhere.parquet", "nowhere.parquet is not there"),
        ("student.init=nowhere", "nowhere"),
        ("student.init=configs", "config.json"),
        ("tracking.trackers=['neptune']", "tracking.trackers"),
    ],
)
def test_what_is_missing_is_named_before_the_run_has_a_folder(config: Path, override: str, says: str) -> None:
    with pytest.raises(Exception, match=says):
        run_distill(config, [override])
    assert not (config.parent / "run").exists()
