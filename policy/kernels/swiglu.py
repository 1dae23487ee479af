"""The experts' activation and its gradient, quantised where they are made: a = silu(gate) * up * prob.

h [M, 2F] holds gate before up in each row; prob [M] is the router's weight of the row, folded in here so that combining
is a plain sum and its own gradient a product of rows (as Megatron-Core does). Everything between the reading of bf16 and
the quantisation is float32: silu(g) = g / (1 + exp(-g)), exp as accurate as the device's, and quantisation as in
quantize.py. M and F must be multiples of 128 (pad gate and up each with rows of zero weights).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policy.kernels.dispatch import Backend, choose_backend
from policy.kernels.quantize import ACTIVATION_FLOOR, FP8_MAX, GRADIENT_FLOOR, quantize_columns, quantize_rows

BLOCK = 128


class SwigluGradients(NamedTuple):
    """What the two products behind and the router need: (q, s) pairs as `quantize_rows` and `quantize_columns` make them.

    The gradient of h by rows (dh_q [M, 2F], dh_s [2F/128, M]) and by columns (dh_qt [2F, M], dh_st [M/128, 2F]), the
    activation itself by columns (a_qt [F, M], a_st [M/128, F]), and dprob [M] in float32.
    """

    dh_q: Tensor
    dh_s: Tensor
    dh_qt: Tensor
    dh_st: Tensor
    a_qt: Tensor
    a_st: Tensor
    dprob: Tensor


def swiglu_quantize(
    h: Tensor,
    prob: Tensor | None,
    *,
    columns: bool = False,
    floor: float = ACTIVATION_FLOOR,
    power_of_two: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, ...]:
    """The activation of h [M, 2F] by rows, q [M, F] and s [F/128, M]; with `columns` also qt [F, M] and st [M/128, F]."""
    _check(h, prob, floor)
    if choose_backend("swiglu_quantize", h, backend) == "triton":
        from policy.kernels import swiglu_triton

        return swiglu_triton.swiglu_quantize(h, prob, columns, floor, power_of_two)
    activation = _swiglu(h, prob)
    rows = quantize_rows(activation, floor=floor, power_of_two=power_of_two, backend="torch")
    if not columns:
        return rows
    return *rows, *quantize_columns(activation, floor=floor, power_of_two=power_of_two, backend="torch")


def swiglu_backward_quantize(
    h: Tensor,
    prob: Tensor | None,
    da: Tensor,
    *,
    floor: float = GRADIENT_FLOOR,
    activation_floor: float = ACTIVATION_FLOOR,
    power_of_two: bool = False,
    backend: Backend | None = None,
) -> SwigluGradients:
    """From the gradient da [M, F] of the activation; of h nothing else was kept. `floor` is that of dh's scales.

    dprob is summed over blocks of 128 of F in their order, so that it does not depend on M. It is NaN or infinite where
    h or da is, as dh is.
    """
    _check(h, prob, floor, activation_floor)
    if da.shape != (len(h), h.shape[1] // 2) or da.dtype != h.dtype or not da.is_contiguous():
        raise ValueError(f"da {da.dtype} {list(da.shape)} must be contiguous {h.dtype} {[len(h), h.shape[1] // 2]}")
    if choose_backend("swiglu_backward_quantize", h, backend) == "triton":
        from policy.kernels import swiglu_triton

        return SwigluGradients(
            *swiglu_triton.swiglu_backward_quantize(h, prob, da, floor, activation_floor, power_of_two)
        )
    dh, dprob = _gradients(h, prob, da)
    return SwigluGradients(
        *quantize_rows(dh, floor=floor, power_of_two=power_of_two, backend="torch"),
        *quantize_columns(dh, floor=floor, power_of_two=power_of_two, backend="torch"),
        *quantize_columns(_swiglu(h, prob), floor=activation_floor, power_of_two=power_of_two, backend="torch"),
        dprob,
    )


def _swiglu(h: Tensor, prob: Tensor | None) -> Tensor:
    gate, up = h.float().chunk(2, 1)
    activation = gate / (1 + torch.exp(-gate)) * up
    return activation if prob is None else activation * prob[:, None]


def _gradients(h: Tensor, prob: Tensor | None, da: Tensor) -> tuple[Tensor, Tensor]:
    """float32 dh [M, 2F] and dprob [M]."""
    gate, up = h.float().chunk(2, 1)
    da = da.float()
    sigmoid = 1 / (1 + torch.exp(-gate))
    silu = gate * sigmoid
    blocks = (silu * up * da).unflatten(1, (-1, BLOCK)).sum(-1)
    dprob = torch.zeros(len(h), device=h.device)
    for block in blocks.unbind(1):
        dprob = dprob + block
    scaled = da if prob is None else da * prob[:, None]
    dgate = scaled * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    return torch.cat((dgate, scaled * silu), 1), dprob


def _check(h: Tensor, prob: Tensor | None, *floors: float) -> None:
    if h.dim() != 2 or h.dtype not in (torch.bfloat16, torch.float32) or not h.is_contiguous():
        raise ValueError(f"h must be contiguous bfloat16 or float32 [M, 2F], not {h.dtype} {list(h.shape)}")
    if len(h) % BLOCK or h.shape[1] % (2 * BLOCK):
        raise ValueError(f"h {list(h.shape)} must be [M, 2F] with M and F multiples of 128: pad gate and up with zeros")
    if prob is not None and (prob.shape != (len(h),) or prob.dtype != torch.float32 or not prob.is_contiguous()):
        raise ValueError(f"prob must be contiguous float32 [{len(h)}], not {prob.dtype} {list(prob.shape)}")
    if not all(2**-100 <= floor <= FP8_MAX for floor in floors):
        raise ValueError(f"floors must be between 2^-100 and {FP8_MAX} for scales to be normal numbers, not {floors}")
