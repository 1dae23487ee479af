"""Triton kernels of quantize.py, and the tile functions that other kernels quantise their results with.

`tile_amax`, `tile_scale` and `quantize_tile` are quantize.py's definition bit for bit (the sign of a NaN apart): float32
`/` is off by an ulp on the GPU, so scales come from div.rn, and the quotient of an element from its row's reciprocal
with one correction, three instructions in place of a dozen.
"""
# Kernels are Python in syntax only, which the type checker can't know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.compile_cases import CompileCase

BLOCK = 128
# Tile sizes and warps by kernel; the columns' tile is whole blocks of 128 rows.
ROWS_BLOCK_M, ROWS_WARPS = 32, 4
COLUMNS_BLOCK_K, COLUMNS_WARPS = 64, 4
BOTH_WARPS = 16
WEIGHT_WARPS = 16


@triton.jit
def magnitude_bits(value):
    """|value| of float32 as whole numbers, which order as the magnitudes do, Inf and NaN last."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def tile_amax(value, axis: tl.constexpr):
    """Largest magnitude of float32 along an axis; NaN where one of them is (tl.max would pass over it)."""
    return tl.max(magnitude_bits(value), axis).to(tl.float32, bitcast=True)


@triton.jit
def tile_scale(amax, floor, POWER_OF_TWO: tl.constexpr):
    """max(amax, floor) / 448, rounded up to a power of two on demand; NaN where amax is not finite."""
    scale = tl.div_rn(tl.maximum(amax, floor), 448.0)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def quantize_tile(value, scale):
    """e4m3 of value / scale, rounded as the exact quotient is; `scale` must broadcast against `value` (float32)."""
    reciprocal = tl.div_rn(1.0, scale)
    # Markstein's correction of a quotient within an ulp; the signs are such that -0 stays -0.
    guess = value * reciprocal
    excess = tl.fma(guess, scale, value * -1.0)
    quotient = tl.fma(excess, reciprocal * -1.0, guess)
    return quotient.to(tl.float8e4nv)


@triton.jit
def quantize_rows_kernel(
    x, q, s, num_rows, width, padded_width, row_stride, floor, POWER_OF_TWO: tl.constexpr, BLOCK_M: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1)
    column = block * 128 + tl.arange(0, 128)
    live = row < num_rows
    place = row.to(tl.int64)[:, None]
    mask = live[:, None] & (column < width)[None, :]
    value = tl.load(x + place * row_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tile_scale(tile_amax(value, 1), floor, POWER_OF_TWO)
    tl.store(q + place * padded_width + column[None, :], quantize_tile(value, scale[:, None]), mask=live[:, None])
    tl.store(s + block.to(tl.int64) * num_rows + row, scale, mask=live)


@triton.jit
def load_rows(x, source_row, row, column, num_rows, width, row_stride, GATHER: tl.constexpr):
    """Rows `row` of x, or of its rows `source_row[row]`, as float32; zeros beyond the edges and where the source is -1."""
    if GATHER:
        source = tl.load(source_row + row, mask=row < num_rows, other=-1)
    else:
        source = tl.where(row < num_rows, row, -1)
    mask = (source >= 0)[:, None] & (column < width)[None, :]
    return tl.load(x + source.to(tl.int64)[:, None] * row_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def quantize_columns_kernel(
    x, source_row, q, s, qt, st, num_rows, padded_rows, width, padded_width, row_stride, floor,
    GATHER: tl.constexpr, ROWS: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """128 rows by BLOCK_K columns: 128x1 scales and the transposed copy, and with ROWS (BLOCK_K = 128) 1x128 ones too."""
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    row = row_block * 128 + tl.arange(0, 128)
    column = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    value = load_rows(x, source_row, row, column, num_rows, width, row_stride, GATHER)
    if ROWS:
        row_scale = tile_scale(tile_amax(value, 1), floor, POWER_OF_TWO)
        live = row < num_rows
        out = q + row.to(tl.int64)[:, None] * padded_width + column[None, :]
        tl.store(out, quantize_tile(value, row_scale[:, None]), mask=live[:, None])
        tl.store(s + column_block.to(tl.int64) * num_rows + row, row_scale, mask=live)
    scale = tile_scale(tile_amax(value, 0), floor, POWER_OF_TWO)
    out = qt + column.to(tl.int64)[:, None] * padded_rows + row[None, :]
    tl.store(out, tl.trans(quantize_tile(value, scale[None, :])))
    tl.store(st + row_block.to(tl.int64) * padded_width + column, scale)


@triton.jit
def quantize_weight_kernel(
    w, q, s, qt, st, height, width, padded_height, padded_width, floor, POWER_OF_TWO: tl.constexpr
):
    """One 128x128 block of one expert: its scale, and its bytes in both orientations."""
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    expert = tl.program_id(2).to(tl.int64)
    row = row_block * 128 + tl.arange(0, 128)
    column = column_block * 128 + tl.arange(0, 128)
    mask = (row < height)[:, None] & (column < width)[None, :]
    place = (expert * height + row)[:, None] * width + column[None, :]
    value = tl.load(w + place, mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(magnitude_bits(value), 1), 0).to(tl.float32, bitcast=True)
    scale = tile_scale(amax, floor, POWER_OF_TWO)
    quantized = quantize_tile(value, scale)
    tl.store(q + (expert * padded_height + row)[:, None] * padded_width + column[None, :], quantized)
    transposed = (expert * padded_width + column)[:, None] * padded_height + row[None, :]
    tl.store(qt + transposed, tl.trans(quantized))
    down, across = padded_height // 128, padded_width // 128
    tl.store(s + (expert * down + row_block) * across + column_block, scale)
    tl.store(st + (expert * across + column_block) * down + row_block, scale)


def quantize_rows(x: Tensor, floor: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    padded = triton.cdiv(width, BLOCK) * BLOCK
    q = torch.empty(num_rows, padded, dtype=torch.float8_e4m3fn, device=x.device)
    s = torch.empty(padded // BLOCK, num_rows, dtype=torch.float32, device=x.device)
    if q.numel():
        grid = (triton.cdiv(num_rows, ROWS_BLOCK_M), padded // BLOCK)
        with torch.cuda.device_of(x):
            quantize_rows_kernel[grid](
                x, q, s, num_rows, width, padded, x.stride(0), floor,
                POWER_OF_TWO=power_of_two, BLOCK_M=ROWS_BLOCK_M, num_warps=ROWS_WARPS,
            )  # fmt: skip
    return q, s


def quantize_columns(
    x: Tensor, source_row: Tensor | None, floor: float, power_of_two: bool, *, rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, s) by rows, empty unless `rows`, and (qt, st) by columns."""
    num_rows = len(x) if source_row is None else len(source_row)
    padded_rows, padded = (triton.cdiv(n, BLOCK) * BLOCK for n in (num_rows, x.shape[1]))
    q = torch.empty((num_rows, padded) if rows else 0, dtype=torch.float8_e4m3fn, device=x.device)
    s = torch.empty((padded // BLOCK, num_rows) if rows else 0, dtype=torch.float32, device=x.device)
    qt = torch.empty(padded, padded_rows, dtype=torch.float8_e4m3fn, device=x.device)
    st = torch.empty(padded_rows // BLOCK, padded, dtype=torch.float32, device=x.device)
    if qt.numel():
        block_k = BLOCK if rows else COLUMNS_BLOCK_K
        with torch.cuda.device_of(x):
            quantize_columns_kernel[(padded_rows // BLOCK, padded // block_k)](
                x, x if source_row is None else source_row, q, s, qt, st,
                num_rows, padded_rows, x.shape[1], padded, x.stride(0), floor,
                GATHER=source_row is not None, ROWS=rows, POWER_OF_TWO=power_of_two, BLOCK_K=block_k,
                num_warps=BOTH_WARPS if rows else COLUMNS_WARPS,
            )  # fmt: skip
    return q, s, qt, st


def quantize_weight(w: Tensor, floor: float, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, height, width = w.shape
    down, across = triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK)
    padded_height, padded = down * BLOCK, across * BLOCK
    q = torch.empty(experts, padded_height, padded, dtype=torch.float8_e4m3fn, device=w.device)
    qt = torch.empty(experts, padded, padded_height, dtype=torch.float8_e4m3fn, device=w.device)
    s = torch.empty(experts, down, across, dtype=torch.float32, device=w.device)
    st = torch.empty(experts, across, down, dtype=torch.float32, device=w.device)
    if q.numel():
        with torch.cuda.device_of(w):
            quantize_weight_kernel[(down, across, experts)](
                w, q, s, qt, st, height, width, padded_height, padded, floor,
                POWER_OF_TWO=power_of_two, num_warps=WEIGHT_WARPS,
            )  # fmt: skip
    return q, s, qt, st


_OUT = {"q": "*fp8e4nv", "s": "*fp32", "qt": "*fp8e4nv", "st": "*fp32", "floor": "fp32"}
_ROWS = {"x": "*bf16", "num_rows": "i32", "width": "i32", "padded_width": "i32", "row_stride": "i32"}
_COLUMNS = {**_ROWS, "source_row": "*i32", "padded_rows": "i32"}
_WEIGHT = dict.fromkeys(("height", "width", "padded_height", "padded_width"), "i32")


def _columns_case(name: str, rows: bool, gather: bool) -> CompileCase:
    constants = {
        "GATHER": gather,
        "ROWS": rows,
        "POWER_OF_TWO": False,
        "BLOCK_K": BLOCK if rows else COLUMNS_BLOCK_K,
    }
    aligned = ("num_rows", "width", "padded_width", "padded_rows", "row_stride")
    warps = BOTH_WARPS if rows else COLUMNS_WARPS
    return CompileCase(name, quantize_columns_kernel, {**_COLUMNS, **_OUT}, constants, warps, aligned=aligned)


COMPILE_CASES = [
    CompileCase(
        "quantize/rows",
        quantize_rows_kernel,
        {**_ROWS, **{name: _OUT[name] for name in ("q", "s", "floor")}},
        {"POWER_OF_TWO": False, "BLOCK_M": ROWS_BLOCK_M},
        ROWS_WARPS,
        aligned=("num_rows", "width", "padded_width", "row_stride"),
    ),
    _columns_case("quantize/columns", rows=False, gather=True),
    _columns_case("quantize/rows_and_columns", rows=True, gather=True),
    CompileCase(
        "quantize/weight",
        quantize_weight_kernel,
        {"w": "*bf16", **_WEIGHT, **_OUT},
        {"POWER_OF_TWO": False},
        WEIGHT_WARPS,
        aligned=tuple(_WEIGHT),
    ),
]
