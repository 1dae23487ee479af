"""The losses beside the main one: multi-token prediction and the sequence-wise balance of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from policy.logprobs import TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class AuxiliaryTotals:
    """Over one whole optimizer step, all micro-batches and ranks: targets at each depth ahead, and sequences."""

    mtp_targets: tuple[int, ...]
    num_sequences: int

    @classmethod
    def of(cls, position_ids: Tensor, mask: Tensor, num_sequences: int, depth: int) -> AuxiliaryTotals:
        """Counted from positions [T] and mask [T]: depth k has no targets among the first k + 1 tokens of a sequence."""
        counts = tuple(int(((position_ids > k) & mask.bool()).sum()) for k in range(1, depth + 1))
        return cls(mtp_targets=counts, num_sequences=num_sequences)


def auxiliary_loss(
    said: TokenLogprobs, totals: AuxiliaryTotals, *, mtp_loss_weight: float, balance_alpha: float
) -> Tensor:
    """A micro-batch's share of both losses, a scalar: weight / D times the summed mean cross-entropies of the D depths
    (arXiv 2412.19437, equations 24 and 25), and alpha times the mean balance loss over sequences (equations 17-20)."""
    loss = said.logprobs.new_zeros(())
    if mtp_loss_weight and said.mtp_logprobs:
        by_depth = zip(said.mtp_logprobs, totals.mtp_targets, strict=True)
        means = [-logprobs.sum() / max(targets, 1) for logprobs, targets in by_depth]
        loss = loss + mtp_loss_weight / len(means) * torch.stack(means).sum()
    if balance_alpha and said.balance_loss is not None:
        loss = loss + balance_alpha * said.balance_loss.sum() / totals.num_sequences
    return loss
