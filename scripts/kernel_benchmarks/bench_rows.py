"""What happens to rows between the products: plan, quantise, permute, activate, combine, and the weights' quantisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policy.kernels.permute import combine, permute
from policy.kernels.plan import plan
from policy.kernels.quantize import (
    GRADIENT_FLOOR,
    dequantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    quantize_weight,
)
from policy.kernels.route import route
from policy.kernels.swiglu import swiglu_backward_quantize, swiglu_quantize
from scripts.kernel_benchmarks import BenchCase, Contenders, Shape, balanced_choices, normal


def cases(shapes: Sequence[Shape], device: str) -> list[BenchCase]:
    """Each with the bytes of its live rows; the definitions, run on slices or the whole, are the truth bit for bit."""
    listed = []
    for shape in shapes:
        t, m, d, f = shape.num_tokens, shape.rows, shape.hidden, shape.width
        moved = {
            _route: 4 * t * 256 + 12 * m,
            _plan: 8 * m + 12 * m,
            _quantize_rows: 3 * t * d,
            _quantize_gathered: 2 * t * d + 2 * m * d,
            _permute: t * d + m * d,
            _swiglu: 4 * m * f + m * f,
            _swiglu_backward: 6 * m * f + 5 * m * f,
            _combine: 2 * m * d + 2 * t * d,
            _quantize_weight: 4 * shape.num_experts * 3 * d * f,
        }
        for prepare, num_bytes in moved.items():
            name = prepare.__name__[1:]
            listed.append(BenchCase(name, shape.name, partial(prepare, shape, device), bytes=float(num_bytes)))
    return listed


def _same(want: Sequence[Tensor]) -> Callable[[Any], float]:
    """The share of numbers that are not those of `want`, bit for bit (tensors of the same rows)."""

    def error(got: Any) -> float:
        pairs = list(zip(got, want, strict=True))
        return sum(float((_bits(a) != _bits(b)).float().mean()) for a, b in pairs) / len(pairs)

    return error


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _route(shape: Shape, device: str) -> Contenders:
    logits = normal(shape.num_tokens, 256, device=device, dtype=torch.float32)
    bias = normal(1, 256, device=device, dtype=torch.float32, scale=0.1, seed=1)[0]
    options: dict[str, Any] = {"num_groups": 8, "topk_group": 4, "top_k": 8, "normalise": True, "scale": 2.5}
    want = route(logits, bias, **options, backend="torch")[0]
    run = partial(route, logits, bias, **options)
    return Contenders({"ours": run}, lambda got: _same([want])(got[:1]), 1e-4, {"torch": partial(run, backend="torch")})


def _plan(shape: Shape, device: str) -> Contenders:
    choices = balanced_choices(shape, device)
    want = plan(choices, shape.num_experts, backend="torch")
    run = partial(plan, choices, shape.num_experts)
    return Contenders({"ours": run}, _same(want), 0, {"torch": partial(run, backend="torch")})


def _quantize_rows(shape: Shape, device: str) -> Contenders:
    x = normal(shape.num_tokens, shape.hidden, device=device)
    want = quantize_rows(x, backend="torch")
    run = partial(quantize_rows, x)
    return Contenders({"ours": run}, _same(want), 0, {"torch": partial(run, backend="torch")})


def _quantize_gathered(shape: Shape, device: str) -> Contenders:
    routes = plan(balanced_choices(shape, device), shape.num_experts)
    x = normal(shape.num_tokens, shape.hidden, device=device)
    run = partial(quantize_rows_and_columns, x, routes.source_row, floor=GRADIENT_FLOOR)
    want = quantize_rows_and_columns(x, routes.source_row[:128], floor=GRADIENT_FLOOR, backend="torch")

    def error(got: Any) -> float:
        q, s, qt, st = got
        return _same(want)((q[:128], s[:, :128], qt[:, :128], st[:1]))

    return Contenders({"ours": run}, error, 0)


def _permute(shape: Shape, device: str) -> Contenders:
    routes = plan(balanced_choices(shape, device), shape.num_experts)
    q, s = quantize_rows(normal(shape.num_tokens, shape.hidden, device=device))
    want = permute(q, s, routes, backend="torch")
    source = routes.source_row.long().clamp(min=0)
    peers = {"index_select": lambda: (q.view(torch.uint8)[source].view(q.dtype), s[:, source])}
    return Contenders({"ours": lambda: permute(q, s, routes)}, _same(want), 0, peers)


def _swiglu(shape: Shape, device: str) -> Contenders:
    h, prob, _ = _activations(shape, device)
    want = swiglu_quantize(h[:256], prob[:256], backend="torch")
    return Contenders({"ours": lambda: swiglu_quantize(h, prob)}, _close_rows(want), 1e-3)


def _swiglu_backward(shape: Shape, device: str) -> Contenders:
    h, prob, da = _activations(shape, device)
    want = swiglu_backward_quantize(h[:256], prob[:256], da[:256], backend="torch")

    def error(got: Any) -> float:
        columns = (got.dh_qt[:, :256], got.dh_st[:2]), (got.a_qt[:, :256], got.a_st[:2])
        wanted = (want.dh_qt, want.dh_st), (want.a_qt, want.a_st)
        worst = _close_rows((want.dh_q, want.dh_s))((got.dh_q, got.dh_s))
        for pair, true in zip(columns, wanted, strict=True):
            a, b = dequantize_columns(*pair), dequantize_columns(*true)
            worst = max(worst, float((a - b).norm() / b.norm()))
        return worst

    return Contenders({"ours": lambda: swiglu_backward_quantize(h, prob, da)}, error, 1e-3)


def _activations(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """h [M, 2F], prob [M], da [M, F] for live rows alone."""
    h = normal(shape.rows, 2 * shape.width, device=device)
    prob = torch.rand(shape.rows, device=device)
    return h, prob, normal(shape.rows, shape.width, device=device, scale=1e-6, seed=1)


def _close_rows(want: Sequence[Tensor]) -> Callable[[Any], float]:
    """Relative error of quantised rows on the first rows: the exponential's last bit may differ between devices."""

    def error(got: Any) -> float:
        (q, s), (true_q, true_s) = got, want
        count = len(true_q)
        a, b = (
            q.float().unflatten(1, (-1, 128)) * s.T[:, :, None]
            for q, s in ((q[:count], s[:, :count]), (true_q, true_s))
        )
        return float((a - b).norm() / b.norm())

    return error


def _combine(shape: Shape, device: str) -> Contenders:
    routes = plan(balanced_choices(shape, device), shape.num_experts)
    y = normal(len(routes.source_row), shape.hidden, device=device)
    want = combine(y, routes, backend="torch")
    place = routes.position.long()
    peers = {"gather and sum": lambda: y[place].sum(1)}
    return Contenders({"ours": lambda: combine(y, routes)}, lambda got: _same([want])([got]), 0, peers)


def _quantize_weight(shape: Shape, device: str) -> Contenders:
    gate_up = normal(shape.num_experts, 2 * shape.width, shape.hidden, device=device)
    down = normal(shape.num_experts, shape.hidden, shape.width, device=device)
    want = quantize_weight(down[-1:], backend="torch")

    def run() -> tuple[Tensor, ...]:
        quantize_weight(gate_up)
        return quantize_weight(down)

    return Contenders({"ours": run}, lambda got: _same(want)([part[-1:] for part in got]), 0)
