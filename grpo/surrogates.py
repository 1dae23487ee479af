"""The policy's part of the loss per token: importance ratios and the surrogates made of them.

Flat token tensors [T]; formulas, sources and the peers' names are in docs/LOSSES.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grpo.segments import masked, sequence_means

RatioLevel = Literal["token", "sequence", "none"]
Surrogate = Literal["clip", "cispo", "sapo"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within +-20 nats: exp stays finite in float32, and a clipped token's gradient is 0, not NaN."""


def policy_ratio(
    logprobs: Tensor,
    old_logprobs: Tensor,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    level: RatioLevel = "token",
    log_ratio_bounds: tuple[float, float] = (-MAX_LOG_RATIO, MAX_LOG_RATIO),
) -> Tensor:
    """pi_theta / pi_old for every token [T]: its own, or its sequence's geometric mean (GSPO, arXiv 2507.18071 eq. 7).

    Level "none" has the value 1 and the gradient of log pi_theta, so that any surrogate becomes REINFORCE's. The
    log-ratio is clamped to `log_ratio_bounds` before exp, with zero gradient beyond. It is 1 at masked positions.
    """
    if level == "none":
        old_logprobs = logprobs.detach()
    log_ratio = masked(logprobs - old_logprobs, completion_mask)
    if level == "sequence":
        means = sequence_means(log_ratio, completion_mask, sequence_ids, num_sequences)
        log_ratio = masked(means[sequence_ids], completion_mask)
    elif level not in ("token", "none"):
        raise ValueError(f"unknown ratio level {level!r}: token, sequence or none")
    low, high = log_ratio_bounds
    return log_ratio.clamp(min=low, max=high).exp()


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

    `ratio_cap` holds the unclipped r at or below a bound first (INTELLECT-2's delta); `dual_clip` > 1 holds the loss of
    a negative advantage at or below dual_clip * |A| (arXiv 1912.09729). They are the same above 1 + clip_high.
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

    The bounds are ratios, not distances from 1: `ratio_max` is ScaleRL's, and 1 + MiniMax-M1's eps_high.
    """
    return -ratio.clamp(min=ratio_min, max=ratio_max).detach() * advantages * logprobs


def sapo_surrogate(
    ratio: Tensor, advantages: Tensor, *, temperature_positive: float, temperature_negative: float
) -> Tensor:
    """-4/t sigmoid(t (r - 1)) A per token [T], t by the sign of A (SAPO, arXiv 2511.20347): a clip without edges.

    Its slope at r = 1 is that of r A, so on policy the gradient is REINFORCE's; a larger t closes the gate sooner.
    """
    positive, negative = ratio.new_tensor(temperature_positive), ratio.new_tensor(temperature_negative)
    temperature = torch.where(advantages > 0, positive, negative)
    return -torch.sigmoid(temperature * (ratio - 1.0)) * (4.0 / temperature) * advantages
