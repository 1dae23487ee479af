"""What a step's samples and two measurements say: advantages, metrics, and whether the run taught anything."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from grpo.config import TrainConfig
from grpo.objective import advantages_for
from rollout.evaluation import FAILED, EvalResult
from rollout.records import Group


class VerifierFailureError(RuntimeError):
    """The verifier failed on more samples of a step than the config allows."""


def with_advantages(
    groups: Sequence[Group], config: TrainConfig, rewards: Sequence[float] | None = None
) -> list[Group]:
    """The groups with an advantage on every sample; where the verifier failed it is 0, and the sample counts for nothing.

    `rewards`, one per sample in order, take the place of the verdicts' scores: those with the KL taken off, for one.
    """
    if not groups:
        return []
    verdicts = [sample.verdict for group in groups for sample in group.samples]
    shape = (len(groups), len(groups[0].samples))
    judged = torch.tensor([v is not None and v.status not in FAILED for v in verdicts]).reshape(shape)
    scores = torch.tensor(rewards or [v.score if v else 0.0 for v in verdicts], dtype=torch.float64).reshape(shape)
    parts = {
        reward.name: torch.tensor([v.parts.get(reward.name, 0.0) if v else 0.0 for v in verdicts], dtype=torch.float64)
        for reward in config.rewards
    }
    advantages = advantages_for(
        scores,
        judged,
        config.algorithm,
        components={name: values.reshape(shape) for name, values in parts.items()},
        weights={reward.name: reward.weight for reward in config.rewards},
    )
    return [
        replace(group, samples=tuple(replace(s, advantage=a) for s, a in zip(group.samples, row, strict=True)))
        for group, row in zip(groups, advantages.tolist(), strict=True)
    ]


def is_informative(group: Group, config: TrainConfig) -> bool:
    """Whether any sample of a scored group has an advantage, and so a gradient."""
    (measured,) = with_advantages([group], config)
    return any(sample.advantage for sample in measured.samples)


def failures_in_words(groups: Sequence[Group], what: str, max_share: float) -> str | None:
    """How many samples the verifier could not judge, None for none; VerifierFailureError above `max_share` of them."""
    failed = [s.verdict for g in groups for s in g.samples if s.verdict and s.verdict.status in FAILED]
    if not failed:
        return None
    total = sum(len(group.samples) for group in groups)
    (reason, count), *_ = Counter(verdict.reason for verdict in failed).most_common(1)
    text = f"{what}: the verifier failed on {len(failed)} of {total} samples; most often ({count} times): {reason}."
    if len(failed) > max_share * total:
        raise VerifierFailureError(
            f"{text} That is more than scoring.max_error_share={max_share:g} allows: mend the verifier."
        )
    return text


def sample_metrics(groups: Sequence[Group], reward_names: Sequence[str]) -> dict[str, Any]:
    """What all of a step's samples say before any learning: rewards, verdicts and lengths in tokens."""
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
