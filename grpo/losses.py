"""GRPO's loss as a pure function of flat token tensors [T]: how surrogate, KL and entropy are weighted and summed.

Nothing here knows a config, a device, a collective or a logger, and nothing writes in place. `sequence_ids` [T] number
the sequences of the call from 0; `completion_mask` [T] is true on the tokens that count. What stands at other positions
never matters, NaN included. The parts are in grpo/surrogates.py, grpo/kl.py and grpo/mismatch.py; the formulas, their
sources and the peers' names for them in docs/LOSSES.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from grpo.kl import KlEstimator, kl_penalty
from grpo.mismatch import Correction, rollout_divergence
from grpo.segments import masked
from grpo.surrogates import (
    MAX_LOG_RATIO,
    RatioLevel,
    Surrogate,
    cispo_surrogate,
    clipped_surrogate,
    policy_ratio,
    sapo_surrogate,
)

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


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
    mismatch_truncated: Tensor
    mismatch_masked: Tensor
    off_policy_masked: Tensor
    ratio: Tensor
    kl: Tensor
    entropy: Tensor
    rollout_kl_k1: Tensor
    rollout_kl_k3: Tensor
    rollout_chi2: Tensor
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
    correction: Correction | None = None,
    ratio_level: RatioLevel = "token",
    surrogate: Surrogate = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    cispo_ratio_max: float = 5.0,
    cispo_ratio_min: float = 0.0,
    sapo_temperature_positive: float = 1.0,
    sapo_temperature_negative: float = 1.05,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    kl_importance_weighted: bool = False,
    kl_bound: float | None = None,
    kl_k2_gradient: bool = False,
    entropy_coef: float = 0.0,
    log_ratio_bounds: tuple[float, float] = (-MAX_LOG_RATIO, MAX_LOG_RATIO),
    kl_max_log_ratio: float = MAX_LOG_RATIO,
) -> tuple[Tensor, LossTerms]:
    """sum(weights * (surrogate + kl_coef * KL - entropy_coef * entropy)) over a micro-batch, and what it was made of.

    All tensors are [T]; `logprobs` and `entropy` (nats) carry the gradient. `weights` come from `token_weights`, once
    per optimizer step, so the losses of its micro-batches add up. `old_logprobs=None` means on policy (the ratio is 1,
    with gradient). `correction` is `mismatch_correction`'s: its factor multiplies the surrogate only.
    `rollout_logprobs` are for the diagnostics alone. Raises ValueError where an option lacks the tensor it needs.
    """
    for option, coef, name, tensor in [
        ("kl_coef", kl_coef, "ref_logprobs", ref_logprobs),
        ("entropy_coef", entropy_coef, "entropy", entropy),
    ]:
        if coef and tensor is None:
            raise ValueError(f"{option} is set, so grpo_loss needs {name}")
    mask = completion_mask
    logprobs, advantages, weights = (masked(x, mask) for x in (logprobs, advantages, weights))
    old_logprobs = logprobs.detach() if old_logprobs is None else masked(old_logprobs, mask)
    zeros = torch.zeros_like(logprobs.detach())

    ratio = policy_ratio(
        logprobs, old_logprobs, mask, sequence_ids, num_sequences, level=ratio_level, log_ratio_bounds=log_ratio_bounds
    )
    bounds, dual = (float("-inf"), float("inf")), None
    if surrogate == "clip":
        bounds, dual = (1.0 - clip_low, 1.0 + clip_high), dual_clip
        policy = clipped_surrogate(
            ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, ratio_cap=ratio_cap
        )
    elif surrogate == "cispo":
        bounds = (cispo_ratio_min, cispo_ratio_max)
        policy = cispo_surrogate(ratio, logprobs, advantages, ratio_max=cispo_ratio_max, ratio_min=cispo_ratio_min)
    elif surrogate == "sapo":
        policy = sapo_surrogate(
            ratio,
            advantages,
            temperature_positive=sapo_temperature_positive,
            temperature_negative=sapo_temperature_negative,
        )
    else:
        raise ValueError(f"unknown surrogate {surrogate!r}: clip, cispo or sapo")
    if correction is not None:
        policy = masked(policy * masked(correction.scale, mask), correction.scale != 0)
    per_token = policy

    kl = zeros
    if ref_logprobs is not None:
        kl = kl_penalty(
            logprobs,
            masked(ref_logprobs, mask),
            estimator=kl_estimator,
            importance_weight=ratio if kl_importance_weighted else None,
            bound=kl_bound,
            k2_gradient=kl_k2_gradient,
            max_log_ratio=kl_max_log_ratio,
        )
        if kl_coef:
            per_token = per_token + kl_coef * kl
    entropy = zeros if entropy is None else masked(entropy, mask)
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    loss = (weights * per_token).sum()

    with torch.no_grad():
        terms = LossTerms(
            loss=loss.detach(),
            policy_loss=(weights * policy).sum(),
            kl_loss=kl_coef * (weights * kl).sum(),
            entropy_loss=-entropy_coef * (weights * entropy).sum(),
            num_tokens=mask.sum().to(zeros.dtype),
            **_clip_counts(ratio, advantages, mask, bounds, dual),
            **_correction_counts(correction, mask, zeros.dtype),
            ratio=masked(ratio, mask).sum(),
            kl=masked(kl, mask).sum(),
            entropy=entropy.sum(),
            **rollout_divergence(old_logprobs, old_logprobs if rollout_logprobs is None else rollout_logprobs, mask),
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


def _correction_counts(correction: Correction | None, mask: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    nothing = torch.zeros_like(mask)
    touched = {
        "mismatch_truncated": nothing if correction is None else correction.truncated,
        "mismatch_masked": nothing if correction is None else correction.dropped,
        "off_policy_masked": nothing if correction is None else correction.off_policy,
    }
    return {name: (where & mask).sum().to(dtype) for name, where in touched.items()}
