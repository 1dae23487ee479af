"""A run that is killed again and again ends with the bits of one that was not, and does nothing twice."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w
import torch

from policy.checkpoint import load_policy
from rollout.tasks import DataConfig, load_tasks
from tests import survival_run

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 5
DEADLINE_S = 120
ARITHMETIC = {"source": "generator", "generator": "arithmetic"}
BASE: dict[str, Any] = {
    "name": "seed",
    "max_steps": 6,
    "num_documents": 4,
    "num_threads": 1,
    "tokenizer_documents": 60,
    "data": {"source": "generator", "generator": "arithmetic_corpus"},
    "model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "max_position_embeddings": 256,
    },
    "optimizer": {"decay_steps": 4},
    "eval": {
        "data": {**ARITHMETIC, "split": "heldout"},
        "num_problems": 2,
        "num_samples": 1,
        "every_steps": 2,
        "max_completion_tokens": 8,
        "decay_at_pass_at_1": 0.0,
    },
}
RUN: dict[str, Any] = {
    "name": "survivor",
    "num_steps": NUM_STEPS,
    "num_prompts": 4,
    "group_size": 4,
    "data": ARITHMETIC,
    "rewards": [{"name": "accuracy", "verifier": "tests.end_to_end_plugins:fails_now_and_then"}],
    "sampling": {"max_completion_tokens": 12, "num_prompts_per_call": 2},
    "scoring": {"max_error_share": 0.9, "num_workers": 1},
    "engine": {"kind": "torch", "placement": "in_process", "max_model_len": 128},
    "learner": {
        "lr": 1e-3,
        "num_minibatches": 2,
        "num_threads": 1,
        "max_tokens_per_microbatch": 256,
        "balance_gamma": 0.01,
    },
    "algorithm": {
        "reference_refresh_steps": 2,
        "kl_coef": 0.01,
        "entropy_coef": 0.001,
        "entropy_target": 3.0,
        "zero_variance_groups": "resample",
        "max_draws_per_step": 2,
    },
    "eval": {
        "data": {**ARITHMETIC, "split": "heldout"},
        "num_problems": 2,
        "num_samples": 2,
        "k": 2,
        "every_steps": 2,
    },
    "checkpoint": {"every_steps": 2, "keep_last": 2, "keep_best": True},
}


@pytest.fixture(scope="module")
def forks() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has imported everything: a start takes no seconds of imports."""
    context = multiprocessing.get_context("forkserver")
    # The last ones are imported on first use, which would be in every process.
    context.set_forkserver_preload(["tests.survival_run", "torch._dynamo", "pandas", "transformers.generation"])
    return context


@dataclass
class Attempts:
    """Starts the same command again and again, in one folder."""

    forks: multiprocessing.context.ForkServerContext
    folder: Path

    def start(self, die_at_write: int | None = None) -> Any:
        arguments = (self.folder / "run.toml", [], self.folder / "sampling.log", die_at_write)
        process = self.forks.Process(target=survival_run.train, args=arguments)
        process.start()
        return process

    def finish(self) -> Path:
        process = self.start()
        process.join(DEADLINE_S)
        assert process.exitcode == 0, self.output()
        return self.folder / "run"

    def output(self) -> str:
        return (self.folder / "sampling.out").read_text()[-3000:]


@pytest.fixture
def attempts(forks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attempts]:
    monkeypatch.chdir(ROOT)

    def prepare(name: str, **changes: Any) -> Attempts:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "base.toml").write_text(tomli_w.dumps(BASE | {"output_dir": str(folder / "bases")}))
        run = {"run_dir": str(folder / "run"), "policy": {"sft_config": str(folder / "base.toml")}}
        (folder / "run.toml").write_text(tomli_w.dumps(RUN | run | changes))
        return Attempts(forks, folder)

    return prepare


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    changing = ("seconds", "per_s", "num_reused_samples")
    return {key: value for key, value in line.items() if not any(word in key for word in changing)}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [without_times(json.loads(line)) for line in path.read_text().splitlines()]


def sample_rows(run: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(run / "samples.parquet").to_pylist()
    keys = ("phase", "step", "task_id", "sample_index")
    return sorted(
        ({k: v for k, v in row.items() if k != "elapsed_s"} for row in rows), key=lambda row: [row[k] for k in keys]
    )


def assert_same_run(broken: Path, whole: Path) -> None:
    """The same metrics, samples, measurements, weights and learner state, bit for bit."""
    assert read_jsonl(broken / "metrics.jsonl") == read_jsonl(whole / "metrics.jsonl")
    assert sample_rows(broken) == sample_rows(whole)
    for name in ("eval_before.json", "eval_after.json"):
        assert json.loads((broken / name).read_text()) == json.loads((whole / name).read_text())
    steps = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (broken, whole)]
    assert steps[0] == steps[1]
    last = f"checkpoints/step-{NUM_STEPS:06d}"
    ours, theirs = (load_policy(run / last).state_dict() for run in (broken, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    states = [torch.load(run / last / "learner.pt", weights_only=True) for run in (broken, whole)]
    assert equal(*states)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def sampled_again(log: Path) -> list[str]:
    """Calls of the engine that were made although their samples had been kept."""
    kept: set[str] = set()
    again = []
    for line in log.read_text().splitlines():
        event, _, key = line.partition(" ")
        if event == "kept":
            kept.add(key)
        elif key in kept:
            again.append(key)
    assert kept
    return again


def kill_everywhere(attempts: Attempts, places: Sequence[int | float]) -> int:
    """Kill one attempt after the other: at a write (int), or after so many seconds (float); returns how many died."""
    kills = 0
    for place in places:
        process = attempts.start(place if isinstance(place, int) else None)
        if isinstance(place, float):
            process.join(place)
            process.kill()
        process.join(DEADLINE_S)
        assert process.exitcode in (0, -signal.SIGKILL), attempts.output()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    return kills


@pytest.mark.stack
@pytest.mark.timeout(900)
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(attempts: Callable[..., Attempts]) -> None:
    whole = attempts("whole")
    warm_up = attempts("warm-up").start(1)  # the first one waits for the imports
    warm_up.join(DEADLINE_S)
    began = time.monotonic()
    reference = whole.finish()
    took_s = time.monotonic() - began
    assert sampled_again(whole.folder / "sampling.log") == []
    chance = random.Random(0)
    kills = 0
    for name in ("first", "second", "third"):
        broken = attempts(name)
        places: list[int | float] = [chance.randint(1, 60) for _ in range(6)]
        places += [chance.uniform(0.1, 0.7) * took_s for _ in range(3)]
        chance.shuffle(places)
        kills += kill_everywhere(broken, places)
        assert_same_run(broken.finish(), reference)
        assert sampled_again(broken.folder / "sampling.log") == []
    assert kills >= 20


@pytest.mark.stack
def test_with_vllm_a_killed_run_keeps_order_seeds_and_counters(
    attempts: Callable[..., Attempts], policy_dir: Path
) -> None:
    engine = {"kind": "vllm", "placement": "ray", "max_model_len": 128}
    run = attempts(
        "vllm",
        policy={"path": str(policy_dir)},
        engine=engine,
        num_steps=3,
        algorithm={"kl_coef": 0.01},
        checkpoint={"every_steps": 1, "keep_last": 5},
        eval=RUN["eval"] | {"every_steps": 0},
    )
    metrics = run.folder / "run" / "metrics.jsonl"
    process = run.start()
    deadline = time.monotonic() + DEADLINE_S
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline, run.output()
        assert process.is_alive(), run.output()
        time.sleep(0.02)
    process.kill()
    process.join(DEADLINE_S)
    folder = run.finish()
    lines = read_jsonl(metrics)
    assert [(line["step"], line["policy_version"]) for line in lines] == [(0, 1), (1, 2), (2, 3)]
    assert all(line["logprob_gap_mean"] < 1e-5 for line in lines)
    rows = [row for row in pq.read_table(folder / "samples.parquet").to_pylist() if row["phase"] == "train"]
    source = load_tasks(DataConfig(**ARITHMETIC))
    for step in range(3):
        expected = [(task.task_id, index) for task in source.for_step(0, step, 4) for index in range(4)]
        assert [(row["task_id"], row["sample_index"]) for row in rows if row["step"] == step] == expected
    state = torch.load(folder / "checkpoints" / "step-000003" / "learner.pt", weights_only=True)["learner"]
    assert state["num_optimizer_steps"] == 3 * 2
    assert len(list((folder / "resumes").iterdir())) == 1
