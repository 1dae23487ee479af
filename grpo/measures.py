"""What a step's samples and two measurements say: advantages, metrics, and whether the run taught anything."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grpo.advantages import group_advantages
from grpo.config import TrainConfig
from rollout.evaluation import FAILED, EvalResult
from rollout.records import Group


def with_advantages(groups: Sequence[Group], config: TrainConfig) -> list[Group]:
    """The groups with an advantage on every sample; where the verifier failed it is 0, and the sample counts for nothing."""
    algorithm = config.algorithm
    rows: list[list[float]] = []
    for group in groups:
        judged = [s.verdict is not None and s.verdict.status not in FAILED for s in group.samples]
        rewards = [s.verdict.score for s, ok in zip(group.samples, judged, strict=True) if ok and s.verdict]
        advantages = iter(
            group_advantages(
                torch.tensor([rewards], dtype=torch.float64),
                std=algorithm.advantage_std,
                ddof=algorithm.advantage_ddof,
                eps=algorithm.advantage_eps,
            )[0].tolist()
            if rewards
            else []
        )
        rows.append([next(advantages) if ok else 0.0 for ok in judged])
    return [
        replace(group, samples=tuple(replace(s, advantage=a) for s, a in zip(group.samples, row, strict=True)))
        for group, row in zip(groups, rows, strict=True)
    ]


def sample_metrics(groups: Sequence[Group], reward_names: Sequence[str]) -> dict[str, Any]:
    """What a step's samples say before any learning: rewards, verdicts and lengths in tokens."""
    samples = [sample for group in groups for sample in group.samples]
    verdicts = [sample.verdict for sample in samples if sample.verdict is not None]
    lengths = [len(sample.completion_ids) for sample in samples]
    statuses = Counter(verdict.status for verdict in verdicts)
    metrics: dict[str, Any] = {
        "reward_mean": statistics.fmean(verdict.score for verdict in verdicts),
        "accuracy": statuses["correct"] / len(samples),
        "informative_groups": sum(len({s.advantage for s in g.samples}) > 1 for g in groups) / len(groups),
        "completion_tokens_mean": statistics.fmean(lengths),
        "completion_tokens_max": max(lengths),
        "completion_tokens_total": sum(lengths),
        "truncated_share": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
    }
    for name in reward_names:
        metrics[f"reward_{name}"] = statistics.fmean(verdict.parts.get(name, 0.0) for verdict in verdicts)
    for status in ("correct", "wrong", "unparsable", "timeout", "error"):
        metrics[f"status_{status}"] = statuses[status]
    if drafted := sum(sample.num_draft_tokens for sample in samples):
        metrics["draft_acceptance"] = sum(sample.num_accepted_tokens for sample in samples) / drafted
    return metrics


def learning_or_sharpening(
    before: EvalResult, before_each: Sequence[float], after: EvalResult, after_each: Sequence[float]
) -> tuple[str, str]:
    """("learning" | "sharpening" | "neither", a sentence with the figures and their standard errors over problems).

    Learning: pass@k rose by more than two standard errors, so the policy solves what k samples of the base did not.
    Sharpening: only pass@1 rose, the policy more often gives answers that it could give before.
    """
    k = after.k
    gains = [b - a for a, b in zip(before_each, after_each, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    gain = after.pass_at_k - before.pass_at_k
    figures = (
        f"pass@{k} went from {before.pass_at_k:.3f} to {after.pass_at_k:.3f} ({gain:+.3f}, standard error {error:.3f}), "
        f"pass@1 from {before.pass_at_1:.3f} to {after.pass_at_1:.3f}"
    )
    if gain > 2 * error:
        return (
            "learning",
            f"Learning, not only sharpening: {figures}. The policy solves problems that {k} samples of the base did not.",
        )
    if after.pass_at_1 > before.pass_at_1:
        return (
            "sharpening",
            f"Sharpening: {figures}. The policy gives more often what {k} samples of the base already held.",
        )
    return "neither", f"Neither learning nor sharpening: {figures}."


def read_eval(path: Path) -> tuple[EvalResult, list[float]]:
    """A measurement as `_Run.measure` wrote it."""
    values = json.loads(path.read_text())
    each = values.pop("pass_at_k_by_problem")
    return EvalResult(**values), each
