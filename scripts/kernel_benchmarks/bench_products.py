"""The FP8 products of experts: forward, data gradient and weight gradient, of both weights of a layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.kernels.grouped_gemm import grouped_gemm
from policy.kernels.grouped_wgrad import grouped_wgrad
from policy.kernels.plan import Plan, plan
from policy.kernels.quantize import (
    GRADIENT_FLOOR,
    dequantize_columns,
    dequantize_rows,
    dequantize_weight,
    quantize_rows_and_columns,
    quantize_weight,
)
from scripts.kernel_benchmarks import BenchCase, Contenders, Shape, balanced_choices, normal, relative_error, sampled


class Product(NamedTuple):
    """y = x W^T over `rows` rows of `experts` experts, W [N, K]."""

    name: str
    rows: int
    experts: int
    n: int
    k: int


def cases(shapes: Sequence[Shape], device: str) -> list[BenchCase]:
    """Three products for each of the two weights; the data gradient of one is the other's forward, transposed."""
    listed = []
    for shape in shapes:
        up = Product("gate+up", shape.rows, shape.num_experts, 2 * shape.width, shape.hidden)
        down = Product("down", shape.rows, shape.num_experts, shape.hidden, shape.width)
        dgrad = Product("gate+up dgrad", shape.rows, shape.num_experts, shape.hidden, 2 * shape.width)
        for product in (up, down, dgrad):
            flops = 2.0 * product.rows * product.n * product.k
            weights = product.experts * product.n * product.k
            read = product.rows * product.k + weights
            prepare = partial(_forward, shape, product, device)
            moved = read + 2 * product.rows * product.n
            listed.append(BenchCase(f"grouped_gemm {product.name}", shape.name, prepare, flops, moved))
        for product in (up, down):
            flops = 2.0 * product.rows * product.n * product.k
            moved = product.rows * (product.n + product.k) + 2.0 * product.experts * product.n * product.k
            prepare = partial(_wgrad, shape, product, device)
            listed.append(BenchCase(f"grouped_wgrad {product.name}", shape.name, prepare, flops, moved))
    return listed


def _routes(shape: Shape, device: str) -> Plan:
    return plan(balanced_choices(shape, device), shape.num_experts)


def _forward(shape: Shape, product: Product, device: str) -> Contenders:
    routes = _routes(shape, device)
    x = normal(shape.num_tokens, product.k, device=device)
    w = normal(product.experts, product.n, product.k, device=device, scale=product.k**-0.5, seed=1)
    q, s, _, _ = quantize_rows_and_columns(x, routes.source_row)
    weight = quantize_weight(w)
    live, some = product.rows, sampled(product.rows, device)
    expert = routes.tile_expert[some // 128].long()
    want = torch.empty(len(some), product.n, dtype=torch.float64, device=device)
    rows = dequantize_rows(q[some], s[:, some]).double()
    for one in expert.unique():
        dense = dequantize_weight(weight.q[one : one + 1], weight.s[one : one + 1])[0].double()
        want[expert == one] = rows[expert == one] @ dense[: product.n].T
    ends = routes.expert_offsets[1:]
    expanded = x[routes.source_row[:live].long().clamp(min=0)]
    ours = {"ours": lambda: grouped_gemm(q, s, weight.q, weight.s, routes)}
    if device == "cuda":
        ours |= _variants(q, s, weight.q, weight.s, routes, product)
    peers: dict[str, Callable[[], Any]] = {
        "bf16 grouped_mm": lambda: F.grouped_mm(expanded, w.transpose(1, 2), offs=ends)
    }
    if device == "cuda":
        peers["FP8 rowwise scaled_grouped_mm"] = _rowwise(q[:live], weight.q, ends)
        peers["cuBLASLt 1x128 loop"] = _cublas(q[:live], s[:, :live], weight.q, weight.s)
        if importlib.util.find_spec("deep_gemm"):
            peers["DeepGEMM"] = _deep_gemm(q[:live], s[:, :live], weight.q, weight.s, routes)
    return Contenders(ours, lambda y: relative_error(y[some], want), 3e-3, peers)


def _variants(
    q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, routes: Plan, product: Product
) -> dict[str, Callable[[], Tensor]]:
    from policy.kernels import grouped_gemm_triton as kernels

    return {
        f"ours, {name}": partial(
            kernels.grouped_gemm, q, s, wq, ws, routes.tile_expert, routes.expert_offsets, torch.bfloat16, name
        )
        for name, config in kernels.CONFIGS.items()
        if not (config.wide and product.n % 256)
    }


def _rowwise(q: Tensor, wq: Tensor, ends: Tensor) -> Callable[[], Tensor]:
    """One scale per row: not the recipe, but what the hardware gives when scales cost nothing."""
    rows, columns = torch.ones(len(q), device=q.device), torch.ones(wq.shape[:2], device=q.device)
    functional: Any = F

    def run() -> Tensor:
        kind = F.ScalingType.RowWise
        return functional.scaled_grouped_mm(
            q, wq.transpose(1, 2), rows, kind, columns, kind, offs=ends, output_dtype=torch.bfloat16
        )

    return run


def _cublas(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor) -> Callable[[], Tensor]:
    """cuBLASLt's blockwise product, expert after expert, all with as many rows."""
    scales = [part.contiguous() for part in s.chunk(len(wq), 1)]  # of an expert's rows, down its columns
    padded = F.pad(ws, (0, -ws.shape[2] % 4))  # as cuBLASLt lays them out
    parts = list(zip(q.chunk(len(wq)), scales, wq, padded, strict=True))

    def run() -> Tensor:
        kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        return torch.cat(
            [
                F.scaled_mm(rows, w.t(), scale.t(), kinds[0], w_scale.t(), kinds[1], output_dtype=torch.bfloat16)
                for rows, scale, w, w_scale in parts
            ]
        )

    return run


def _deep_gemm(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, routes: Plan) -> Callable[[], Tensor]:
    import deep_gemm

    owner = routes.tile_expert[: len(q) // 128].repeat_interleave(128).contiguous()
    out = torch.empty(len(q), wq.shape[1], dtype=torch.bfloat16, device=q.device)

    def run() -> Tensor:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((q, s.t()), (wq, ws), out, owner)
        return out

    return run


def _wgrad(shape: Shape, product: Product, device: str) -> Contenders:
    routes = _routes(shape, device)
    live = product.rows
    x, dy = (normal(shape.num_tokens, size, device=device, seed=size) for size in (product.k, product.n))
    _, _, xq, xs = quantize_rows_and_columns(x, routes.source_row)
    _, _, dyq, dys = quantize_rows_and_columns(dy, routes.source_row, floor=GRADIENT_FLOOR)
    expert, some = shape.num_experts - 1, sampled(product.n, device)
    segment = slice(*routes.expert_offsets[-2:].tolist())
    blocks = slice(segment.start // 128, segment.stop // 128)
    theirs = dequantize_columns(dyq[some][:, segment], dys[blocks][:, some]).double()
    want = theirs.T @ dequantize_columns(xq[:, segment], xs[blocks]).double()
    accumulated = torch.zeros(shape.num_experts, len(dyq), len(xq), device=device)

    def accumulate() -> Tensor:
        return grouped_wgrad(dyq, dys, xq, xs, routes, out=accumulated.zero_())

    ours = {
        "ours": lambda: grouped_wgrad(dyq, dys, xq, xs, routes),
        "ours, zeroed float32": accumulate,
    }
    source, ends = routes.source_row[:live].long().clamp(min=0), routes.expert_offsets[1:]
    wide = dy[source].t().contiguous().t(), x[source]
    peers: dict[str, Callable[[], Any]] = {"bf16 grouped_mm": lambda: F.grouped_mm(wide[0].t(), wide[1], offs=ends)}
    if device == "cuda" and importlib.util.find_spec("deep_gemm"):
        peers["DeepGEMM (float32 + copy)"] = _deep_gemm_wgrad(dyq, dys, xq, xs, routes)
    return Contenders(ours, lambda dw: relative_error(dw[expert, some, : product.k], want), 3e-3, peers)


def _deep_gemm_wgrad(dyq: Tensor, dys: Tensor, xq: Tensor, xs: Tensor, routes: Plan) -> Callable[[], Tensor]:
    import deep_gemm

    ends = routes.expert_offsets.tolist()
    sizes = [end - start for start, end in pairwise(ends)]
    flat = [torch.cat([q[:, start:end].reshape(-1) for start, end in pairwise(ends)]) for q in (dyq, xq)]
    scales = [s[: ends[-1] // 128].contiguous() for s in (dys, xs)]
    on_device = torch.tensor(sizes, dtype=torch.int32, device=dyq.device)
    out = torch.zeros(len(sizes), len(dyq), len(xq), device=dyq.device)

    def run() -> Tensor:
        out.zero_()
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            (flat[0], scales[0]), (flat[1], scales[1]), out, sizes, on_device, out, recipe=(1, 1, 128)
        )
        return out.bfloat16()

    return run
