"""FP8 blocks: e4m3 bytes q and float32 scales s with value = q * s, as DeepSeek-V3 trains (arXiv 2412.19437, 3.3.2).

The definition, kept bit for bit by the kernels: amax is the largest magnitude of a tile, s = max(amax, floor) / 448
(with `power_of_two` rounded up to a power of two), q = e4m3(x / s), both quotients correctly rounded float32 and the
cast to nearest even. No clamp: x / s is at most 448 (1 + 2^-23), which e4m3 rounds to 448. A tile that holds NaN or
infinity has s = NaN and q = NaN throughout (the NaN's sign is open), so that no product hides it.

Sizes that 128 does not divide are padded: the result is that of x followed by zeros up to the next multiple of 128
(tiles of zeros alone have s = floor / 448), and as large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.kernels.dispatch import Backend, choose_backend

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# The least amax a scale is made for: DeepSeek-V3's for activations and weights; a gradient's may be far smaller.
ACTIVATION_FLOOR = 1e-4
GRADIENT_FLOOR = 1e-12


class Fp8Weight(NamedTuple):
    """Weights of E experts in both orientations with the same 128x128 blocks (N and K padded to multiples of 128).

    q [E, N, K] with s [E, N/128, K/128] serves the forward product, qt [E, K, N] with st [E, K/128, N/128] the data
    gradient's.
    """

    q: Tensor
    s: Tensor
    qt: Tensor
    st: Tensor


def quantize_rows(
    x: Tensor, *, floor: float = ACTIVATION_FLOOR, power_of_two: bool = False, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """1x128 tiles of x [M, K]: q [M, K'] and s [K'/128, M], K' = K padded."""
    _check(x, 2, floor)
    if choose_backend("quantize_rows", x, backend) == "triton":
        from policy.kernels import quantize_triton

        return quantize_triton.quantize_rows(x, floor, power_of_two)
    return _rows(F.pad(x.float(), (0, -x.shape[1] % BLOCK)), floor, power_of_two)


def quantize_columns(
    x: Tensor,
    source_row: Tensor | None = None,
    *,
    floor: float = ACTIVATION_FLOOR,
    power_of_two: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """128x1 tiles of x [M, K], transposed: q [K', M'] and s [M'/128, K'].

    With `source_row` [M] int32 it is rows source_row of x [T, K] that are quantised, -1 meaning a row of zeros.
    """
    _check(x, 2, floor, source_row)
    if choose_backend("quantize_columns", x, backend) == "triton":
        from policy.kernels import quantize_triton

        return quantize_triton.quantize_columns(x, source_row, floor, power_of_two, rows=False)[2:]
    return _columns(_gathered(x, source_row), floor, power_of_two)


def quantize_rows_and_columns(
    x: Tensor,
    source_row: Tensor | None = None,
    *,
    floor: float = ACTIVATION_FLOOR,
    power_of_two: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rows` of x (or of its rows `source_row`) and `quantize_columns` of it, in one reading: q, s, qt, st."""
    _check(x, 2, floor, source_row)
    if choose_backend("quantize_rows_and_columns", x, backend) == "triton":
        from policy.kernels import quantize_triton

        return quantize_triton.quantize_columns(x, source_row, floor, power_of_two, rows=True)
    rows = _gathered(x, source_row)
    return *_rows(rows, floor, power_of_two), *_columns(rows, floor, power_of_two)


def quantize_weight(
    w: Tensor, *, floor: float = ACTIVATION_FLOOR, power_of_two: bool = False, backend: Backend | None = None
) -> Fp8Weight:
    """128x128 tiles of w [E, N, K] in both orientations."""
    _check(w, 3, floor)
    if choose_backend("quantize_weight", w, backend) == "triton":
        from policy.kernels import quantize_triton

        return Fp8Weight(*quantize_triton.quantize_weight(w, floor, power_of_two))
    padded = F.pad(w.float(), (0, -w.shape[2] % BLOCK, 0, -w.shape[1] % BLOCK))
    tiles = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    s = scale_of(_amax(tiles, (2, 4)), floor, power_of_two)
    q = (tiles / s[:, :, None, :, None]).to(FP8).flatten(3, 4).flatten(1, 2)
    return Fp8Weight(q, s, q.transpose(1, 2).contiguous(), s.transpose(1, 2).contiguous())


def scale_of(amax: Tensor, floor: float, power_of_two: bool = False) -> Tensor:
    """The scale of tiles with largest magnitude `amax` (float32); NaN where it is not finite."""
    # A tensor divides: by a Python number torch multiplies with its reciprocal on a GPU.
    s = amax.clamp(min=floor) / torch.full_like(amax, FP8_MAX)
    if power_of_two:
        s = ((s.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return s.where(amax.isfinite(), torch.nan)


def dequantize_rows(q: Tensor, s: Tensor) -> Tensor:
    """float32 [M, K] of q [M, K] and s [K/128, M]."""
    return (q.float().unflatten(1, (-1, BLOCK)) * s.T[:, :, None]).flatten(1)


def dequantize_columns(q: Tensor, s: Tensor) -> Tensor:
    """float32 [M, K] of the transposed q [K, M] and s [M/128, K]."""
    return dequantize_rows(q, s).T


def dequantize_weight(q: Tensor, s: Tensor) -> Tensor:
    """float32 [E, N, K] of q [E, N, K] and s [E, N/128, K/128]; the transposed pair alike."""
    tiles = q.float().unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    return (tiles * s[:, :, None, :, None]).flatten(3, 4).flatten(1, 2)


def _rows(x: Tensor, floor: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """q and s of float32 x [M, K] with K a multiple of 128."""
    tiles = x.unflatten(1, (-1, BLOCK))
    s = scale_of(_amax(tiles, (2,)), floor, power_of_two)
    return (tiles / s[:, :, None]).to(FP8).flatten(1), s.T.contiguous()


def _columns(x: Tensor, floor: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return _rows(F.pad(x, (0, 0, 0, -len(x) % BLOCK)).T.contiguous(), floor, power_of_two)


def _gathered(x: Tensor, source_row: Tensor | None) -> Tensor:
    """Rows of x in float32, K padded; zeros for a source of -1."""
    x = F.pad(x.float(), (0, -x.shape[1] % BLOCK))
    if source_row is None:
        return x
    return F.pad(x, (0, 0, 0, 1))[source_row.long()]  # -1 is the row of zeros at the end


def _amax(tiles: Tensor, dims: tuple[int, ...]) -> Tensor:
    return tiles.abs().amax(dims)


def _check(x: Tensor, dims: int, floor: float, source_row: Tensor | None = None) -> None:
    if x.dim() != dims or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{x.dtype} {list(x.shape)} must be bfloat16, float16 or float32 of {dims} dimensions")
    if x.stride(-1) != 1 or (dims == 3 and not x.is_contiguous()):
        raise ValueError(
            f"{list(x.shape)} with strides {x.stride()} must be contiguous" + (" rows" if dims == 2 else "")
        )
    if not 2**-100 <= floor <= FP8_MAX:
        raise ValueError(f"floor must be between 2^-100 and {FP8_MAX} for scales to be normal numbers, not {floor}")
    if source_row is not None and (source_row.dtype != torch.int32 or source_row.dim() != 1):
        raise ValueError(f"source_row must be int32 [M], not {source_row.dtype} {list(source_row.shape)}")
