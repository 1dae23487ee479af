"""Triton kernel of grouped_gemm.py: persistent, with TMA loads of the e4m3 operands.

Every program takes tiles of 128 rows in turn; the scales are applied outside the matrix unit, after each 128 of K.
Addresses beyond 2^31 bytes are the descriptors' affair; the scales' places stay below it (128 or 16,384 fewer of them).
"""

# Kernels are not Python to a type checker: their arguments are pointers and their numbers tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.compile_cases import CompileCase

BLOCK = 128
# Programs where there is no GPU to ask for its number of processors.
INTERPRETED_PROGRAMS = 3


class Config(NamedTuple):
    """How a kernel is launched; `specialized`: one warp group loads and two compute, each half of a tile's rows.

    A `wide` tile has 256 columns, in two products of 128 (half the reads of rows, but registers spill); `group` row
    tiles share the weights they read.
    """

    num_warps: int
    num_stages: int
    wide: bool
    specialized: bool
    group: int = 8


CONFIGS = {
    "plain": Config(num_warps=8, num_stages=4, wide=False, specialized=False),
    "specialized": Config(num_warps=4, num_stages=4, wide=False, specialized=True),
    "wide": Config(num_warps=8, num_stages=3, wide=True, specialized=False),
}
# The configuration of shapes (N, K) for which a measurement found another one faster than "plain".
FASTEST: dict[tuple[int, int], str] = {}


@triton.jit
def place_of_tile(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): down GROUP row tiles first, then across, so that operands are found in the cache."""
    first = tile // (GROUP * column_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def grouped_gemm_kernel(
    q, s, wq, ws, y, tile_expert, expert_offsets, num_rows, N, K, num_experts,
    NUM_STAGES: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    width = 256 if WIDE else 128
    live_tiles = tl.load(expert_offsets + num_experts) // 128
    column_tiles = tl.cdiv(N, width)
    column_blocks = N // 128
    depth = K // 128
    rows = tl.make_tensor_descriptor(q, shape=[num_rows, K], strides=[K, 1], block_shape=[128, 128])
    weights = tl.make_tensor_descriptor(wq, shape=[num_experts * N, K], strides=[K, 1], block_shape=[128, 128])
    out = tl.make_tensor_descriptor(y, shape=[num_rows, N], strides=[N, 1], block_shape=[128, 128])
    lane = tl.arange(0, 128)
    for tile in tl.range(tl.program_id(0), live_tiles * column_tiles, tl.num_programs(0), warp_specialize=SPECIALIZED):
        row_tile, column_tile = place_of_tile(tile, live_tiles, column_tiles, GROUP)
        expert = tl.load(tile_expert + row_tile)
        row, column = row_tile * 128, column_tile * width
        row_scale = s + row + lane
        # A vector of one number: a scalar load in a warp-specialised loop is not guarded against later stages.
        column_scale = ws + (expert * column_blocks + column // 128) * depth + lane * 0
        first = tl.zeros((128, 128), tl.float32)
        if WIDE:
            second = tl.zeros((128, 128), tl.float32)
        for k in tl.range(0, depth, num_stages=NUM_STAGES):
            a = rows.load([row, k * 128])
            b = weights.load([expert * N + column, k * 128])
            scale = tl.load(row_scale + k * num_rows)
            first += tl.dot(a, b.T) * (scale * tl.load(column_scale + k))[:, None]
            if WIDE:
                b = weights.load([expert * N + column + 128, k * 128])
                second += tl.dot(a, b.T) * (scale * tl.load(column_scale + depth + k))[:, None]
        out.store([row, column], first.to(y.dtype.element_ty))
        if WIDE:
            out.store([row, column + 128], second.to(y.dtype.element_ty))
    zeros = tl.zeros((128, 128), y.dtype.element_ty)
    for tile in range(
        live_tiles * column_blocks + tl.program_id(0), num_rows // 128 * column_blocks, tl.num_programs(0)
    ):
        out.store([tile // column_blocks * 128, tile % column_blocks * 128], zeros)


def num_programs(tensor: Tensor, num_tiles: int) -> int:
    """One program a processor, and no more than there are tiles."""
    if tensor.device.type != "cuda":
        return min(INTERPRETED_PROGRAMS, num_tiles)
    return min(torch.cuda.get_device_properties(tensor.device).multi_processor_count, num_tiles)


def provide_descriptor_memory() -> None:
    """Let triton allocate what descriptors take: asked of it in every thread, the backward pass has its own."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def grouped_gemm(
    q: Tensor,
    s: Tensor,
    wq: Tensor,
    ws: Tensor,
    tile_expert: Tensor,
    expert_offsets: Tensor,
    out_dtype: torch.dtype,
    config: str | None = None,
) -> Tensor:
    """As grouped_gemm.grouped_gemm, with arguments that it has checked; `config` is a name in CONFIGS."""
    (m, k), (experts, n) = q.shape, wq.shape[:2]
    chosen = CONFIGS[config or FASTEST.get((n, k), "plain")]
    if chosen.wide and n % (2 * BLOCK):
        raise ValueError(f"wide tiles need N to be a multiple of {2 * BLOCK}, not {n}")
    if not m * n * k:
        return torch.zeros(m, n, dtype=out_dtype, device=q.device)
    y = torch.empty(m, n, dtype=out_dtype, device=q.device)
    provide_descriptor_memory()
    with torch.cuda.device_of(q):
        grouped_gemm_kernel[(num_programs(q, m // BLOCK * (n // BLOCK)),)](
            q, s, wq, ws, y, tile_expert, expert_offsets, m, n, k, experts,
            NUM_STAGES=chosen.num_stages, GROUP=chosen.group, WIDE=chosen.wide, SPECIALIZED=chosen.specialized,
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    return y


_SIGNATURE = {"q": "*fp8e4nv", "s": "*fp32", "wq": "*fp8e4nv", "ws": "*fp32", "y": "*bf16"}
_SIGNATURE |= {"tile_expert": "*i32", "expert_offsets": "*i32"}
_SIGNATURE |= dict.fromkeys(("num_rows", "N", "K", "num_experts"), "i32")


def _case(config: str, out: str, name: str | None = None, **known: int) -> CompileCase:
    chosen = CONFIGS[config]
    signature = {**_SIGNATURE, "y": f"*{out}"}
    return CompileCase(
        f"grouped_gemm/{config}/{name or out}",
        grouped_gemm_kernel,
        {argument: kind for argument, kind in signature.items() if argument not in known},
        {
            "NUM_STAGES": chosen.num_stages,
            "GROUP": chosen.group,
            "WIDE": chosen.wide,
            "SPECIALIZED": chosen.specialized,
            **known,
        },
        chosen.num_warps,
        chosen.num_stages,
        aligned=("num_rows", "N", "K"),
        default=not chosen.wide,
    )


COMPILE_CASES = [
    _case("plain", "bf16"),
    _case("plain", "fp32"),
    _case("plain", "bf16", "one_expert", num_experts=1),
    _case("specialized", "bf16"),
    _case("specialized", "bf16", "one_expert", num_experts=1),
    _case("wide", "bf16"),
]
