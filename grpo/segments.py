"""Sums and means over the sequences of a packed call: flat token tensors [T], `sequence_ids` [T] from 0."""

from __future__ import annotations

import torch
from torch import Tensor


def masked(values: Tensor, completion_mask: Tensor) -> Tensor:
    """`values` [T] with exact zeros, and zero gradient, wherever the mask is false."""
    return torch.where(completion_mask, values, torch.zeros_like(values))


def sequence_sums(values: Tensor, completion_mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sum of `values` [T] over each sequence's completion tokens [num_sequences]."""
    return values.new_zeros(num_sequences).index_add(0, sequence_ids, masked(values, completion_mask))


def sequence_means(values: Tensor, completion_mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Mean of `values` [T] over each sequence's completion tokens [num_sequences]; 0 for a sequence without any."""
    sums = sequence_sums(values, completion_mask, sequence_ids, num_sequences)
    counts = values.new_zeros(num_sequences).index_add(0, sequence_ids, completion_mask.to(values.dtype))
    return sums / counts.clamp(min=1.0)
