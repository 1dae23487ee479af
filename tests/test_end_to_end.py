"""Whole runs through the command line's own functions: on the torch engine, and once on vLLM in a Ray actor."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from typer.testing import CliRunner

import scripts.train_command as commands
from policy.checkpoint import atomic_folder, load_policy, save_policy
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from rollout.arithmetic import CorpusMix, corpus_document
from rollout.templates import R1_ZERO
from rollout.tokenizer import load_tokenizer, train_tokenizer
from scripts.cli import app
from scripts.display import Display

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained policy that vLLM's CPU kernel takes, with its tokenizer."""
    documents = [corpus_document(random.Random(i), CorpusMix()) for i in range(200)]
    tokenizer = train_tokenizer(
        [R1_ZERO.replace("{question}", q) + c for q, c in documents], 512, "{{ messages[0].content }}"
    )
    config = PolicyConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        qk_nope_head_dim=16,
        v_head_dim=16,
        initializer_range=0.08,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = DeepseekPolicy(config)
    model.reset_parameters(0)
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    with atomic_folder(folder) as temporary:
        save_policy(model, temporary)
        tokenizer.save_pretrained(temporary)
    return folder


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
            "checkpoint": {"every_steps": 1, "keep": 2},
        }
        path = tmp_path / "config.toml"
        path.write_text(tomli_w.dumps(config | changes))
        return path

    return write


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "seconds" not in k and "per_s" not in k} for line in metrics]


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
    config = write_config(checkpoint={"every_steps": 50, "keep": 2})
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
    code, output = run_cli("train", str(config), "name=cut")
    assert code == 2
    assert "--resume" in output
    commands.run_train(cut / "config.toml", [], resume=True)
    whole = tmp_path / "runs" / "whole-0"
    assert without_times(metrics_of(cut)) == without_times(metrics_of(whole))
    ours, theirs = (load_policy(run / "checkpoints" / "step-000003").state_dict() for run in (cut, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # The same command again, and the same name with another config, are both refused and change nothing.
    before = (cut / "metrics.jsonl").read_bytes()
    assert run_cli("train", str(config), "name=cut")[0] == 2
    code, output = run_cli("train", str(config), "name=cut", "learner.lr=0.5")
    assert code == 2
    assert "learner.lr" in output
    assert (cut / "metrics.jsonl").read_bytes() == before


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
def test_the_real_stack(write_config: Callable[..., Path], tmp_path: Path) -> None:
    engine = {"kind": "vllm", "placement": "ray", "max_model_len": 128}
    commands.run_train(write_config(engine=engine, num_steps=2), [], resume=False)
    run = tmp_path / "runs" / "tiny-0"
    metrics = metrics_of(run)
    assert [line["policy_version"] for line in metrics] == [1, 2]
    assert all(line["logprob_gap_mean"] < 1e-5 for line in metrics)
    assert all(line["probe_gap"] < 1e-5 for line in metrics)
    versions = {row["policy_version_first"] for row in pq.read_table(run / "samples.parquet").to_pylist()}
    assert versions == {0, 1, 2}
    assert json.loads((run / "summary.json").read_text())["engine"] == "vllm"
    assert "vllm" in (run / "logs" / "engine-0.log").read_text().lower()
