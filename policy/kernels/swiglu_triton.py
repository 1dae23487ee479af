"""Triton kernels of swiglu.py: the forward by tiles of 128 columns, the backward by strips of tiles of 128 by 128."""
# Kernels are Python in syntax only, which the type checker can't know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.compile_cases import CompileCase
from policy.kernels.quantize_triton import quantize_tile, tile_amax, tile_scale

BLOCK = 128
# Rows per program and warps of the forward by rows alone, warps where the tile is 128 by 128, strips of the backward.
ROWS_BLOCK_M, ROWS_WARPS = 32, 4
COLUMNS_WARPS = 8
BACKWARD_STRIP, BACKWARD_WARPS = 32, 8
SUM_BLOCK_M, SUM_WARPS = 128, 4


@triton.jit
def store_rows(value, q, s, row, block, num_rows, width, floor, POWER_OF_TWO: tl.constexpr):
    """1x128 tiles `value` at rows `row` and block `block` of 128 columns of q [num_rows, width], s [.., num_rows]."""
    column = block * 128 + tl.arange(0, 128)
    scale = tile_scale(tile_amax(value, 1), floor, POWER_OF_TWO)
    tl.store(q + row.to(tl.int64)[:, None] * width + column[None, :], quantize_tile(value, scale[:, None]))
    tl.store(s + block.to(tl.int64) * num_rows + row, scale)


@triton.jit
def store_columns(value, qt, st, block, column, num_rows, width, floor, POWER_OF_TWO: tl.constexpr):
    """128x1 tiles `value` at block `block` of 128 rows and at `column`, transposed: qt [width, num_rows], st [.., width]."""
    row = block * 128 + tl.arange(0, 128)
    scale = tile_scale(tile_amax(value, 0), floor, POWER_OF_TWO)
    quantised = tl.trans(quantize_tile(value, scale[None, :]))
    tl.store(qt + column.to(tl.int64)[:, None] * num_rows + row[None, :], quantised)
    tl.store(st + block.to(tl.int64) * width + column, scale)


@triton.jit
def swiglu_kernel(
    h, prob, q, s, qt, st, num_rows, width, floor,
    WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1)
    column = block * 128 + tl.arange(0, 128)
    source = h + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    gate = tl.load(source).to(tl.float32)
    up = tl.load(source + width).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        value *= tl.load(prob + row)[:, None]
    store_rows(value, q, s, row, block, num_rows, width, floor, POWER_OF_TWO)
    if COLUMNS:
        store_columns(value, qt, st, tl.program_id(0), column, num_rows, width, floor, POWER_OF_TWO)


@triton.jit
def load_gradients(h, prob, da, row, column, width, WEIGHTED: tl.constexpr):
    """Of a tile: the activation without prob, prob, the gradient of the activation, and those of gate and up."""
    place = row.to(tl.int64)[:, None]
    source = h + place * (2 * width) + column[None, :]
    gate = tl.load(source).to(tl.float32)
    up = tl.load(source + width).to(tl.float32)
    grad = tl.load(da + place * width + column[None, :]).to(tl.float32)
    weight = tl.full(row.shape, 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(prob + row)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    scaled = grad * weight[:, None]
    return silu * up, weight, grad, scaled * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid))), scaled * silu


@triton.jit
def backward_rows(h, prob, da, dh_q, dh_s, partial, row, block, num_rows, width, floor,
                  WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr):  # fmt: skip
    column = block * 128 + tl.arange(0, 128)
    activation, _, grad, dgate, dup = load_gradients(h, prob, da, row, column, width, WEIGHTED)
    tl.store(partial + block.to(tl.int64) * num_rows + row, tl.sum(activation * grad, 1))
    store_rows(dgate, dh_q, dh_s, row, block, num_rows, 2 * width, floor, POWER_OF_TWO)
    store_rows(dup, dh_q, dh_s, row, block + width // 128, num_rows, 2 * width, floor, POWER_OF_TWO)


@triton.jit
def backward_columns(h, prob, da, dh_qt, dh_st, a_qt, a_st, block, column, num_rows, width, floor, activation_floor,
                     WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr):  # fmt: skip
    row = block * 128 + tl.arange(0, 128)
    activation, weight, _, dgate, dup = load_gradients(h, prob, da, row, column, width, WEIGHTED)
    value = activation * weight[:, None]
    store_columns(value, a_qt, a_st, block, column, num_rows, width, activation_floor, POWER_OF_TWO)
    store_columns(dgate, dh_qt, dh_st, block, column, num_rows, 2 * width, floor, POWER_OF_TWO)
    store_columns(dup, dh_qt, dh_st, block, column + width, num_rows, 2 * width, floor, POWER_OF_TWO)


@triton.jit
def swiglu_backward_kernel(
    h, prob, da, dh_q, dh_s, dh_qt, dh_st, a_qt, a_st, partial, num_rows, width, floor, activation_floor,
    WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """partial [F / 128, M]: each tile's part of dprob.

    A tile of 128 by 128 has no room in registers with its three results. So 128 / STRIP programs take STRIP rows of it
    each and as many STRIP columns; they run side by side, and all but the first find its values in the cache.
    """
    STRIPS: tl.constexpr = 128 // STRIP
    strip = tl.program_id(0) % (2 * STRIPS)
    row_block = tl.program_id(0) // (2 * STRIPS)
    column_block = tl.program_id(1)
    if strip < STRIPS:
        backward_rows(
            h, prob, da, dh_q, dh_s, partial,
            row_block * 128 + strip * STRIP + tl.arange(0, STRIP), column_block, num_rows,
            width, floor, WEIGHTED, POWER_OF_TWO,
        )  # fmt: skip
    else:
        backward_columns(
            h, prob, da, dh_qt, dh_st, a_qt, a_st,
            row_block, column_block * 128 + (strip - STRIPS) * STRIP + tl.arange(0, STRIP), num_rows,
            width, floor, activation_floor, WEIGHTED, POWER_OF_TWO,
        )  # fmt: skip


@triton.jit
def sum_partial_kernel(partial, out, num_blocks, num_rows, BLOCK_M: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(num_blocks):
        total += tl.load(partial + tl.cast(block, tl.int64) * num_rows + row)
    tl.store(out + row, total)


def swiglu_quantize(
    h: Tensor, prob: Tensor | None, columns: bool, floor: float, power_of_two: bool
) -> tuple[Tensor, ...]:
    num_rows, width = len(h), h.shape[1] // 2
    rows, transposed = _rows_like(h, width), _columns_like(h, width) if columns else ()
    if h.numel():
        block_m = BLOCK if columns else ROWS_BLOCK_M
        with torch.cuda.device_of(h):
            swiglu_kernel[(num_rows // block_m, width // BLOCK)](
                h, h if prob is None else prob, *rows, *(transposed or rows), num_rows, width, floor,
                WEIGHTED=prob is not None, COLUMNS=columns, POWER_OF_TWO=power_of_two, BLOCK_M=block_m,
                num_warps=COLUMNS_WARPS if columns else ROWS_WARPS,
            )  # fmt: skip
    return *rows, *transposed


def swiglu_backward_quantize(
    h: Tensor, prob: Tensor | None, da: Tensor, floor: float, activation_floor: float, power_of_two: bool
) -> tuple[Tensor, ...]:
    num_rows, width = len(h), h.shape[1] // 2
    made = (*_rows_like(h, 2 * width), *_columns_like(h, 2 * width), *_columns_like(h, width))
    partial = torch.empty(width // BLOCK, num_rows, device=h.device)
    dprob = torch.empty(num_rows, device=h.device)
    with torch.cuda.device_of(h):
        if h.numel():
            swiglu_backward_kernel[(2 * num_rows // BACKWARD_STRIP, width // BLOCK)](
                h, h if prob is None else prob, da, *made, partial, num_rows, width, floor, activation_floor,
                WEIGHTED=prob is not None, POWER_OF_TWO=power_of_two, STRIP=BACKWARD_STRIP, num_warps=BACKWARD_WARPS,
            )  # fmt: skip
        if num_rows:
            sum_partial_kernel[(num_rows // SUM_BLOCK_M,)](
                partial, dprob, len(partial), num_rows, BLOCK_M=SUM_BLOCK_M, num_warps=SUM_WARPS
            )
    return *made, dprob


def _rows_like(h: Tensor, width: int) -> tuple[Tensor, Tensor]:
    q = torch.empty(len(h), width, dtype=torch.float8_e4m3fn, device=h.device)
    return q, torch.empty(width // BLOCK, len(h), device=h.device)


def _columns_like(h: Tensor, width: int) -> tuple[Tensor, Tensor]:
    qt = torch.empty(width, len(h), dtype=torch.float8_e4m3fn, device=h.device)
    return qt, torch.empty(len(h) // BLOCK, width, device=h.device)


_IN = {"h": "*bf16", "prob": "*fp32", "num_rows": "i32", "width": "i32", "floor": "fp32"}
_ALIGNED = ("num_rows", "width")
_PAIRS = {"q": "*fp8e4nv", "s": "*fp32", "qt": "*fp8e4nv", "st": "*fp32"}
_GRADIENTS = {
    **{f"{of}_{part}": _PAIRS[part] for of, parts in (("dh", _PAIRS), ("a", ("qt", "st"))) for part in parts},
    "da": "*bf16",
    "partial": "*fp32",
    "activation_floor": "fp32",
}


def _forward_case(name: str, columns: bool) -> CompileCase:
    constants = {
        "WEIGHTED": True,
        "COLUMNS": columns,
        "POWER_OF_TWO": False,
        "BLOCK_M": BLOCK if columns else ROWS_BLOCK_M,
    }
    warps = COLUMNS_WARPS if columns else ROWS_WARPS
    return CompileCase(name, swiglu_kernel, {**_IN, **_PAIRS}, constants, warps, aligned=_ALIGNED)


COMPILE_CASES = [
    _forward_case("swiglu/rows", columns=False),
    _forward_case("swiglu/rows_and_columns", columns=True),
    CompileCase(
        "swiglu/backward",
        swiglu_backward_kernel,
        {**_IN, **_GRADIENTS},
        {"WEIGHTED": True, "POWER_OF_TWO": False, "STRIP": BACKWARD_STRIP},
        BACKWARD_WARPS,
        aligned=_ALIGNED,
    ),
    CompileCase(
        "swiglu/sum_partial",
        sum_partial_kernel,
        {"partial": "*fp32", "out": "*fp32", "num_blocks": "i32", "num_rows": "i32"},
        {"BLOCK_M": SUM_BLOCK_M},
        SUM_WARPS,
        aligned=("num_rows",),
    ),
]
