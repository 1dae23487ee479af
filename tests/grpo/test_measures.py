"""Advantages where a verifier failed, and what a step's samples say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from grpo.config import TrainConfig
from grpo.measures import learning_or_sharpening, sample_metrics, with_advantages
from rollout.evaluation import EvalResult
from rollout.records import Group, Sample, Task
from rollout.toml_config import load_config
from verifiers.verdict import Status, Verdict

CONFIG = load_config(TrainConfig, Path(__file__).resolve().parents[2] / "configs" / "quickstart.toml")


def group_of(verdicts: Sequence[tuple[float, Status]]) -> Group:
    samples = [
        Sample(
            task_id="t/0",
            sample_index=index,
            prompt_ids=(1,),
            completion_ids=(2, 3),
            rollout_logprobs=np.zeros(2),
            policy_versions=(0, 0),
            finish_reason="length" if status == "unparsable" else "stop",
            completion_text="",
            verdict=Verdict(score=score, status=status, reason="", parts={"accuracy": score, "format": 0.5}),
        )
        for index, (score, status) in enumerate(verdicts)
    ]
    return Group(task=Task(task_id="t/0", prompt="?", answer=1), samples=tuple(samples))


def advantages_of(*verdicts: tuple[float, Status]) -> list[float | None]:
    (group,) = with_advantages([group_of(verdicts)], CONFIG)
    return [sample.advantage for sample in group.samples]


def test_equal_rewards_stay_without_advantage_beside_a_failure() -> None:
    assert advantages_of(*[(1.2, "correct")] * 7, (0.0, "error")) == [0.0] * 8


def test_a_failed_sample_counts_for_nothing() -> None:
    with_failure = advantages_of((1.0, "correct"), (0.0, "timeout"), (0.2, "wrong"), (0.2, "wrong"))
    without = advantages_of((1.0, "correct"), (0.2, "wrong"), (0.2, "wrong"))
    assert with_failure == [without[0], 0.0, without[1], without[2]]
    assert sum(a or 0.0 for a in without) == pytest.approx(0.0, abs=1e-9)
    assert advantages_of((0.0, "error"), (0.0, "timeout")) == [0.0, 0.0]
    assert advantages_of((1.0, "correct"), (0.0, "error")) == [0.0, 0.0]


def test_metrics_of_a_step() -> None:
    groups = with_advantages(
        [group_of([(1.0, "correct"), (0.0, "wrong")]), group_of([(0.0, "unparsable"), (0.0, "error")])], CONFIG
    )
    metrics = sample_metrics(groups, ["accuracy", "format"])
    assert metrics["reward_mean"] == 0.25
    assert metrics["accuracy"] == 0.25
    assert metrics["reward_format"] == 0.5
    assert metrics["informative_groups"] == 0.5
    assert metrics["truncated_share"] == 0.25
    assert metrics["completion_tokens_total"] == 8
    assert [metrics[f"status_{s}"] for s in ("correct", "wrong", "unparsable", "timeout", "error")] == [1, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([0.0, 0.1, 0.0, 0.2], [1.0, 1.0, 0.9, 1.0], "learning"),
        ([0.9, 1.0, 1.0, 0.9], [1.0, 0.9, 0.9, 1.0], "sharpening"),
    ],
)
def test_learning_is_told_from_sharpening(before: list[float], after: list[float], verdict: str) -> None:
    def result(pass_at_1: float, each: list[float]) -> EvalResult:
        return EvalResult(
            pass_at_1=pass_at_1,
            pass_at_k=sum(each) / len(each),
            majority_at_k=0.0,
            k=8,
            num_problems=len(each),
            num_samples=8,
            greedy=None,
            num_failed=0,
            completion_tokens_mean=1.0,
        )

    assert learning_or_sharpening(result(0.2, before), before, result(0.9, after), after)[0] == verdict
