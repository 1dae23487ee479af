"""Whole runs through the command line's own functions: on the torch engine, and once on vLLM in a Ray actor."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from typer.testing import CliRunner

import scripts.train_command as commands
from policy.checkpoint import load_policy
from rollout.templates import R1_ZERO
from rollout.tokenizer import load_tokenizer
from scripts.cli import app
from scripts.display import Display

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def write_config(policy_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small run's TOML; keyword arguments replace whole tables or values of it."""

    def write(**changes: Any) -> Path:
        data = {"source": "generator", "generator": "arithmetic"}
        config: dict[str, Any] = {
            "name": "tiny",
            "num_steps": 3,
            "num_prompts": 2,
            "group_size": 4,
            "run_dir": str(tmp_path / "runs" / "{name}-{seed}"),
            "policy": {"path": str(policy_dir)},
            "data": data,
            # Parity of the bytes: an untrained policy is right half of the time, so that there is something to learn.
            "rewards": [{"name": "accuracy", "verifier": "tests.end_to_end_plugins:fails_now_and_then"}],
            "sampling": {"max_completion_tokens": 16},
            "scoring": {"max_error_share": 0.9, "num_workers": 1},
            "engine": {"kind": "torch", "placement": "in_process", "max_model_len": 128},
            "learner": {"lr": 1e-3, "num_minibatches": 2, "num_threads": 1, "max_tokens_per_microbatch": 256},
            "algorithm": {"reference_refresh_steps": 2, "kl_coef": 0.01},
            "eval": {"data": {**data, "split": "heldout"}, "num_problems": 3, "num_samples": 4, "k": 2},
            "checkpoint": {"every_steps": 1, "keep_last": 2},
        }
        path = tmp_path / "config.toml"
        path.write_text(tomli_w.dumps(config | changes))
        return path

    return write


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    changing = ("seconds", "per_s", "num_reused_samples")
    return [{k: v for k, v in line.items() if not any(word in k for word in changing)} for line in metrics]


def run_cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plug-ins named in configs are imported from the working directory."""
    monkeypatch.chdir(ROOT)


def test_a_run_leaves_everything_in_its_folder(write_config: Callable[..., Path], tmp_path: Path) -> None:
    commands.run_train(write_config(), ["learner.num_minibatches=1"], resume=False)
    run = tmp_path / "runs" / "tiny-0"
    metrics = metrics_of(run)
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert all(line["logprob_gap_mean"] < 1e-5 for line in metrics)
    assert all(
        sum(line[f"status_{s}"] for s in ("correct", "wrong", "unparsable", "timeout", "error")) == 8
        for line in metrics
    )
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics[1]["kl"] > 0
    rows = pq.read_table(run / "samples.parquet").to_pylist()
    train = [row for row in rows if row["phase"] == "train"]
    assert len(train) == 3 * 2 * 4
    assert [row["phase"] for row in rows].count("eval_before") == 3 * 4
    assert [row["phase"] for row in rows].count("eval_after") == 3 * 4
    assert {(row["step"], row["policy_version_first"], row["policy_version_last"]) for row in train} == {
        (0, 0, 0),
        (1, 1, 1),
        (2, 2, 2),
    }
    failed = [row for row in train if row["status"] == "error"]
    assert all("more than I can take" in row["reason"] and row["advantage"] == 0 for row in failed)
    assert sum(line["status_error"] for line in metrics) == len(failed) > 0
    for step in range(3):
        by_task: dict[str, float] = {}
        for row in train:
            if row["step"] == step:
                by_task[row["task_id"]] = by_task.get(row["task_id"], 0.0) + row["advantage"]
        assert len(by_task) == 2
        assert all(abs(total) < 1e-4 for total in by_task.values())
    summary = json.loads((run / "summary.json").read_text())
    assert {
        "pass_at_1_before",
        "pass_at_1_after",
        "pass_at_k_after",
        "majority_at_k_after",
        "wall_s",
        "logprob_gap_mean",
    } <= summary.keys()
    assert (summary["num_steps"], summary["engine"]) == (3, "torch")
    assert set(summary["seconds_by_stage"]) == {
        "base",
        "start",
        "eval",
        "sampling",
        "scoring",
        "learning",
        "sync",
        "other",
    }
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert "<svg" in (run / "report.html").read_text()
    trained = load_policy(run / "checkpoints" / "step-000003")
    assert load_tokenizer(run / "checkpoints" / "step-000003").eos_token_id == trained.config.eos_token_id


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(checkpoint={"every_steps": 50, "keep_last": 2})
    commands.run_train(config, ["name=whole"], resume=False)

    class Impatient(Display):
        def step(self, step: int, num_steps: int, metrics: Mapping[str, Any]) -> None:
            super().step(step, num_steps, metrics)
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "Display", Impatient)
        with pytest.raises(SystemExit) as stopped:
            commands.run_train(config, ["name=cut"], resume=False)
    assert stopped.value.code == 130
    cut = tmp_path / "runs" / "cut-0"
    assert len(metrics_of(cut)) == 2
    assert run_cli("train", str(config), "name=cut")[0] == 0  # the same command goes on
    whole = tmp_path / "runs" / "whole-0"
    assert without_times(metrics_of(cut)) == without_times(metrics_of(whole))
    ours, theirs = (load_policy(run / "checkpoints" / "step-000003").state_dict() for run in (cut, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # The same command again shows the result, the same name with another config is refused; both change nothing.
    before = (cut / "metrics.jsonl").read_bytes()
    code, output = run_cli("train", str(config), "name=cut")
    assert code == 0
    assert "accuracy" in output
    code, output = run_cli("train", str(config), "name=cut", "learner.lr=0.5")
    assert code == 2
    assert "learner.lr" in output
    assert (cut / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "configs" / "algorithms").glob("*.toml")))
def test_every_preset_trains(write_config: Callable[..., Path], tmp_path: Path, preset: str) -> None:
    small = write_config()
    overrides = [
        f"extends=configs/algorithms/{preset}.toml",
        f"extends={small}",
        "learner.num_minibatches=2",
        "num_steps=2",
    ]
    overrides += ["engine.max_model_len=128", "sampling.max_completion_tokens=16", "sampling.length_schedule=[]"]
    if preset == "deepseek_v3_2":
        overrides += ["engine.return_routed_experts=true", "sampling.top_p=0.9"]
    algorithm = tomllib.loads((ROOT / "configs" / "algorithms" / f"{preset}.toml").read_text())["algorithm"]
    values = {key: value for key, value in algorithm.items() if not isinstance(value, dict)}
    overrides += [f"algorithm.{key}={json.dumps(value)}" for key, value in values.items()]
    overrides += ["algorithm.mask_truncated=false"]  # an untrained policy never comes to an end
    commands.run_train(small, overrides, resume=False)
    metrics = metrics_of(tmp_path / "runs" / "tiny-0")
    assert [line["step"] for line in metrics] == [0, 1]
    learned = [line for line in metrics if line.get("num_learned_samples")]
    assert learned
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["skipped"] == 0 for line in learned)
    # What the engine sampled from is what the learner says it sampled from, whatever was cut off or replayed.
    assert all(line["logprob_gap_mean"] < 1e-5 for line in learned)


def test_a_step_with_nothing_to_learn_says_so_and_the_run_goes_on(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = [{"name": "accuracy", "verifier": "tests.end_to_end_plugins:always_the_same"}]
    for name, algorithm, words in (
        ("equal", {"zero_variance_groups": "resample", "max_draws_per_step": 2}, "no group had two different rewards"),
        ("cut", {"mask_truncated": True}, "every completion was cut off"),
    ):
        changes = {"rewards": rewards} if name == "equal" else {"sampling": {"max_completion_tokens": 1}}
        commands.run_train(write_config(name=name, num_steps=2, algorithm=algorithm, **changes), [], resume=False)
        assert words in capsys.readouterr().out
        lines = metrics_of(tmp_path / "runs" / f"{name}-0")
        assert [(line["num_learned_samples"], line["policy_version"]) for line in lines] == [(0, 1), (0, 2)]
        assert [line["num_draws"] for line in lines] == ([2, 2] if name == "equal" else [1, 1])


@pytest.mark.parametrize(("verifier", "words"), [("fails_in_training", "8 of 8"), ("always_fails", "12 of 12")])
def test_a_verifier_that_fails_too_often_stops_the_run(
    write_config: Callable[..., Path], tmp_path: Path, verifier: str, words: str
) -> None:
    config = write_config(
        rewards=[{"name": "accuracy", "verifier": f"tests.end_to_end_plugins:{verifier}"}],
        scoring={"max_error_share": 0.5, "num_workers": 1},
    )
    code, output = run_cli("train", str(config))
    assert code == 1
    assert "no completion is good enough" in output
    assert words in output
    run = tmp_path / "runs" / "tiny-0"
    assert (run / "checkpoints" / "step-000000" / "learner.pt").exists() == (verifier == "fails_in_training")


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    run = tmp_path / "runs" / "tiny-0"

    def full_after_the_first(path: str | Path) -> Any:
        return usage._replace(free=0) if (run / "checkpoints" / "step-000001").exists() else usage

    with monkeypatch.context() as patch:
        patch.setattr("policy.atomic.shutil.disk_usage", full_after_the_first)
        code, output = run_cli("train", str(write_config()))
    assert code == 1
    assert "no space" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    commands.run_train(run / "config.toml", [], resume=True)
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2]


def test_gsm8k_rows_as_published(shared_dir: Path, policy_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "data" / "gsm8k"
    overrides = [
        "policy.sft_config=null",
        f"policy.path={policy_dir}",
        f"data.path={source / 'train.jsonl'}",
        f"eval.data.path={source / 'test.jsonl'}",
        f"run_dir={tmp_path}/gsm8k",
        "num_steps=2",
        "num_prompts=2",
        "group_size=2",
        "sampling.max_completion_tokens=16",
        "engine.kind=torch",
        "engine.placement=in_process",
        "eval.num_problems=2",
        "eval.num_samples=2",
        "eval.k=2",
    ]
    commands.run_train(ROOT / "configs" / "gsm8k.toml", overrides, resume=False)
    published = {}
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()]
        published |= {f"gsm8k-{name}/{index}": row for index, row in enumerate(rows)}
    samples = pq.read_table(tmp_path / "gsm8k" / "samples.parquet").to_pylist()
    assert len(samples) == 2 * 4 + 2 * 4
    for sample in samples:
        row = published[sample["task_id"]]
        assert sample["prompt"] == R1_ZERO.replace("{question}", row["question"])
        assert json.loads(sample["answer"]) == row["answer"].rpartition("####")[2].strip()
        assert sample["status"] in ("wrong", "unparsable")
        assert sample["reason"]


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({}, ["learner.learning_rate=1"], ["learner.learning_rate", "unknown key"]),
        ({}, ["group_size=1"], ["group_size"]),
        ({}, ["rewards.0.verifier=numerics"], ["numerics", "numeric"]),
        ({}, ["rewards.0.verifier=nowhere.to_be:found"], ["nowhere"]),
        ({}, ["data.source=jsonl", "data.path=missing.jsonl", "data.generator=null"], ["missing.jsonl"]),
        ({}, ["policy.path=/nowhere/at/all"], ["/nowhere/at/all", "config.json"]),
        ({}, ["engine.max_model_len=4096", "learner.max_tokens_per_microbatch=8192"], ["4096", "2048"]),
        ({}, ["engine.max_model_len=24"], ["arithmetic", "max_model_len"]),
        ({}, ["template=nothing"], ["template", "nothing"]),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    write_config: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], overrides: list[str], words: list[str]
) -> None:
    code, output = run_cli("train", str(write_config(**changes)), *overrides)
    assert code in (1, 2), output
    assert "Traceback" not in output
    assert all(word in output for word in words), output
    assert not (tmp_path / "runs" / "tiny-0" / "metrics.jsonl").exists()


def test_empty_data_and_rows_without_an_answer(write_config: Callable[..., Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    for text, words in (("", ["rows.jsonl", "empty"]), ('{"question": "1+1"}\n', ["rows.jsonl", "answer"])):
        rows.write_text(text)
        code, output = run_cli("train", str(write_config(data={"source": "jsonl", "path": str(rows)})))
        assert code == 2
        assert all(word in output for word in words), output


def test_a_checkpoint_of_another_architecture_is_refused(
    write_config: Callable[..., Path], policy_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(policy_dir, other)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"model_type": "qwen2"}))
    code, output = run_cli("train", str(write_config(policy={"path": str(other)})))
    assert code == 1
    assert "architectures=['DeepseekV3ForCausalLM'], not" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.stack
def test_two_learner_ranks_train_as_one_does(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(num_steps=2)
    commands.run_train(config, ["name=one"], resume=False)
    ranks = ["learner.placement=ray", "learner.num_ranks=2"]
    commands.run_train(config, ["name=two", *ranks], resume=False)
    one, two = (without_times(metrics_of(tmp_path / "runs" / name)) for name in ("one-0", "two-0"))
    for ours, theirs in zip(two, one, strict=True):
        for name, value in theirs.items():
            if name not in ("num_microbatches", "packing_waste", "imbalance_waste", "probe_gap"):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert sorted(path.name for path in (tmp_path / "runs" / "two-0" / "checkpoints").iterdir()) == [
        "step-000001",
        "step-000002",
    ]
    assert load_policy(tmp_path / "runs" / "two-0" / "checkpoints" / "step-000002").config.hidden_size == 64
