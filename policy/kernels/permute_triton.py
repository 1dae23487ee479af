"""Triton kernels of permute.py.

Permuting reads each token once and writes it to its k rows, which is (2k) / (k + 1) times fewer bytes than reading it for
each of them; the padding rows are written by programs of their own.
"""
# Kernels are Python in syntax only, which the type checker can't know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.compile_cases import CompileCase
from policy.kernels.plan import BLOCK, Plan

# Tokens and 4-byte words per program, and warps.
PERMUTE_BLOCK_T, PERMUTE_BLOCK_D, PERMUTE_WARPS = 8, 512, 4
SCALES_BLOCK_S, SCALES_BLOCK_M, SCALES_WARPS = 8, 256, 4
COMBINE_BLOCK_T, COMBINE_BLOCK_D, COMBINE_WARPS = 4, 512, 4


@triton.jit
def permute_kernel(
    x, position, source_row, out, num_tokens, token_programs, width,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copies x [T, width] to out [MP, width]; programs from `token_programs` on write the zeros of a tile's padding."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (column < width)[None, :]
    if program < token_programs:
        token = program * BLOCK_T + tl.arange(0, BLOCK_T)
        live = token < num_tokens
        choice = position + token.to(tl.int64) * TOP_K
        wanted = tl.full((BLOCK_T,), -1, tl.int32)
        for slot in tl.static_range(TOP_K):
            wanted = tl.maximum(wanted, tl.load(choice + slot, mask=live, other=-1))
        source = x + token.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(source, mask=(wanted >= 0)[:, None] & inside)
        for slot in tl.static_range(TOP_K):
            row = tl.load(choice + slot, mask=live, other=-1)
            target = out + row.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(target, value, mask=(row >= 0)[:, None] & inside)
    else:
        tile_row = (program - token_programs) * 128 + tl.arange(0, 128)
        padding = tl.load(source_row + tile_row) < 0
        place = out + tile_row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(place, tl.zeros((128, BLOCK_D), out.dtype.element_ty), mask=padding[:, None] & inside)


@triton.jit
def permute_scales_kernel(
    s, source_row, out, num_blocks, num_tokens, num_rows, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr
):
    """out [S, MP] from s [S, T]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = (block < num_blocks)[:, None] & (row < num_rows)[None, :]
    source = tl.load(source_row + row, mask=row < num_rows, other=-1)
    at = block.to(tl.int64)[:, None]
    value = tl.load(s + at * num_tokens + source[None, :], mask=inside & (source >= 0)[None, :], other=0.0)
    tl.store(out + at * num_rows + row[None, :], value, mask=inside)


@triton.jit
def combine_kernel(
    y, position, weights, out, num_tokens, width,
    WEIGHTED: tl.constexpr, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = token < num_tokens
    inside = (column < width)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for slot in tl.static_range(TOP_K):
        choice = token.to(tl.int64) * TOP_K + slot
        row = tl.load(position + choice, mask=live, other=-1)
        source = y + row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(source, mask=(row >= 0)[:, None] & inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + choice, mask=row >= 0, other=0.0)[:, None]
        total += value
    target = out + token.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & inside)


def permute(rows: Tensor, scales: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor | None]:
    num_tokens, top_k = plan.position.shape
    num_rows = len(plan.source_row)
    expanded = torch.empty(num_rows, rows.shape[1], dtype=rows.dtype, device=rows.device)
    source, target = _words(rows), _words(expanded)
    width = target.shape[1]
    token_programs = triton.cdiv(num_tokens, PERMUTE_BLOCK_T)
    with torch.cuda.device_of(rows):
        if width:
            permute_kernel[(token_programs + num_rows // BLOCK, triton.cdiv(width, PERMUTE_BLOCK_D))](
                source, plan.position, plan.source_row, target, num_tokens, token_programs, width,
                TOP_K=top_k, BLOCK_T=PERMUTE_BLOCK_T, BLOCK_D=PERMUTE_BLOCK_D, num_warps=PERMUTE_WARPS,
            )  # fmt: skip
        return expanded, None if scales is None else _permute_scales(scales.contiguous(), plan)


def _permute_scales(scales: Tensor, plan: Plan) -> Tensor:
    (num_blocks, num_tokens), num_rows = scales.shape, len(plan.source_row)
    expanded = torch.empty(num_blocks, num_rows, device=scales.device)
    if num_blocks:
        permute_scales_kernel[(triton.cdiv(num_rows, SCALES_BLOCK_M), triton.cdiv(num_blocks, SCALES_BLOCK_S))](
            scales, plan.source_row, expanded, num_blocks, num_tokens, num_rows,
            BLOCK_S=SCALES_BLOCK_S, BLOCK_M=SCALES_BLOCK_M, num_warps=SCALES_WARPS,
        )  # fmt: skip
    return expanded


def combine(y: Tensor, plan: Plan, weights: Tensor | None) -> Tensor:
    (num_tokens, top_k), width = plan.position.shape, y.shape[1]
    out = torch.empty(num_tokens, width, dtype=y.dtype, device=y.device)
    if out.numel():
        with torch.cuda.device_of(y):
            combine_kernel[(triton.cdiv(num_tokens, COMBINE_BLOCK_T), triton.cdiv(width, COMBINE_BLOCK_D))](
                y, plan.position, plan.position if weights is None else weights, out, num_tokens, width,
                WEIGHTED=weights is not None, TOP_K=top_k,
                BLOCK_T=COMBINE_BLOCK_T, BLOCK_D=COMBINE_BLOCK_D, num_warps=COMBINE_WARPS,
            )  # fmt: skip
    return out


def _words(rows: Tensor) -> Tensor:
    """The same bytes as words of four, or as bytes where rows are not whole words."""
    size = rows.element_size()
    whole = rows.shape[1] * size % 4 == 0 and rows.storage_offset() * size % 4 == 0
    return rows.view(torch.int32 if whole else torch.uint8)


_BLOCKS = {"TOP_K": 8, "BLOCK_T": PERMUTE_BLOCK_T, "BLOCK_D": PERMUTE_BLOCK_D}
_COMBINE = {"y": "*bf16", "position": "*i32", "weights": "*fp32", "out": "*bf16", "num_tokens": "i32", "width": "i32"}
COMPILE_CASES = [
    CompileCase(
        "permute/rows",
        permute_kernel,
        {"x": "*i32", "position": "*i32", "source_row": "*i32", "out": "*i32"}
        | dict.fromkeys(("num_tokens", "token_programs", "width"), "i32"),
        _BLOCKS,
        PERMUTE_WARPS,
        aligned=("width",),
    ),
    CompileCase(
        "permute/scales",
        permute_scales_kernel,
        {"s": "*fp32", "source_row": "*i32", "out": "*fp32"}
        | dict.fromkeys(("num_blocks", "num_tokens", "num_rows"), "i32"),
        {"BLOCK_S": SCALES_BLOCK_S, "BLOCK_M": SCALES_BLOCK_M},
        SCALES_WARPS,
        aligned=("num_rows",),
    ),
    *(
        CompileCase(
            f"permute/combine{'_weighted' if weighted else ''}",
            combine_kernel,
            _COMBINE,
            {"WEIGHTED": weighted, "TOP_K": 8, "BLOCK_T": COMBINE_BLOCK_T, "BLOCK_D": COMBINE_BLOCK_D},
            COMBINE_WARPS,
            aligned=("width",),
        )
        for weighted in (False, True)
    ),
]
