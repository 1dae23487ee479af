"""Where each token's row goes when rows are sorted by expert: made on the device, without a host's look at the counts.

Every expert's rows form a segment that is padded to whole tiles of 128 rows. All sizes follow from shapes alone, so the
last tiles belong to nobody. T tokens choose k experts each, E of them are ours, MP = `plan_rows(T, k, E)` rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.kernels.dispatch import Backend, choose_backend

BLOCK = 128


class Plan(NamedTuple):
    """The expanded rows and their sources, all int32; a segment's rows are in the order of tokens, then of slots.

    `expert_offsets` [E + 1]: where each segment begins, multiples of 128. `tile_expert` [MP / 128]: whose each tile is,
    -1 behind the last segment. `source_row` and `source_slot` [MP]: token and which of its k choices, -1 for padding.
    `position` [T, k]: the expanded row of each choice, -1 where the expert is not ours.
    """

    expert_offsets: Tensor
    tile_expert: Tensor
    source_row: Tensor
    source_slot: Tensor
    position: Tensor


def plan_rows(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Rows that are enough for any choice: all of them, rounded up, and up to a tile of padding for each expert."""
    return -(-num_tokens * top_k // BLOCK) * BLOCK + BLOCK * num_experts


def plan(indices: Tensor, num_experts: int, first_expert: int = 0, *, backend: Backend | None = None) -> Plan:
    """The plan for choices `indices` [T, k] (int32 or int64), where experts first_expert .. + num_experts - 1 are ours."""
    if indices.dim() != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be int32 or int64 [T, k], not {indices.dtype} {list(indices.shape)}")
    if num_experts < 1:
        raise ValueError(f"a plan needs experts, not {num_experts}")
    if plan_rows(indices.shape[0], indices.shape[1], num_experts) >= 2**31:
        raise ValueError(f"{list(indices.shape)} choices are more rows than int32 counts: use smaller micro-batches")
    if choose_backend("plan", indices, backend) == "triton":
        from policy.kernels import plan_triton

        return plan_triton.plan(indices.contiguous(), num_experts, first_expert)
    return _plan(indices, num_experts, first_expert)


def _plan(indices: Tensor, num_experts: int, first_expert: int) -> Plan:
    num_tokens, top_k = indices.shape
    num_rows, device = plan_rows(num_tokens, top_k, num_experts), indices.device
    expert = indices.flatten().long() - first_expert
    ours = (expert >= 0) & (expert < num_experts)
    expert = torch.where(ours, expert, num_experts)  # a last segment for what is not ours
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert))
    offsets = F.pad(((counts[:-1] + BLOCK - 1) // BLOCK * BLOCK).cumsum(0), (1, 0))

    order = expert.argsort(stable=True)
    begins = F.pad(counts.cumsum(0), (1, 0))
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device)) - begins[expert]
    position = torch.where(ours, offsets[expert] + rank, num_rows)
    choice = torch.full((num_rows + 1,), -1, dtype=torch.long, device=device)
    choice = choice.scatter(0, position, torch.arange(len(order), device=device))[:-1]

    tiles = torch.arange(0, num_rows, BLOCK, device=device)
    owner = torch.searchsorted(offsets[1:], tiles, right=True)
    return Plan(
        expert_offsets=offsets.int(),
        tile_expert=torch.where(owner < num_experts, owner, -1).int(),
        source_row=torch.where(choice < 0, -1, choice // max(top_k, 1)).int(),
        source_slot=torch.where(choice < 0, -1, choice % max(top_k, 1)).int(),
        position=torch.where(ours, position, -1).int().view(num_tokens, top_k),
    )
