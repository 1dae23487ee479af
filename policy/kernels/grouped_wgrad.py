"""Gradients of expert weights from FP8 columns: of each expert, dY^T X over its own rows.

Both operands are quantised over 128 rows of one column and stored transposed, so that rows are the inner dimension. As
in grouped_gemm.py each block of 128 rows is summed alone, scaled, and added to a float32 accumulator, in row order.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from policy.kernels.dispatch import Backend, choose_backend
from policy.kernels.grouped_gemm import check_operand, exact_product
from policy.kernels.plan import Plan
from policy.kernels.quantize import BLOCK


def grouped_wgrad(
    dyq: Tensor,
    dys: Tensor,
    xq: Tensor,
    xs: Tensor,
    plan: Plan,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
) -> Tensor:
    """dW [E, N, K] of dyq [N, M] (dys [M/128, N]) and xq [K, M] (xs [M/128, K]): dW[e] = dY[rows of e]^T X[rows of e].

    Added once to float32 `out` where it is given, which is returned; otherwise stored as out_dtype, bfloat16 or float32.
    An expert without rows has zeros, or its part of `out` untouched. M, N and K must be multiples of 128.
    """
    _check(dyq, dys, xq, xs, plan, out, out_dtype)
    if choose_backend("grouped_wgrad", dyq, backend) == "triton":
        from policy.kernels import grouped_wgrad_triton

        return grouped_wgrad_triton.grouped_wgrad(dyq, dys, xq, xs, plan.expert_offsets, out, out_dtype)
    ends = [row // BLOCK for row in plan.expert_offsets.tolist()]
    shape = (len(ends) - 1, len(dyq), len(xq))
    result = torch.zeros(shape, dtype=out_dtype, device=dyq.device) if out is None else out
    for expert, (start, end) in enumerate(pairwise(ends)):
        if start < end:
            gradient = _blockwise(dyq, dys, xq, xs, range(start, end))
            result[expert] = gradient.to(out_dtype) if out is None else result[expert] + gradient
    return result


def _blockwise(dyq: Tensor, dys: Tensor, xq: Tensor, xs: Tensor, blocks: range) -> Tensor:
    """float32 [N, K] summed over `blocks` of 128 rows."""
    acc = torch.zeros(len(dyq), len(xq), device=dyq.device)
    for block in blocks:
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        acc += exact_product(dyq[:, rows], xq[:, rows]) * dys[block][:, None] * xs[block]
    return acc


def _check(
    dyq: Tensor, dys: Tensor, xq: Tensor, xs: Tensor, plan: Plan, out: Tensor | None, out_dtype: torch.dtype
) -> None:
    if dyq.dim() != 2 or xq.dim() != 2 or dyq.shape[1] != xq.shape[1]:
        raise ValueError(f"grouped_wgrad: columns {list(dyq.shape)} and {list(xq.shape)} must be [N, M] and [K, M]")
    (n, m), k = dyq.shape, len(xq)
    if m % BLOCK or n % BLOCK or k % BLOCK:
        raise ValueError(f"grouped_wgrad: M {m}, N {n} and K {k} must be multiples of {BLOCK}; pad where you quantise")
    check_operand("grouped_wgrad: dyq", dyq, dys, (m // BLOCK, n))
    check_operand("grouped_wgrad: xq", xq, xs, (m // BLOCK, k))
    if plan.tile_expert.shape != (m // BLOCK,):
        raise ValueError(f"grouped_wgrad: the plan has {len(plan.tile_expert)} row tiles, the operands {m // BLOCK}")
    shape = (len(plan.expert_offsets) - 1, n, k)
    if out is not None and (out.dtype != torch.float32 or out.shape != shape or not out.is_contiguous()):
        raise ValueError(
            f"grouped_wgrad: out must be contiguous float32 {list(shape)}, not {out.dtype} {list(out.shape)}"
        )
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"grouped_wgrad: out_dtype must be bfloat16 or float32, not {out_dtype}")
