"""Where the engine's probabilities are not the learner's: importance weights, what to do with them, and how far apart.

w = pi_old / pi_rollout speaks of the same weights in two programs (and of stale weights, if the engine's are older).
Pure functions of flat token tensors [T]. A correction touches the surrogate only: neither the KL to the reference nor
any denominator changes with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo.kl import kl_k1, kl_k3
from grpo.segments import masked, sequence_means, sequence_sums
from grpo.surrogates import MAX_LOG_RATIO

WeightLevel = Literal["token", "sequence"]
CorrectionLevel = Literal["none", "token", "sequence"]
SequenceRatio = Literal["product", "geometric_mean"]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A factor on the surrogate of every token [T], and the completion tokens that each rule touched (bool [T]).

    `truncated`: their weight was cut down; `dropped`: their weight was outside of the bounds, so the factor is 0;
    `off_policy`: their sequence drifted too far for its negative advantage, so the factor is 0.
    """

    scale: Tensor
    truncated: Tensor
    dropped: Tensor
    off_policy: Tensor


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    level: WeightLevel,
    sequence_ratio: SequenceRatio = "product",
) -> Tensor:
    """pi_old / pi_rollout for every token [T]: its own, or its sequence's by product or by geometric mean.

    The log of what is returned is clamped to +-20 nats. It is 1 at masked positions.
    """
    log_ratio = masked(old_logprobs - rollout_logprobs, completion_mask)
    if level == "sequence":
        if sequence_ratio not in ("product", "geometric_mean"):
            raise ValueError(f"unknown sequence ratio {sequence_ratio!r}: product or geometric_mean")
        total = sequence_sums if sequence_ratio == "product" else sequence_means
        per_sequence = total(log_ratio, completion_mask, sequence_ids, num_sequences)
        log_ratio = masked(per_sequence[sequence_ids], completion_mask)
    elif level != "token":
        raise ValueError(f"unknown level {level!r} of importance weights: token or sequence")
    return log_ratio.clamp(min=-MAX_LOG_RATIO, max=MAX_LOG_RATIO).exp()


def off_policy_keep(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    threshold: float,
) -> Tensor:
    """True [T] on the sequences to keep: advantage >= 0, or mean log(pi_rollout / pi_theta) <= threshold nats.

    DeepSeek-V3.2's off-policy sequence mask (arXiv 2512.02556, 3.1), with the engine's own probabilities.
    """
    drift = rollout_logprobs - logprobs.detach()
    mean_drift = sequence_means(drift, completion_mask, sequence_ids, num_sequences)
    # Written so that a NaN keeps its sequence: it has to reach the loss, not vanish.
    return (advantages >= 0) | ~(mean_drift[sequence_ids] > threshold)


@torch.no_grad()
def mismatch_correction(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    truncate: CorrectionLevel = "none",
    truncate_max: float = 2.0,
    mask: CorrectionLevel = "none",
    mask_min: float = 0.5,
    mask_max: float = 2.0,
    sequence_ratio: SequenceRatio = "product",
    off_policy_threshold: float | None = None,
) -> Correction:
    """The three rules together, in any combination; the keywords are those of `MismatchConfig`.

    Without `truncate` no weight is applied: `mask` alone drops, and leaves what it keeps as it is. A weight that is NaN
    is neither dropped nor truncated, so that a broken log-probability reaches the loss and is seen there.
    """
    where = (completion_mask, sequence_ids, num_sequences)
    nothing = torch.zeros_like(completion_mask)
    scale, truncated, dropped, off_policy = torch.ones_like(old_logprobs), nothing, nothing, nothing
    if truncate != "none":
        w = importance_weights(old_logprobs, rollout_logprobs, *where, level=truncate, sequence_ratio=sequence_ratio)
        truncated = (w > truncate_max) & completion_mask
        scale = w.clamp(max=truncate_max)
    if mask != "none":
        w = importance_weights(old_logprobs, rollout_logprobs, *where, level=mask, sequence_ratio=sequence_ratio)
        dropped = ((w < mask_min) | (w > mask_max)) & completion_mask
    if off_policy_threshold is not None:
        keep = off_policy_keep(logprobs, rollout_logprobs, advantages, *where, threshold=off_policy_threshold)
        off_policy = ~keep & completion_mask
    scale = masked(scale, completion_mask & ~dropped & ~off_policy)
    return Correction(scale=scale, truncated=truncated, dropped=dropped, off_policy=off_policy)


@torch.no_grad()
def rollout_divergence(old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor) -> dict[str, Tensor]:
    """How far the engine's distribution is from the learner's: sums over the completion tokens, which the engine sampled.

    `rollout_kl_k1` and `rollout_kl_k3` estimate KL(rollout || old); `rollout_chi2` is w^2 - 1, an estimate of chi
    squared(old || rollout), which is the variance of w; `logprob_gap` is |log w| and `logprob_gap_max` its largest.
    """
    old, rollout = masked(old_logprobs, completion_mask), masked(rollout_logprobs, completion_mask)
    gap = (old - rollout).abs()
    log_weight = (old - rollout).clamp(min=-MAX_LOG_RATIO, max=MAX_LOG_RATIO)
    return {
        "logprob_gap": gap.sum(),
        "logprob_gap_max": gap.max() if gap.numel() else gap.sum(),
        "rollout_kl_k1": kl_k1(rollout, old).sum(),
        "rollout_kl_k3": kl_k3(rollout, old).sum(),
        "rollout_chi2": (2.0 * log_weight).expm1().sum(),
    }
