"""A linear layer in FP8: the expert products with one expert, whose rows are those of x in their order.

The three products of y = x W^T for x [T, K], W [N, K]. `plan` is always `dense_plan(T, device)`: one serves a whole
step. `weight` is `quantize_weight` of W[None]. T, N and K may be any size, as what is quantised is padded with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.kernels.dispatch import Backend
from policy.kernels.grouped_gemm import grouped_gemm
from policy.kernels.grouped_wgrad import grouped_wgrad
from policy.kernels.plan import Plan
from policy.kernels.quantize import (
    ACTIVATION_FLOOR,
    BLOCK,
    GRADIENT_FLOOR,
    Fp8Weight,
    quantize_rows,
    quantize_rows_and_columns,
)


class Columns(NamedTuple):
    """What the weight gradient takes of an operand [T, K]: q [K, M] and s [M/128, K] of `quantize_columns`."""

    q: Tensor
    s: Tensor


def dense_plan(num_rows: int, device: torch.device | str) -> Plan:
    """The plan of one expert that has all rows, in M = `num_rows` rounded up to 128. Made on the device."""
    padded = -(-num_rows // BLOCK) * BLOCK
    row = torch.arange(padded, dtype=torch.int32, device=device)
    live = row < num_rows
    return Plan(
        expert_offsets=torch.arange(2, dtype=torch.int32, device=device) * padded,
        tile_expert=torch.zeros(padded // BLOCK, dtype=torch.int32, device=device),
        source_row=torch.where(live, row, -1),
        source_slot=live.int() - 1,
        position=row[:num_rows, None],
    )


def linear_forward(
    x: Tensor,
    weight: Fp8Weight,
    num_outputs: int,
    plan: Plan,
    *,
    columns: bool,
    power_of_two: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Columns | None]:
    """y [T, N = num_outputs] in bfloat16, and with `columns` x as `linear_wgrad` takes it."""
    q, s, kept = _quantized(x, plan, ACTIVATION_FLOOR, columns, power_of_two, backend)
    return grouped_gemm(q, s, weight.q, weight.s, plan, backend=backend)[: len(x), :num_outputs], kept


def linear_dgrad(
    dy: Tensor,
    weight: Fp8Weight,
    num_inputs: int,
    plan: Plan,
    *,
    columns: bool,
    power_of_two: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Columns | None]:
    """dx [T, K = num_inputs] in bfloat16 of dy [T, N], and with `columns` dy as `linear_wgrad` takes it."""
    q, s, kept = _quantized(dy, plan, GRADIENT_FLOOR, columns, power_of_two, backend)
    return grouped_gemm(q, s, weight.qt, weight.st, plan, backend=backend)[: len(dy), :num_inputs], kept


def linear_wgrad(
    dy: Columns,
    x: Columns,
    num_outputs: int,
    num_inputs: int,
    plan: Plan,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
) -> Tensor:
    """dW [N, K] of the columns of dy and x: as out_dtype, or added to float32 `out` [N, K], which is returned."""
    if out is None:
        return grouped_wgrad(*dy, *x, plan, out_dtype=out_dtype, backend=backend)[0, :num_outputs, :num_inputs]
    if out.shape == (len(dy.q), len(x.q)):
        return grouped_wgrad(*dy, *x, plan, out=out[None], backend=backend)[0]
    # The kernel writes whole blocks of 128, which `out` has no room for.
    padded = grouped_wgrad(*dy, *x, plan, out_dtype=torch.float32, backend=backend)
    return out.add_(padded[0, :num_outputs, :num_inputs])


def _quantized(
    x: Tensor, plan: Plan, floor: float, columns: bool, power_of_two: bool, backend: Backend | None
) -> tuple[Tensor, Tensor, Columns | None]:
    """Rows of x padded to the plan's, quantised: q [M, K], s [K/128, M], and the columns if they are wanted."""
    if columns:
        q, s, qt, st = quantize_rows_and_columns(
            x, plan.source_row, floor=floor, power_of_two=power_of_two, backend=backend
        )
        return q, s, Columns(qt, st)
    x = F.pad(x, (0, 0, 0, len(plan.source_row) - len(x))) if len(x) < len(plan.source_row) else x
    return *quantize_rows(x, floor=floor, power_of_two=power_of_two, backend=backend), None
