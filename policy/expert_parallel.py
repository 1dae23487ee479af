"""Experts split over ranks (GShard, arXiv 2006.16668, section 3.3): tokens travel to their experts and back.

Letters as in deepseek.py, and R ranks of the group, each with E / R consecutive experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call

from policy.config import Precision
from policy.deepseek import Experts


class _Exchange(torch.autograd.Function):
    """Rows to the ranks of a group and from them; the gradient goes the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `sent[0]` rows to rank 0 of the group, and so on; rows come back in the order of their ranks."""
    out = _Exchange.apply(rows, sent, received, group)
    assert isinstance(out, Tensor)
    return out


def _all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


class ParallelExperts(nn.Module):
    """In the place of `Experts`: the same names, whole shapes and results, but each rank holds and computes E / R experts.

    All ranks of the mesh must call it together, each with its own tokens, also with none. Gradients of the weights are
    those of the sum of all these ranks' losses.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh):
        super().__init__()
        self.num_ranks, self.group = mesh.size(), mesh.get_group()
        self.gate_up_proj = _own_experts(experts.gate_up_proj, mesh)
        self.down_proj = _own_experts(experts.down_proj, mesh)
        # Computes with whatever weights it is lent; itself it holds none, and the list hides it from our state.
        self._arithmetic = [experts.to("meta")]

    @property
    def precision(self) -> Precision:
        """That of the products: what travels is in the type of x."""
        return self._arithmetic[0].precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        self._arithmetic[0].precision = precision

    def forward(self, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """As `Experts.forward`: x [T, D], gates and experts [T, K] -> [T, D]."""
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)  # by expert, so by rank
        counts = torch.bincount(experts.flatten(), minlength=self.gate_up_proj.shape[0])
        arriving = torch.empty_like(counts)  # [R, E / R]: tokens from each rank for each expert of ours
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent, received = torch.stack((counts, arriving)).view(2, self.num_ranks, -1).sum(-1).tolist()
        rows = exchange(x[order // top_k], sent, received, self.group)
        out = exchange(self._compute(rows, arriving), received, sent, self.group)
        out = torch.empty_like(out).index_copy(0, order, out)
        return (out.unflatten(0, (-1, top_k)) * gates[..., None].to(out.dtype)).sum(1)

    def _compute(self, rows: Tensor, arriving: Tensor) -> Tensor:
        """Our experts on rows [N, D] that came sorted by rank and, from each rank, by expert."""
        stacked: Any = {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}  # DTensors, whole by now
        weights = {name: weight.to_local() for name, weight in stacked.items()}
        own = torch.arange(len(weights["down_proj"]), device=rows.device).repeat(self.num_ranks)
        experts = torch.repeat_interleave(own, arriving)[:, None]
        return functional_call(self._arithmetic[0], weights, (rows, rows.new_ones(len(rows), 1), experts))


def _own_experts(stacked: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's part of [E, ...] as a DTensor that is split by experts."""
    count = len(stacked) // mesh.size()
    first = mesh.get_local_rank() * count
    part = stacked.detach()[first : first + count].clone()
    return nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False), stacked.requires_grad)
