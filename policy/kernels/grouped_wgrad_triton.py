"""Triton kernel of grouped_wgrad.py: persistent over the tiles of every expert's gradient, with TMA loads and stores."""

# Kernels are not Python to a type checker: their arguments are pointers and their numbers tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.compile_cases import CompileCase
from policy.kernels.grouped_gemm_triton import Config, num_programs, place_of_tile, provide_descriptor_memory

BLOCK = 128
CONFIGS = {
    "plain": Config(num_warps=8, num_stages=4, wide=False, specialized=False),
    "specialized": Config(num_warps=4, num_stages=4, wide=False, specialized=True),
}
# The configuration of shapes (N, K) for which a measurement found another one faster than "plain".
FASTEST: dict[tuple[int, int], str] = {}


@triton.jit
def grouped_wgrad_kernel(
    dyq, dys, xq, xs, dw, expert_offsets, num_rows, N, K, num_experts,
    NUM_STAGES: tl.constexpr, GROUP: tl.constexpr, ACCUMULATE: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    down, across = N // 128, K // 128
    left = tl.make_tensor_descriptor(dyq, shape=[N, num_rows], strides=[num_rows, 1], block_shape=[128, 128])
    right = tl.make_tensor_descriptor(xq, shape=[K, num_rows], strides=[num_rows, 1], block_shape=[128, 128])
    out = tl.make_tensor_descriptor(dw, shape=[num_experts * N, K], strides=[K, 1], block_shape=[128, 128])
    lane = tl.arange(0, 128)
    tiles = num_experts * down * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=SPECIALIZED):
        expert = tile // (down * across)
        row_tile, column_tile = place_of_tile(tile % (down * across), down, across, GROUP)
        row, column = row_tile * 128, column_tile * 128
        start = tl.load(expert_offsets + expert) // 128
        end = tl.load(expert_offsets + expert + 1) // 128
        acc = tl.zeros((128, 128), tl.float32)
        for block in tl.range(start, end, num_stages=NUM_STAGES):
            a = left.load([row, block * 128])
            b = right.load([column, block * 128])
            row_scale = tl.load(dys + block * N + row + lane)
            column_scale = tl.load(xs + block * K + column + lane)
            acc += tl.dot(a, b.T) * row_scale[:, None] * column_scale[None, :]
        if not ACCUMULATE:
            out.store([expert * N + row, column], acc.to(dw.dtype.element_ty))
        elif end > start:
            acc += out.load([expert * N + row, column])
            out.store([expert * N + row, column], acc)


def grouped_wgrad(
    dyq: Tensor,
    dys: Tensor,
    xq: Tensor,
    xs: Tensor,
    expert_offsets: Tensor,
    out: Tensor | None,
    out_dtype: torch.dtype,
    config: str | None = None,
) -> Tensor:
    """As grouped_wgrad.grouped_wgrad, with arguments that it has checked; `config` is a name in CONFIGS."""
    (n, m), k, experts = dyq.shape, len(xq), len(expert_offsets) - 1
    chosen = CONFIGS[config or FASTEST.get((n, k), "plain")]
    dw = torch.empty(experts, n, k, dtype=out_dtype, device=dyq.device) if out is None else out
    if not m:
        return dw if out is not None else dw.zero_()
    if dw.numel():
        provide_descriptor_memory()
        with torch.cuda.device_of(dyq):
            grouped_wgrad_kernel[(num_programs(dyq, dw.numel() // BLOCK**2),)](
                dyq, dys, xq, xs, dw, expert_offsets, m, n, k, experts,
                NUM_STAGES=chosen.num_stages, GROUP=chosen.group, ACCUMULATE=out is not None,
                SPECIALIZED=chosen.specialized, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
            )  # fmt: skip
    return dw


_SIGNATURE = {"dyq": "*fp8e4nv", "dys": "*fp32", "xq": "*fp8e4nv", "xs": "*fp32", "expert_offsets": "*i32"}
_SIGNATURE |= dict.fromkeys(("num_rows", "N", "K", "num_experts"), "i32")


def _case(config: str, name: str, *, accumulate: bool = False, **known: int) -> CompileCase:
    chosen = CONFIGS[config]
    signature = {**_SIGNATURE, "dw": "*fp32" if accumulate else "*bf16"}
    return CompileCase(
        f"grouped_wgrad/{config}/{name}",
        grouped_wgrad_kernel,
        {argument: kind for argument, kind in signature.items() if argument not in known},
        {
            "NUM_STAGES": chosen.num_stages,
            "GROUP": chosen.group,
            "ACCUMULATE": accumulate,
            "SPECIALIZED": chosen.specialized,
            **known,
        },
        chosen.num_warps,
        chosen.num_stages,
        aligned=("num_rows", "N", "K"),
    )


COMPILE_CASES = [
    case
    for config in CONFIGS
    for case in (
        _case(config, "bf16"),
        _case(config, "accumulate", accumulate=True),
        _case(config, "one_expert", num_experts=1),
    )
]
