"""Advantages: what a completion's reward is worth beside the others of its group; pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

AdvantageBaseline = Literal["group_mean", "leave_one_out"]
AdvantageStd = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Tensor,
    *,
    baseline: AdvantageBaseline = "group_mean",
    std: AdvantageStd = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    judged: Tensor | None = None,
) -> Tensor:
    """Reward minus baseline, over (std + eps) unless `std="none"`; [num_prompts, group_size] in and out.

    Baseline: the mean of the group (DeepSeekMath, arXiv 2402.03300, 4.1.2) or of its other samples (RLOO, arXiv
    2402.14740). Std: of the group, of all rewards of the step ("batch"), or none (Dr. GRPO, DeepSeek-V3.2). `ddof` is
    subtracted from the count under the variance. Samples that `judged` (bool, same shape) leaves out get 0 and take no
    part in any statistic, whatever their reward says. Equal rewards, and fewer than two judged samples, give exactly 0.
    Raises ValueError for another shape or choice, and for a judged reward that is not finite.
    """
    judged = _checked(rewards, judged, ddof, eps)
    rewards = torch.where(judged, rewards, torch.zeros_like(rewards))
    count = judged.sum(dim=1, keepdim=True).to(rewards.dtype)
    deviations = _deviations(rewards, judged, count, 1)
    if baseline == "leave_one_out":
        # R - mean of the others = (R - mean) n / (n - 1)
        advantages = deviations * count / (count - 1).clamp(min=1)
    elif baseline == "group_mean":
        advantages = deviations
    else:
        raise ValueError(f"baseline must be 'group_mean' or 'leave_one_out', not {baseline!r}")
    if std == "group":
        advantages = advantages / (_std(deviations, count, 1, ddof) + eps)
    elif std == "batch":
        total = judged.sum().to(rewards.dtype).reshape(1, 1)
        advantages = advantages / (_std(_deviations(rewards, judged, total, (0, 1)), total, (0, 1), ddof) + eps)
    elif std != "none":
        raise ValueError(f"std must be 'group', 'batch' or 'none', not {std!r}")
    # The mean of equal floats may differ from them in the last bit, and dividing by a tiny std would blow that up.
    informative = informative_groups(rewards, judged).unsqueeze(1)
    return torch.where(judged & informative, advantages, torch.zeros_like(advantages))


def reward_advantages(
    components: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    baseline: AdvantageBaseline = "group_mean",
    std: AdvantageStd = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    judged: Tensor | None = None,
) -> Tensor:
    """Weighted sum of each reward's own advantages within its group, all [num_prompts, group_size] (GDPO, 2601.05242).

    A reward of small spread so counts as much as one of large spread. `std="batch"` is GDPO as published: each reward
    over its group's std, then their sum over its std in the step; "group" leaves the second division out, "none" both.
    Raises ValueError unless weights and components have the same names, and as `group_advantages` does.
    """
    if not components or components.keys() != weights.keys():
        raise ValueError(f"rewards {sorted(components)} need weights of the same names, got {sorted(weights)}")
    within: AdvantageStd = "group" if std == "batch" else std
    parts = [
        weights[name] * group_advantages(rewards, baseline=baseline, std=within, ddof=ddof, eps=eps, judged=judged)
        for name, rewards in components.items()
    ]
    total = torch.stack(parts).sum(dim=0)
    if std != "batch":
        return total
    judged = torch.ones_like(total, dtype=torch.bool) if judged is None else judged
    count = judged.sum().to(total.dtype).reshape(1, 1)
    scaled = total / (_std(_deviations(total, judged, count, (0, 1)), count, (0, 1), ddof) + eps)
    return torch.where(total == 0, total, scaled)  # 0 / 0 where no reward says anything


def informative_groups(rewards: Tensor, judged: Tensor | None = None) -> Tensor:
    """Whether each group has two different (judged) rewards, and so a gradient; [num_prompts, group_size] to [num_prompts]."""
    judged = torch.ones_like(rewards, dtype=torch.bool) if judged is None else judged
    infinity = torch.full_like(rewards, float("inf"))
    lowest = torch.where(judged, rewards, infinity).amin(dim=1)
    return torch.where(judged, rewards, -infinity).amax(dim=1) > lowest


def _deviations(rewards: Tensor, judged: Tensor, count: Tensor, dim: int | tuple[int, int]) -> Tensor:
    mean = rewards.sum(dim=dim, keepdim=True) / count.clamp(min=1)
    return torch.where(judged, rewards - mean, torch.zeros_like(rewards))


def _std(deviations: Tensor, count: Tensor, dim: int | tuple[int, int], ddof: int) -> Tensor:
    # No more samples than ddof have no variance; the count is floored because their deviations are zero.
    return (deviations.square().sum(dim=dim, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()


def _checked(rewards: Tensor, judged: Tensor | None, ddof: int, eps: float) -> Tensor:
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards must be [num_prompts, group_size] with group_size >= 1, got {list(rewards.shape)}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point, got {rewards.dtype}")
    if ddof < 0 or eps < 0:
        raise ValueError(f"ddof and eps must not be negative, got ddof={ddof}, eps={eps}")
    judged = torch.ones_like(rewards, dtype=torch.bool) if judged is None else judged
    if judged.shape != rewards.shape or judged.dtype != torch.bool:
        raise ValueError(f"judged must be bool {list(rewards.shape)}, got {judged.dtype} {list(judged.shape)}")
    broken = judged & ~torch.isfinite(rewards)
    if bool(broken.any()):
        group, sample = broken.nonzero()[0].tolist()
        raise ValueError(f"reward of group {group}, sample {sample} is {rewards[group, sample].item()}, not a number")
    return judged
