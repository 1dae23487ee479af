"""Estimates of the KL divergence per token, from the log-probabilities of tokens that the first policy sampled."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from grpo.surrogates import MAX_LOG_RATIO

KlEstimator = Literal["k1", "k2", "k3", "abs"]


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(pi / ref) per token [T]: unbiased, may be negative (Schulman, "Approximating KL divergence", k1)."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(pi / ref)^2 / 2 per token [T]: biased value, but the gradient of the true KL on policy (Schulman's k2)."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, *, max_log_ratio: float = MAX_LOG_RATIO) -> Tensor:
    """ref/pi - log(ref/pi) - 1 per token [T]: unbiased and never negative (DeepSeekMath eq. 4; Schulman's k3).

    log(ref/pi) is clamped to +-`max_log_ratio`, with zero gradient beyond.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(min=-max_log_ratio, max=max_log_ratio)
    # expm1 keeps the digits that exp - 1 loses near 0, where the difference would come out negative.
    return log_ratio.expm1() - log_ratio


def kl_abs(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|log(pi / ref)| per token [T]: no estimate of the KL, but a distance that some trainers offer beside them."""
    return (logprobs - ref_logprobs).abs()


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: KlEstimator = "k3",
    importance_weight: Tensor | None = None,
    bound: float | None = None,
    k2_gradient: bool = False,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """One estimate of KL(pi || ref) per token [T], clamped to +-`bound`, then times `importance_weight` [T] if given.

    With the differentiable ratio pi / pi_old as weight it is DeepSeek-V3.2's unbiased estimate (arXiv 2512.02556, 3.1).
    `k2_gradient` keeps the estimate's value and gives it the gradient of k2, which is that of the true KL on policy.
    """
    if estimator == "k1":
        kl = kl_k1(logprobs, ref_logprobs)
    elif estimator == "k2":
        kl = kl_k2(logprobs, ref_logprobs)
    elif estimator == "k3":
        kl = kl_k3(logprobs, ref_logprobs, max_log_ratio=max_log_ratio)
    elif estimator == "abs":
        kl = kl_abs(logprobs, ref_logprobs)
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2, k3 or abs")
    if bound is not None:
        kl = kl.clamp(min=-bound, max=bound)
    if k2_gradient:
        k2 = kl_k2(logprobs, ref_logprobs)
        kl = k2 - k2.detach() + kl.detach()
    return kl if importance_weight is None else kl * importance_weight
