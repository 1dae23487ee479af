"""The policy's layers in FP8, with gradients: routed experts as a whole, and single projections.

DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3): all three products of a layer are of e4m3 blocks, operands are
quantised where they are made, and each operand of a weight gradient is quantised from the unquantised rows once more,
over 128 of them. Products come out in bfloat16, results in the type of x. Letters as in plan.py, D the model's width, F
an expert's; all sizes may be any, as what is quantised is padded with zeros.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from policy.kernels.dispatch import Backend
from policy.kernels.fp8_linear import Columns, dense_plan, linear_dgrad, linear_forward, linear_wgrad
from policy.kernels.grouped_gemm import grouped_gemm
from policy.kernels.grouped_wgrad import grouped_wgrad
from policy.kernels.permute import combine, permute, permute_backward, permute_weights, permute_weights_backward
from policy.kernels.plan import Plan, plan
from policy.kernels.quantize import (
    BLOCK,
    GRADIENT_FLOOR,
    Fp8Weight,
    dequantize_weight,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    quantize_weight,
)
from policy.kernels.swiglu import swiglu_backward_quantize, swiglu_quantize


class Recipe(NamedTuple):
    """How to quantise, and on what: `power_of_two` scales, and dispatch.py's `backend`."""

    power_of_two: bool = False
    backend: Backend | None = None


def fp8_experts(
    x: Tensor,
    gates: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    power_of_two: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Sum of gate * down(silu(gate(x)) * up(x)) over each token's k experts, [T, D] of x's type.

    x [T, D], gates [T, k] float32 and experts `indices` [T, k]; weights gate_up [E, 2F, D] (gate rows first) and down
    [E, D, F]. Differentiable in all but the indices; gradients of weights are of their type. Kept for backward: x, the
    bfloat16 [MP, 2F] before the activation, and the plan.
    """
    if gate_up.shape != (len(down), 2 * down.shape[2], down.shape[1]) or x.shape[1:] != down.shape[1:2]:
        raise ValueError(
            f"fp8_experts: x {list(x.shape)}, gate_up {list(gate_up.shape)} and down {list(down.shape)} must be [T, D], "
            "[E, 2F, D] and [E, D, F]"
        )
    out = _Experts.apply(x, gates, indices, gate_up, down, Recipe(power_of_two, backend))
    assert isinstance(out, Tensor)
    return out


def fp8_linear(x: Tensor, weight: Tensor, *, power_of_two: bool = False, backend: Backend | None = None) -> Tensor:
    """x W^T [..., N] of x's type for x [..., K] and `weight` [N, K], differentiable in both.

    Kept for backward: the columns of x in FP8.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"fp8_linear: x {list(x.shape)} and weight {list(weight.shape)} must be [..., K] and [N, K]")
    out = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, Recipe(power_of_two, backend))
    assert isinstance(out, Tensor)
    return out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out


@torch.no_grad()
def as_multiplied(weight: Tensor) -> Tensor:
    """What `fp8_linear` multiplies by, [N, K] of the type of `weight`: its FP8 values. Without gradient."""
    quantised = quantised_weight(weight, Recipe())
    return dequantize_weight(quantised.q, quantised.s)[0, : weight.shape[0], : weight.shape[1]].to(weight.dtype)


class _Kept(NamedTuple):
    state: tuple[Any, ...]
    weight: Fp8Weight


_kept = WeakTensorKeyDictionary()


@torch.no_grad()
def quantised_weight(weight: Tensor, recipe: Recipe, halves: bool = False) -> Fp8Weight:
    """FP8 of a weight [N, K] or [E, N, K]; with `halves` both halves of N are padded by themselves.

    That of an nn.Parameter is kept until it changes, which its version tells: an optimizer's step and all that writes
    in place count it up, writing through `.data` does not. In a process group nothing is kept, because a sharded
    weight is gathered into the same parameter without a new version, and copies would undo the sharding.
    """
    keeps = isinstance(weight, nn.Parameter) and not (dist.is_available() and dist.is_initialized())
    if not keeps or weight.is_inference():
        return _quantise(weight, recipe, halves)
    state = (weight._version, weight.data_ptr(), weight.dtype, weight.shape, recipe, halves)
    kept = _kept.get(weight)
    if kept is None or kept.state != state:
        kept = _kept[weight] = _Kept(state, _quantise(weight, recipe, halves))
    return kept.weight


def forget_weights() -> None:
    """Quantise every weight again at its next use, and free what is kept."""
    _kept.clear()


def _quantise(weight: Tensor, recipe: Recipe, halves: bool) -> Fp8Weight:
    weight = weight.detach()
    stacked = weight if weight.dim() == 3 else weight[None]
    if halves and (missing := -(stacked.shape[1] // 2) % BLOCK):
        stacked = F.pad(stacked.unflatten(1, (2, -1)), (0, 0, 0, missing)).flatten(1, 2)
    return quantize_weight(stacked.contiguous(), power_of_two=recipe.power_of_two, backend=recipe.backend)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, recipe: Recipe
    ) -> Tensor:
        power_of_two, backend = ctx.recipe = recipe
        x = _dense_rows(x)
        routes = plan(indices, len(down), backend=backend)
        up_weight, down_weight = quantised_weight(gate_up, recipe, halves=True), quantised_weight(down, recipe)
        rows = permute(*quantize_rows(x, power_of_two=power_of_two, backend=backend), routes, backend=backend)
        h = grouped_gemm(*rows, up_weight.q, up_weight.s, routes, backend=backend)
        prob = permute_weights(gates.float(), routes)
        activation = swiglu_quantize(h, prob, power_of_two=power_of_two, backend=backend)
        y = grouped_gemm(activation[0], activation[1], down_weight.q, down_weight.s, routes, backend=backend)
        ctx.save_for_backward(x, h, prob, gate_up, down, *routes)
        ctx.type_of_gates = gates.dtype
        return combine(y, routes, backend=backend)[:, : x.shape[1]].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, h, prob, gate_up, down, *parts = ctx.saved_tensors
        routes, (power_of_two, backend) = Plan(*parts), ctx.recipe
        up_weight, down_weight = quantised_weight(gate_up, ctx.recipe, halves=True), quantised_weight(down, ctx.recipe)
        for_x, for_gates, _, for_gate_up, for_down, _ = ctx.needs_input_grad
        dy_q, dy_s, dy_qt, dy_st = quantize_rows_and_columns(
            _dense_rows(grads[0]), routes.source_row, floor=GRADIENT_FLOOR, power_of_two=power_of_two, backend=backend
        )
        da = grouped_gemm(dy_q, dy_s, down_weight.qt, down_weight.st, routes, backend=backend)
        inner = swiglu_backward_quantize(h, prob, da, power_of_two=power_of_two, backend=backend)
        dx = dgate_up = ddown = None
        if for_x:
            expanded = grouped_gemm(inner.dh_q, inner.dh_s, up_weight.qt, up_weight.st, routes, backend=backend)
            dx = permute_backward(expanded, routes, backend=backend)[:, : x.shape[1]].to(x.dtype)
        if for_down:
            ddown = grouped_wgrad(
                dy_qt, dy_st, inner.a_qt, inner.a_st, routes, out_dtype=_stored(down), backend=backend
            )[:, : down.shape[1], : down.shape[2]].to(down.dtype)
        if for_gate_up:
            columns = quantize_columns(x, routes.source_row, power_of_two=power_of_two, backend=backend)
            padded = grouped_wgrad(
                inner.dh_qt, inner.dh_st, *columns, routes, out_dtype=_stored(gate_up), backend=backend
            )
            halves = padded.unflatten(1, (2, -1))[:, :, : down.shape[2], : gate_up.shape[2]]
            dgate_up = halves.flatten(1, 2).to(gate_up.dtype)
        dgates = permute_weights_backward(inner.dprob, routes).to(ctx.type_of_gates) if for_gates else None
        return dx, dgates, None, dgate_up, ddown, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.recipe = recipe
        y, columns = linear_forward(
            _dense_rows(x),
            quantised_weight(weight, recipe),
            len(weight),
            _dense_plan(len(x), x.device),
            columns=ctx.needs_input_grad[1],
            power_of_two=recipe.power_of_two,
            backend=recipe.backend,
        )
        ctx.save_for_backward(weight, *(columns or ()))
        ctx.type_of_x = x.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, *columns = ctx.saved_tensors
        power_of_two, backend = ctx.recipe
        routes = _dense_plan(len(grads[0]), grads[0].device)
        # Also where only the weight's gradient is wanted: the columns of dy come with it.
        dx, dy_columns = linear_dgrad(
            _dense_rows(grads[0]),
            quantised_weight(weight, ctx.recipe),
            weight.shape[1],
            routes,
            columns=bool(columns),
            power_of_two=power_of_two,
            backend=backend,
        )
        dw = None
        if dy_columns is not None:
            (n, k), x_columns = weight.shape, Columns(*columns)
            dw = linear_wgrad(dy_columns, x_columns, n, k, routes, out_dtype=_stored(weight), backend=backend)
            dw = dw.to(weight.dtype)
        return dx.to(ctx.type_of_x) if ctx.needs_input_grad[0] else None, dw, None


@functools.lru_cache(maxsize=16)
def _dense_plan(num_rows: int, device: torch.device) -> Plan:
    """One for all layers of a step, which have the same rows."""
    with torch.inference_mode(False):
        return dense_plan(num_rows, device)


def _stored(weight: Tensor) -> torch.dtype:
    """What a weight's gradient is stored as by its product."""
    return torch.float32 if weight.dtype == torch.float32 else torch.bfloat16


def _dense_rows(x: Tensor) -> Tensor:
    """x [T, D] with strides D and 1, which torch calls contiguous without when it is empty."""
    return x if x.is_contiguous() and x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)
