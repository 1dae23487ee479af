"""Products of FP8 rows with their expert's FP8 weights, for the forward pass and the data gradient.

DeepSeek-V3's recipe (arXiv 2412.19437, 3.3.2): over each 128 of K the e4m3 products are summed, and every such sum is
multiplied by both scales and added to a float32 accumulator, in the order of K. A row's result depends on that row and
its expert's weights alone: nothing is split over K, and tiles are of one size whatever the number of rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from policy.kernels.dispatch import Backend, choose_backend
from policy.kernels.plan import Plan
from policy.kernels.quantize import BLOCK, FP8


def grouped_gemm(
    q: Tensor,
    s: Tensor,
    wq: Tensor,
    ws: Tensor,
    plan: Plan,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
) -> Tensor:
    """y [M, N]: rows q [M, K] (scales s [K/128, M]) times the transposed weights wq [E, N, K] (ws [E, N/128, K/128]).

    Row tile i belongs to expert `plan.tile_expert[i]`; tiles of none (-1) give zeros. The data gradient is the same
    with the transposed copy of the weights, qt [E, K, N] and st. M, N and K must be multiples of 128; out_dtype is
    bfloat16 or float32. The definition sums a block's products exactly (they fit float64), so it too is independent of
    the other rows.
    """
    _check(q, s, wq, ws, plan, out_dtype)
    if choose_backend("grouped_gemm", q, backend) == "triton":
        from policy.kernels import grouped_gemm_triton

        return grouped_gemm_triton.grouped_gemm(q, s, wq, ws, plan.tile_expert, plan.expert_offsets, out_dtype)
    out = torch.zeros(len(q), wq.shape[1], dtype=out_dtype, device=q.device)
    ends = plan.expert_offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(ends)):
        if start < end:
            out[start:end] = _blockwise(q[start:end], s[:, start:end], wq[expert], ws[expert]).to(out_dtype)
    return out


def _blockwise(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor) -> Tensor:
    """float32 [M, N] of one expert's rows q [M, K], s [K/128, M] and weights wq [N, K], ws [N/128, K/128]."""
    acc = torch.zeros(len(q), len(wq), device=q.device)
    for k in range(len(s)):
        columns = slice(k * BLOCK, (k + 1) * BLOCK)
        scale = s[k][:, None] * ws[:, k].repeat_interleave(BLOCK)
        acc += exact_product(q[:, columns], wq[:, columns]) * scale
    return acc


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """float32 a @ b.T of e4m3 a [M, 128] and b [N, 128], rounded once.

    A product is a whole multiple of 2^-18 and at most 448^2, so 128 of them sum within 43 bits: exact in float64, in
    any order.
    """
    return (a.double() @ b.double().T).float()


def _check(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, plan: Plan, out_dtype: torch.dtype) -> None:
    if q.dim() != 2 or wq.dim() != 3 or q.shape[1] != wq.shape[2]:
        raise ValueError(
            f"grouped_gemm: rows {list(q.shape)} and weights {list(wq.shape)} must be [M, K] and [E, N, K]"
        )
    (m, k), (experts, n) = q.shape, wq.shape[:2]
    if m % BLOCK or n % BLOCK or k % BLOCK:
        raise ValueError(f"grouped_gemm: M {m}, N {n} and K {k} must be multiples of {BLOCK}; pad where you quantise")
    check_operand("grouped_gemm: q", q, s, (k // BLOCK, m))
    check_operand("grouped_gemm: wq", wq, ws, (experts, n // BLOCK, k // BLOCK))
    if plan.expert_offsets.shape != (experts + 1,) or plan.tile_expert.shape != (m // BLOCK,):
        raise ValueError(
            f"grouped_gemm: the plan is of {len(plan.expert_offsets) - 1} experts and {len(plan.tile_expert)} row tiles, "
            f"the operands of {experts} and {m // BLOCK}"
        )
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"grouped_gemm: out_dtype must be bfloat16 or float32, not {out_dtype}")


def check_operand(name: str, q: Tensor, s: Tensor, scale_shape: tuple[int, ...]) -> None:
    """ValueError unless q is contiguous e4m3 and its scales contiguous float32 of `scale_shape`."""
    if q.dtype != FP8 or not q.is_contiguous():
        raise ValueError(f"{name} must be contiguous {FP8}, not {q.dtype} with strides {q.stride()}")
    if s.dtype != torch.float32 or s.shape != scale_shape or not s.is_contiguous():
        raise ValueError(
            f"{name}: scales must be contiguous float32 {list(scale_shape)}, not {s.dtype} {list(s.shape)}"
        )
