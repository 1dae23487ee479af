"""Rows from tokens to their experts and back, by a plan: copies one way, sums over a token's k rows the other.

Nothing is added across programs, so results are the same bit for bit on every run, and a row does not depend on others.
T tokens, k choices, MP expanded rows as in plan.py; D is any width.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from policy.kernels.dispatch import Backend, choose_backend
from policy.kernels.plan import Plan

BLOCK = 128


@overload
def permute(rows: Tensor, scales: None, plan: Plan, *, backend: Backend | None = None) -> Tensor: ...
@overload
def permute(rows: Tensor, scales: Tensor, plan: Plan, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]: ...


def permute(
    rows: Tensor, scales: Tensor | None, plan: Plan, *, backend: Backend | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The expanded rows [MP, D] of token rows [T, D] of any type; padding is zero.

    With the scales [S, T] of quantised rows (`quantize_rows`) also theirs, [S, MP]: zero for padding.
    """
    num_tokens = len(plan.position)
    if rows.dim() != 2 or len(rows) != num_tokens or not rows.is_contiguous():
        raise ValueError(
            f"rows {list(rows.shape)} must be contiguous and one for each of the plan's {num_tokens} tokens"
        )
    if scales is not None and (scales.dim() != 2 or scales.shape[1] != num_tokens or scales.dtype != torch.float32):
        raise ValueError(f"scales {scales.dtype} {list(scales.shape)} must be float32 [_, {num_tokens}]")
    if choose_backend("permute", rows, backend) == "triton":
        from policy.kernels import permute_triton

        expanded, expanded_scales = permute_triton.permute(rows, scales, plan)
    else:
        expanded = _gather(rows.view(_bits(rows)), plan).view(rows.dtype)
        expanded_scales = None if scales is None else _gather(scales.T, plan).T.contiguous()
    return expanded if expanded_scales is None else (expanded, expanded_scales)


def permute_backward(grad: Tensor, plan: Plan, *, backend: Backend | None = None) -> Tensor:
    """The gradient [T, D] of `permute`'s rows from that of the expanded ones [MP, D]."""
    return combine(grad, plan, backend=backend)


def combine(y: Tensor, plan: Plan, weights: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """The sum [T, D] over each token's rows of y [MP, D] (bf16 or float32), each times its weight [T, k] where given.

    Summed in float32 in the order of slots and rounded once; rows of experts that are not ours count nothing. There is
    no backward with weights: in training they are folded into the activation (swiglu.py).
    """
    if y.dim() != 2 or len(y) != len(plan.source_row) or not y.is_contiguous():
        raise ValueError(f"y {list(y.shape)} must be contiguous with the plan's {len(plan.source_row)} rows")
    if y.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"y must be bfloat16 or float32, not {y.dtype}")
    if weights is not None and (weights.shape != plan.position.shape or weights.dtype != torch.float32):
        raise ValueError(
            f"weights {weights.dtype} {list(weights.shape)} must be float32 {list(plan.position.shape)}, as the plan's"
        )
    if choose_backend("combine", y, backend) == "triton":
        from policy.kernels import permute_triton

        return permute_triton.combine(y, plan, None if weights is None else weights.contiguous())
    total = torch.zeros(len(plan.position), y.shape[1], device=y.device)
    for slot, position in enumerate(plan.position.long().unbind(1)):
        row = y[position.clamp(min=0)].float()
        row = row if weights is None else row * weights[:, slot, None]
        total = total + row.where(position[:, None] >= 0, 0.0)
    return total.to(y.dtype)


def combine_backward(grad: Tensor, plan: Plan, *, backend: Backend | None = None) -> Tensor:
    """The gradient [MP, D] of the rows that `combine` sums without weights from that of its sums [T, D]."""
    return permute(grad, None, plan, backend=backend)


def permute_weights(weights: Tensor, plan: Plan) -> Tensor:
    """The weight of each expanded row, [MP], from those of the choices [T, k]; zero for padding."""
    place = plan.source_row.long() * weights.shape[1] + plan.source_slot
    if not weights.numel():
        return weights.new_zeros(len(place))
    return weights.flatten()[place.clamp(min=0)].where(plan.source_row >= 0, 0.0)


def permute_weights_backward(grad: Tensor, plan: Plan) -> Tensor:
    """The gradient [T, k] of `permute_weights`' weights from that of the rows [MP]."""
    return grad[plan.position.long().clamp(min=0)].where(plan.position >= 0, 0.0)


def _bits(rows: Tensor) -> torch.dtype:
    """The whole-number type of the same size, so that a copy keeps every bit."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[rows.element_size()]


def _gather(rows: Tensor, plan: Plan) -> Tensor:
    """rows[source_row], zero where it is -1."""
    return torch.cat((rows, rows.new_zeros(1, rows.shape[1])))[plan.source_row.long()]
