"""The released FP8 format: `X.weight` in e4m3, and fp32 `X.weight_scale_inv` for each 128 x 128 block of it.

weight = fp8 * scale_inv (arXiv 2412.19437, section 3.3; README_WEIGHTS of the DeepSeek-V3 release). Blocks at the lower
and right edge are smaller. A scale is the largest magnitude of its block over 448, so quantising what was dequantised
in fp32 gives the same bytes and the same scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_SUFFIX = "_scale_inv"
QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the release stores this weight in FP8: projections of attention, feed-forward and experts.

    Embedding, head, norms, router and `eh_proj` stay in higher precision.
    """
    inside = ".self_attn." in name or (".mlp." in name and not name.endswith(".mlp.gate.weight"))
    return inside and len(shape) == 2 and name.endswith(".weight")


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks down and across a weight [r, c]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [r, c] and scales [ceil(r/128), ceil(c/128)] of a weight [r, c]; NaN and infinity are a ValueError.

    A block of zeros has scale 1. Scales are at least fp32's smallest normal number, below which division overflows.
    """
    rows, columns = weight.shape
    weight = weight.float()
    padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    largest = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).abs().amax((1, 3))
    if not largest.isfinite().all():
        raise ValueError("holds NaN or infinity, which FP8 can't store")
    scale = (largest / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    # A quotient exceeds 448 by a rounding error at most, and the cast rounds that to 448.
    return (weight / _spread(scale, 0, rows, columns)).to(FP8), scale


def dequantise(quantised: Tensor, scale: Tensor, first_row: int = 0) -> Tensor:
    """fp32 values of rows [first_row, first_row + len(quantised)) of a weight whose scales are `scale`.

    Bytes that mean NaN, and scales that aren't finite, are a ValueError.
    """
    values = quantised.float() * _spread(scale, first_row, *quantised.shape)
    if not values.isfinite().all():
        raise ValueError("holds NaN or infinity in FP8 or in its scales")
    return values


def _spread(scale: Tensor, first_row: int, rows: int, columns: int) -> Tensor:
    """Each element's scale [rows, columns]."""
    blocks = torch.arange(first_row, first_row + rows, device=scale.device) // BLOCK
    return scale[blocks].repeat_interleave(BLOCK, 1)[:, :columns]


def quantization_problem(values: Mapping[str, Any]) -> str | None:
    """What in a config.json's `quantization_config` is another format than this one; None when nothing is."""
    config = values.get("quantization_config")
    if config is None:
        return None
    if not isinstance(config, dict):
        return f"quantization_config={config!r}"
    wanted = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "weight_block_size": ([BLOCK, BLOCK],)}
    wrong = [f"{key}={config.get(key)!r}" for key, allowed in wanted.items() if config.get(key) not in allowed]
    return f"quantization_config with {', '.join(wrong)}" if wrong else None
