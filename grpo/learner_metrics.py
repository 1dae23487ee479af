"""What a step of the learner reports: the terms of its optimizer steps, over all ranks, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from grpo.losses import LossTerms


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer step over all ranks: `norm` of its gradient, the rate it ran at, and how its work was cut up.

    `packing_waste` and `imbalance_waste` are those of `policy.packing.wasted_shares`; `num_microbatches` is per rank.
    """

    terms: LossTerms
    norm: float
    lr: float
    entropy_coef: float
    num_microbatches: int
    packing_waste: float
    imbalance_waste: float

    @property
    def finite(self) -> bool:
        """Whether there is a loss and a gradient to step by; the same on every rank."""
        return math.isfinite(self.norm) and bool(torch.isfinite(self.terms.loss))

    @property
    def entropy(self) -> float:
        """Mean over completion tokens, in nats; NaN where there was none."""
        return float(self.terms.entropy) / float(self.terms.num_tokens) if self.terms.num_tokens else math.nan


def over_ranks(terms: LossTerms, device: torch.device) -> LossTerms:
    """The terms of all ranks together, the same on each; collective."""
    names = [field.name for field in fields(terms)]
    own = torch.stack([getattr(terms, name) for name in names]).double().to(device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    total, *others = (LossTerms(**dict(zip(names, values.unbind(), strict=True))) for values in everyone)
    for other in others:
        total = total + other
    return total


def step_metrics(updates: Sequence[Update], *, has_reference: bool) -> dict[str, float]:
    """Losses, norms and wastes as means over optimizer steps, all else as means over completion tokens.

    Those skipped must not blank out the others: they count in `skipped` alone, unless there is nothing else.
    """
    kept = [update for update in updates if update.finite] or list(updates[:1])
    total = kept[0].terms
    for update in kept[1:]:
        total = total + update.terms
    values = total.metrics()
    count = len(kept)
    metrics = {
        "loss": values["loss"] / count,
        "policy_loss": values["policy_loss"] / count,
        "kl_loss": values["kl_loss"] / count,
        "kl": values["kl"],
        "entropy": values["entropy"],
        "entropy_coef": updates[-1].entropy_coef,
        "entropy_loss": values["entropy_loss"] / count,
        "clip_fraction": values["clipped_low"] + values["clipped_high"] + values["clipped_dual"],
        "clip_fraction_low": values["clipped_low"],
        "clip_fraction_high": values["clipped_high"],
        "clip_fraction_dual": values["clipped_dual"],
        "ratio_mean": values["ratio"],
        "mismatch_truncated": values["mismatch_truncated"],
        "mismatch_masked": values["mismatch_masked"],
        "off_policy_masked": values["off_policy_masked"],
        "rollout_kl_k1": values["rollout_kl_k1"],
        "rollout_kl_k3": values["rollout_kl_k3"],
        "rollout_chi2": values["rollout_chi2"],
        "logprob_gap_mean": values["logprob_gap"],
        "logprob_gap_max": values["logprob_gap_max"],
        "grad_norm": sum(update.norm for update in kept) / count,
        "lr": updates[-1].lr,
        "skipped": sum(not update.finite for update in updates),
        "num_optimizer_steps": len(updates),
        "num_microbatches": sum(update.num_microbatches for update in updates),
        "packing_waste": sum(update.packing_waste for update in updates) / len(updates),
        "imbalance_waste": sum(update.imbalance_waste for update in updates) / len(updates),
    }
    if not has_reference:  # there is no KL to speak of
        del metrics["kl"], metrics["kl_loss"]
    return metrics
