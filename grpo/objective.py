"""From an algorithm's config to the pure functions that it names: advantages, penalised rewards, the loss of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grpo.advantages import group_advantages, reward_advantages
from grpo.algorithm_config import AlgorithmConfig
from grpo.batch import Batch
from grpo.entropy import EntropyControl
from grpo.kl import kl_penalty
from grpo.losses import LossTerms, grpo_loss
from grpo.mismatch import Correction, mismatch_correction
from grpo.segments import masked, sequence_sums


def advantages_for(
    rewards: Tensor,
    judged: Tensor | None,
    algorithm: AlgorithmConfig,
    *,
    components: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Tensor:
    """The step's advantages [num_prompts, group_size] from its rewards of that shape; `judged` is None if all are.

    With `advantage_per_reward` they come from `components` (name to rewards of that shape) and their `weights` instead.
    Raises ValueError where those are missing, and as `group_advantages` does.
    """
    options = {
        "baseline": algorithm.advantage_baseline,
        "std": algorithm.advantage_std,
        "ddof": algorithm.advantage_ddof,
        "eps": algorithm.advantage_eps,
        "judged": judged,
    }
    if not algorithm.advantage_per_reward:
        return group_advantages(rewards, **options)
    if components is None or weights is None:
        raise ValueError("advantage_per_reward is set, so advantages_for needs components and weights")
    return reward_advantages(components, weights, **options)


@torch.no_grad()
def penalised_rewards(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    algorithm: AlgorithmConfig,
) -> Tensor:
    """Rewards [B] less kl_coef times the KL estimate summed over each completion; for `kl_placement = "reward"`.

    `logprobs` and `ref_logprobs` [T] are of the policy that sampled and of the reference. No gradient.
    """
    kl = kl_penalty(
        masked(logprobs, completion_mask),
        masked(ref_logprobs, completion_mask),
        estimator=algorithm.kl_estimator,
        bound=algorithm.kl_bound,
    )
    sums = sequence_sums(kl, completion_mask, sequence_ids, rewards.shape[0])
    return rewards - algorithm.kl_coef * sums.to(rewards.dtype)


def entropy_control(algorithm: AlgorithmConfig) -> EntropyControl:
    """The entropy bonus as it is before the first optimizer step."""
    return EntropyControl(
        coef=algorithm.entropy_coef,
        target=algorithm.entropy_target,
        step=algorithm.entropy_coef_step,
        maximum=algorithm.entropy_coef_max,
    )


def policy_loss(
    algorithm: AlgorithmConfig,
    logprobs: Tensor,
    *,
    batch: Batch,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, LossTerms]:
    """The loss of a micro-batch whose `weights` are set, and what it was made of; see `grpo.losses.grpo_loss`.

    `logprobs` and `entropy` [T] are the policy's, with gradient; `entropy` is measured only while `entropy_coef` is 0.
    `batch.old_logprobs` None means on policy. Raises ValueError where the batch lacks what the algorithm needs.
    """
    if batch.weights is None:
        raise ValueError("the batch has no weights: call grpo.batch.with_weights on the whole minibatch first")
    in_loss = algorithm.kl_placement == "loss"
    return grpo_loss(
        logprobs,
        advantages=batch.advantages,
        weights=batch.weights,
        completion_mask=batch.completion_mask,
        sequence_ids=batch.sequence_ids,
        num_sequences=batch.num_sequences,
        old_logprobs=batch.old_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        ref_logprobs=batch.ref_logprobs,
        entropy=entropy if entropy is None or entropy_coef else entropy.detach(),
        correction=_correction(algorithm, logprobs, batch),
        ratio_level=algorithm.ratio_level,
        surrogate=algorithm.surrogate,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        ratio_cap=algorithm.ratio_cap,
        cispo_ratio_max=cispo_ratio_max(algorithm),
        cispo_ratio_min=algorithm.cispo_ratio_min,
        sapo_temperature_positive=algorithm.sapo_temperature_positive,
        sapo_temperature_negative=algorithm.sapo_temperature_negative,
        kl_coef=algorithm.kl_coef if in_loss else 0.0,
        kl_estimator=algorithm.kl_estimator,
        kl_importance_weighted=algorithm.kl_importance_weighted,
        kl_bound=algorithm.kl_bound,
        entropy_coef=entropy_coef,
    )


def cispo_ratio_max(algorithm: AlgorithmConfig) -> float:
    """CISPO's largest weight as a ratio, whichever of its two published names it was given by; inf if by neither."""
    if algorithm.cispo_ratio_max is not None:
        return algorithm.cispo_ratio_max
    return float("inf") if algorithm.cispo_eps_high is None else 1.0 + algorithm.cispo_eps_high


def _correction(algorithm: AlgorithmConfig, logprobs: Tensor, batch: Batch) -> Correction | None:
    mismatch = algorithm.mismatch
    if (mismatch.truncate, mismatch.mask, mismatch.off_policy_threshold) == ("none", "none", None):
        return None
    logprobs = logprobs.detach()
    return mismatch_correction(
        logprobs,
        logprobs if batch.old_logprobs is None else batch.old_logprobs,
        batch.rollout_logprobs,
        batch.advantages,
        batch.completion_mask,
        batch.sequence_ids,
        batch.num_sequences,
        truncate=mismatch.truncate,
        truncate_max=mismatch.truncate_max,
        mask=mismatch.mask,
        mask_min=mismatch.mask_min,
        mask_max=mismatch.mask_max,
        sequence_ratio=mismatch.sequence_ratio,
        off_policy_threshold=mismatch.off_policy_threshold,
    )
