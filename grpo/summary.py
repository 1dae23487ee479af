"""What a finished run comes to, in one flat table: the figures of summary.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.config import TrainConfig
from grpo.measures import learning_or_sharpening
from policy.account import account_of
from policy.config import PolicyConfig
from policy.dense_config import DenseConfig
from rollout.evaluation import EvalResult

Measured = tuple[EvalResult, list[float]]  # with pass@k of each problem


def run_summary(
    config: TrainConfig,
    policy_config: PolicyConfig | DenseConfig,
    metrics: Sequence[Mapping[str, Any]],
    before: Measured,
    after: Measured,
    seconds: Mapping[str, float],
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Accuracy before and after, what the run took and where; `seconds` by stage add up to its wall time."""
    (first, first_each), (last, last_each) = before, after
    # A skipped step may have had no finite gap, one without anything to learn from has none.
    gaps = [line["logprob_gap_mean"] for line in metrics if line.get("logprob_gap_mean") is not None]
    largest = [line["logprob_gap_max"] for line in metrics if line.get("logprob_gap_max") is not None]
    size = account_of(policy_config).parameters
    verdict, text = learning_or_sharpening(first, first_each, last, last_each)
    return {
        "pass_at_1_before": first.pass_at_1,
        "pass_at_1_after": last.pass_at_1,
        "pass_at_k_before": first.pass_at_k,
        "pass_at_k_after": last.pass_at_k,
        "k": last.k,
        "majority_at_k_before": first.majority_at_k,
        "majority_at_k_after": last.majority_at_k,
        "greedy_before": first.greedy,
        "greedy_after": last.greedy,
        "num_problems": last.num_problems,
        "num_samples": last.num_samples,
        "verifier_failures": first.num_failed + last.num_failed,
        "num_steps": config.num_steps,
        "wall_s": sum(seconds.values()),
        "seconds_by_stage": dict(seconds),
        "logprob_gap_mean": statistics.fmean(gaps) if gaps else None,
        "logprob_gap_max": max(largest, default=None),
        "skipped_steps": sum(line["skipped"] for line in metrics),
        "engine": config.engine.kind,
        "seed": config.seed,
        "model": {"total_params": size.total, "active_params": size.active},
        "verdict": verdict,
        "learning_or_sharpening": text,
        "checkpoint": str(checkpoint),
    }
