"""GRPO's loss as pure functions of flat token tensors [T]: ratios, surrogates, KL estimates, and how they are summed.

Nothing here knows a config, a device, a collective or a logger, and nothing writes in place. `sequence_ids` [T] number
the sequences of the call from 0; `completion_mask` [T] is true on the tokens that count. What stands at other positions
never matters, NaN included. The formulas, their sources and the peers' names for them are in docs/LOSSES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

RatioLevel = Literal["token", "sequence"]
Surrogate = Literal["clip", "cispo"]
KlEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within +-20 nats: exp stays finite in float32, and a clipped token's gradient is 0, not NaN."""


def masked(values: Tensor, completion_mask: Tensor) -> Tensor:
    """`values` [T] with exact zeros, and zero gradient, wherever the mask is false."""
    return torch.where(completion_mask, values, torch.zeros_like(values))


def sequence_means(values: Tensor, completion_mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Mean of `values` [T] over each sequence's completion tokens [num_sequences]; 0 for a sequence without any."""
    zeros = values.new_zeros(num_sequences)
    sums = zeros.index_add(0, sequence_ids, masked(values, completion_mask))
    counts = zeros.index_add(0, sequence_ids, completion_mask.to(values.dtype))
    return sums / counts.clamp(min=1.0)


def token_weights(
    completion_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    aggregation: Aggregation,
    total_tokens: int | None = None,
    total_sequences: int | None = None,
    constant_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights [T] such that the loss of an optimizer step is sum(weights * per_token_loss), over all its micro-batches.

    N sequences, T completion tokens, |o| tokens of one sequence: token_mean 1/T; sequence_mean 1/(N |o|); sequence_sum
    1/N; constant 1/(N `constant_length`) (Dr. GRPO). Call it once on everything one optimizer step sees, before that is
    cut into micro-batches. `total_tokens` and `total_sequences` are T and N over all ranks where these tensors are one
    rank's share; sequences without completion tokens count in N. Raises ValueError for an unknown or incomplete choice.
    """
    mask = completion_mask.to(dtype)
    if aggregation == "token_mean":
        tokens = mask.sum() if total_tokens is None else mask.new_tensor(float(total_tokens))
        return mask / tokens.clamp(min=1.0)
    sequences = num_sequences if total_sequences is None else total_sequences
    per_sequence = mask / max(sequences, 1)
    if aggregation == "sequence_mean":
        lengths = mask.new_zeros(num_sequences).index_add(0, sequence_ids, mask)
        return per_sequence / lengths.clamp(min=1.0)[sequence_ids]
    if aggregation == "sequence_sum":
        return per_sequence
    if aggregation == "constant":
        if constant_length is None or constant_length <= 0:
            raise ValueError(f"aggregation 'constant' needs a positive constant_length, got {constant_length}")
        return per_sequence / constant_length
    raise ValueError(f"unknown aggregation {aggregation!r}: token_mean, sequence_mean, sequence_sum or constant")


def policy_ratio(
    logprobs: Tensor,
    old_logprobs: Tensor,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    level: RatioLevel = "token",
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """pi_theta / pi_old for every token [T]: its own, or its sequence's geometric mean (GSPO, arXiv 2507.18071 eq. 7).

    The log-ratio is clamped to +-`max_log_ratio` before exp, with zero gradient beyond (verl clamps too, at 20, and at
    10 for GSPO; TRL does not: pass inf for its behaviour). It is 1 at masked positions.
    """
    log_ratio = masked(logprobs - old_logprobs, completion_mask)
    if level == "sequence":
        means = sequence_means(log_ratio, completion_mask, sequence_ids, num_sequences)
        log_ratio = masked(means[sequence_ids], completion_mask)
    elif level != "token":
        raise ValueError(f"unknown ratio level {level!r}: token or sequence")
    return log_ratio.clamp(min=-max_log_ratio, max=max_log_ratio).exp()


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token [T] (PPO eq. 7, with DAPO's separate bounds).

    `ratio_cap` holds the unclipped r at or below a bound first (TRL's delta); `dual_clip` > 1 holds the loss of a
    negative advantage at or below dual_clip * |A| (arXiv 1912.09729). They are the same above 1 + clip_high.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    capped = ratio if ratio_cap is None else ratio.clamp(max=ratio_cap)
    clipped = ratio.clamp(min=1.0 - clip_low, max=1.0 + clip_high)
    objective = torch.minimum(capped * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


def cispo_surrogate(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, *, ratio_max: float, ratio_min: float = 0.0
) -> Tensor:
    """-sg(clip(r, ratio_min, ratio_max)) A log pi per token [T]: none loses its gradient (CISPO, arXiv 2506.13585).

    The bounds are ratios, not distances from 1: `ratio_max` is TRL's `epsilon_high`, and 1 + the paper's eps_high.
    """
    return -ratio.clamp(min=ratio_min, max=ratio_max).detach() * advantages * logprobs


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(pi / ref) per token [T]: unbiased, may be negative (Schulman, "Approximating KL divergence", k1)."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(pi / ref)^2 / 2 per token [T]: biased value, but the gradient of the true KL on policy (Schulman's k2)."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, *, max_log_ratio: float = MAX_LOG_RATIO) -> Tensor:
    """ref/pi - log(ref/pi) - 1 per token [T]: unbiased and never negative (DeepSeekMath eq. 4; Schulman's k3).

    log(ref/pi) is clamped to +-`max_log_ratio`, with zero gradient beyond, as in verl; TRL does not clamp.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(min=-max_log_ratio, max=max_log_ratio)
    # expm1 keeps the digits that exp - 1 loses near 0, where the difference would come out negative.
    return log_ratio.expm1() - log_ratio


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: KlEstimator = "k3",
    importance_weight: Tensor | None = None,
    bound: float | None = None,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """One estimate of KL(pi || ref) per token [T], clamped to +-`bound`, then times `importance_weight` [T] if given.

    With the differentiable ratio pi / pi_old as weight it is DeepSeek-V3.2's unbiased estimate (arXiv 2512.02556, 3.1).
    """
    estimators: dict[str, Callable[[], Tensor]] = {
        "k1": lambda: kl_k1(logprobs, ref_logprobs),
        "k2": lambda: kl_k2(logprobs, ref_logprobs),
        "k3": lambda: kl_k3(logprobs, ref_logprobs, max_log_ratio=max_log_ratio),
    }
    if estimator not in estimators:
        raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2 or k3")
    kl = estimators[estimator]()
    if bound is not None:
        kl = kl.clamp(min=-bound, max=bound)
    return kl if importance_weight is None else kl * importance_weight


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
    return (advantages >= 0) | (mean_drift[sequence_ids] <= threshold)


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What one call of `grpo_loss` saw: detached scalars that add up (`a + b`) over micro-batches and ranks.

    The first four are the loss and its parts, weighted as the loss is. The rest are plain sums over completion tokens
    (divide by `num_tokens`), except `logprob_gap_max`, the largest |old_logprobs - rollout_logprobs|, where `+` is max.
    """

    loss: Tensor
    policy_loss: Tensor
    kl_loss: Tensor
    entropy_loss: Tensor
    num_tokens: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    off_policy_masked: Tensor
    ratio: Tensor
    kl: Tensor
    entropy: Tensor
    logprob_gap: Tensor
    logprob_gap_max: Tensor

    def __add__(self, other: LossTerms) -> LossTerms:
        """The terms of both calls together."""
        merged = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        merged["logprob_gap_max"] = torch.maximum(self.logprob_gap_max, other.logprob_gap_max)
        return LossTerms(**merged)

    def metrics(self) -> dict[str, float]:
        """Plain floats: the loss and its parts as they are, everything else as a mean over completion tokens."""
        as_they_are = {"loss", "policy_loss", "kl_loss", "entropy_loss", "num_tokens", "logprob_gap_max"}
        tokens = max(float(self.num_tokens), 1.0)
        values = {f.name: float(getattr(self, f.name)) for f in fields(self)}
        return {name: value if name in as_they_are else value / tokens for name, value in values.items()}


def grpo_loss(
    logprobs: Tensor,
    *,
    advantages: Tensor,
    weights: Tensor,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    surrogate_scale: Tensor | None = None,
    ratio_level: RatioLevel = "token",
    surrogate: Surrogate = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    cispo_ratio_max: float = 5.0,
    cispo_ratio_min: float = 0.0,
    off_policy_threshold: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    kl_importance_weighted: bool = False,
    kl_bound: float | None = None,
    entropy_coef: float = 0.0,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> tuple[Tensor, LossTerms]:
    """sum(weights * (surrogate + kl_coef * KL - entropy_coef * entropy)) over a micro-batch, and what it was made of.

    All tensors are [T]; `logprobs` and `entropy` (nats) carry the gradient. `weights` come from `token_weights`, once
    per optimizer step, so the losses of its micro-batches add up. `old_logprobs=None` means on policy (the ratio is 1,
    with gradient). `surrogate_scale` multiplies the surrogate only, as the off-policy mask does (truncated importance
    sampling between engine and trainer, say). Raises ValueError where an option lacks the tensor it needs.
    """
    _check_inputs(kl_coef, ref_logprobs, off_policy_threshold, rollout_logprobs, entropy_coef, entropy)
    mask = completion_mask
    where = (mask, sequence_ids, num_sequences)
    logprobs, advantages, weights = (masked(x, mask) for x in (logprobs, advantages, weights))
    old_logprobs = logprobs.detach() if old_logprobs is None else masked(old_logprobs, mask)
    zeros = torch.zeros_like(logprobs.detach())

    ratio = policy_ratio(logprobs, old_logprobs, *where, level=ratio_level, max_log_ratio=max_log_ratio)
    if surrogate == "clip":
        bounds = (1.0 - clip_low, 1.0 + clip_high)
        policy = clipped_surrogate(
            ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, ratio_cap=ratio_cap
        )
    elif surrogate == "cispo":
        bounds = (cispo_ratio_min, cispo_ratio_max)
        policy = cispo_surrogate(ratio, logprobs, advantages, ratio_max=cispo_ratio_max, ratio_min=cispo_ratio_min)
    else:
        raise ValueError(f"unknown surrogate {surrogate!r}: clip or cispo")
    keep = torch.ones_like(mask)
    if off_policy_threshold is not None and rollout_logprobs is not None:
        keep = off_policy_keep(logprobs, rollout_logprobs, advantages, *where, threshold=off_policy_threshold)
        policy = masked(policy, keep)
    if surrogate_scale is not None:
        policy = policy * masked(surrogate_scale, mask)
    per_token = policy

    kl = zeros
    if ref_logprobs is not None:
        kl = kl_penalty(
            logprobs,
            masked(ref_logprobs, mask),
            estimator=kl_estimator,
            importance_weight=ratio if kl_importance_weighted else None,
            bound=kl_bound,
            max_log_ratio=max_log_ratio,
        )
        if kl_coef:
            per_token = per_token + kl_coef * kl
    entropy = zeros if entropy is None else masked(entropy, mask)
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    loss = (weights * per_token).sum()

    with torch.no_grad():
        gap = zeros if rollout_logprobs is None else masked((old_logprobs - rollout_logprobs).abs(), mask)
        terms = LossTerms(
            loss=loss.detach(),
            policy_loss=(weights * policy).sum(),
            kl_loss=kl_coef * (weights * kl).sum(),
            entropy_loss=-entropy_coef * (weights * entropy).sum(),
            num_tokens=mask.sum().to(zeros.dtype),
            **_clip_counts(ratio, advantages, mask, bounds, dual_clip if surrogate == "clip" else None),
            off_policy_masked=(~keep & mask).sum().to(zeros.dtype),
            ratio=masked(ratio, mask).sum(),
            kl=masked(kl, mask).sum(),
            entropy=entropy.sum(),
            logprob_gap=gap.sum(),
            logprob_gap_max=gap.max() if gap.numel() else gap.sum(),
        )
    return loss, terms


def _clip_counts(
    ratio: Tensor, advantages: Tensor, mask: Tensor, bounds: tuple[float, float], dual_clip: float | None
) -> dict[str, Tensor]:
    """How many completion tokens each bound cut off: below for A < 0, above for A > 0, dual above for A < 0."""
    low, high = bounds
    dual = float("inf") if dual_clip is None else dual_clip
    cut = {
        "clipped_low": (ratio < low) & (advantages < 0),
        "clipped_high": (ratio > high) & (advantages > 0),
        "clipped_dual": (ratio > dual) & (advantages < 0),
    }
    return {name: (where & mask).sum().to(ratio.dtype) for name, where in cut.items()}


def _check_inputs(
    kl_coef: float,
    ref_logprobs: Tensor | None,
    off_policy_threshold: float | None,
    rollout_logprobs: Tensor | None,
    entropy_coef: float,
    entropy: Tensor | None,
) -> None:
    needs = {
        "kl_coef": (bool(kl_coef), "ref_logprobs", ref_logprobs),
        "off_policy_threshold": (off_policy_threshold is not None, "rollout_logprobs", rollout_logprobs),
        "entropy_coef": (bool(entropy_coef), "entropy", entropy),
    }
    for option, (is_set, name, tensor) in needs.items():
        if is_set and tensor is None:
            raise ValueError(f"{option} is set, so grpo_loss needs {name}")
