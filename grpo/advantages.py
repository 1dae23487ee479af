"""Advantages: what a completion's reward is worth beside the others of its group; pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageStd = Literal["group", "none"]


def group_advantages(rewards: Tensor, *, std: AdvantageStd = "group", ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """Reward minus group mean, over (std + eps) if `std="group"`; [num_prompts, group_size] in and out.

    `std="group"` is DeepSeekMath's (arXiv 2402.03300, 4.1.2), `std="none"` that of Dr. GRPO and DeepSeek-V3.2. `ddof`
    is subtracted from the group size under the variance: 1 in TRL and verl, 0 for the population's. Equal rewards, and
    a group of one, give exactly 0. Raises ValueError for another shape or `std`, and for a reward that is not finite.
    """
    _check_rewards(rewards)
    if std not in ("group", "none"):
        raise ValueError(f"std must be 'group' or 'none', not {std!r}")
    if ddof < 0 or eps < 0:
        raise ValueError(f"ddof and eps must not be negative, got ddof={ddof}, eps={eps}")
    deviations = rewards - rewards.mean(dim=1, keepdim=True)
    if std == "group":
        # A group no larger than ddof has no variance; the count is floored because its deviations are zeroed below.
        count = max(rewards.shape[1] - ddof, 1)
        variance = deviations.square().sum(dim=1, keepdim=True) / count
        deviations = deviations / (variance.sqrt() + eps)
    # The mean of equal floats may differ from them in the last bit, and dividing by a tiny std would blow that up.
    informative = informative_groups(rewards).unsqueeze(1)
    return torch.where(informative, deviations, torch.zeros_like(deviations))


def informative_groups(rewards: Tensor) -> Tensor:
    """Whether each group has two different rewards, and so a gradient; [num_prompts, group_size] to [num_prompts]."""
    return (rewards != rewards[:, :1]).any(dim=1)


def _check_rewards(rewards: Tensor) -> None:
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards must be [num_prompts, group_size] with group_size >= 1, got {list(rewards.shape)}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point, got {rewards.dtype}")
    finite = torch.isfinite(rewards)
    if not bool(finite.all()):
        group, sample = (~finite).nonzero()[0].tolist()
        raise ValueError(f"reward of group {group}, sample {sample} is {rewards[group, sample].item()}, not a number")
