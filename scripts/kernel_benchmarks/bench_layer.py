"""A whole layer of routed experts, forward and backward: FP8 against bf16's grouped products."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from policy.config import PolicyConfig
from policy.deepseek import Experts
from policy.kernels.fp8_experts import forget_weights, fp8_experts
from scripts.kernel_benchmarks import BenchCase, Contenders, Shape, balanced_choices, normal, relative_error, sampled

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def cases(shapes: Sequence[Shape], device: str) -> list[BenchCase]:
    """Forward and backward are three products of each weight: 18 M D F."""
    listed = []
    for shape in shapes:
        m, d, f = shape.rows, shape.hidden, shape.width
        weights = 3 * shape.num_experts * d * f
        moved = weights * (1 + 1 + 2) + 10 * shape.num_tokens * d
        flops = 18.0 * m * d * f
        prepare = partial(_layer, shape, device)
        listed.append(BenchCase("expert layer forward+backward", shape.name, prepare, flops, float(moved)))
    return listed


def _layer(shape: Shape, device: str) -> Contenders:
    d, f, e = shape.hidden, shape.width, shape.num_experts
    x = normal(shape.num_tokens, d, device=device).requires_grad_()
    gates = torch.rand(shape.num_tokens, shape.top_k, device=device).requires_grad_()
    indices = balanced_choices(shape, device)
    gate_up = nn.Parameter(normal(e, 2 * f, d, device=device, scale=d**-0.5, seed=1))
    down = nn.Parameter(normal(e, d, f, device=device, scale=f**-0.5, seed=2))
    dout = normal(shape.num_tokens, d, device=device, seed=3, scale=1e-3)
    some = sampled(shape.num_tokens, device, min(16, shape.num_tokens))
    truth = _truth(x, gates, indices, gate_up, down, dout, some)

    def both(layer: Layer) -> tuple[Tensor, ...]:
        out = layer(x, gates, indices, gate_up, down)
        return out, *torch.autograd.grad(out, (x, gates, gate_up, down), dout)

    def with_weights() -> tuple[Tensor, ...]:
        forget_weights()
        return both(fp8_experts)

    def error(got: tuple[Tensor, ...]) -> float:
        return max(relative_error(ours[some], true) for ours, true in zip(got[:2], truth, strict=True))

    peers = {"bf16 grouped_mm": partial(both, _bf16_layer(shape))}
    if device == "cuda" and importlib.util.find_spec("torchao"):
        peers["torchao blockwise"] = partial(both, _torchao_layer)
    ours = {"ours": partial(both, fp8_experts), "ours, weights quantised anew": with_weights}
    return Contenders(ours, error, 0.08, peers)


def _truth(
    x: Tensor, gates: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, dout: Tensor, some: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and gradient of x of tokens `some` [n], without rounding; float64, one expert at a time."""
    rows = x.detach()[some].double()
    out, dx = torch.zeros_like(rows), torch.zeros_like(rows)
    for expert in range(len(down)):
        token, slot = (indices[some] == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        leaf = rows[token].requires_grad_()
        gate, up = (leaf @ gate_up[expert].detach().double().T).chunk(2, 1)
        made = (F.silu(gate) * up) @ down[expert].detach().double().T * gates.detach()[some[token], slot, None]
        out.index_add_(0, token, made.detach())
        dx.index_add_(0, token, torch.autograd.grad(made, leaf, dout[some[token]].double())[0])
    return out, dx


def _bf16_layer(shape: Shape) -> Layer:
    config = PolicyConfig(
        vocab_size=1,
        hidden_size=shape.hidden,
        intermediate_size=1,
        moe_intermediate_size=shape.width,
        num_hidden_layers=1,
        num_attention_heads=1,
        n_routed_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device("meta"):
        experts = Experts(config)

    def run(x: Tensor, gates: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights = {"gate_up_proj": gate_up, "down_proj": down}
        return functional_call(experts, weights, (x, gates, indices))

    return run


def _torchao_layer(x: Tensor, gates: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Its product in the place of grouped_mm; it quantises the weights at every call."""
    from torchao.prototype.moe_training.blockwise_fp8 import grouped_mm  # pyright: ignore[reportMissingImports]

    multiply: Any = grouped_mm._to_fp8_blockwise_then_scaled_grouped_mm
    top_k = indices.shape[1]
    order = indices.flatten().argsort(stable=True)
    ends = torch.bincount(indices.flatten(), minlength=len(down)).cumsum(0).to(torch.int32)
    gate, up = multiply(x[order // top_k], gate_up.transpose(1, 2), ends).chunk(2, -1)
    out = multiply(F.silu(gate) * up, down.transpose(1, 2), ends)
    out = torch.empty_like(out).index_copy(0, order, out)
    return (out.unflatten(0, (-1, top_k)) * gates[..., None].to(out.dtype)).sum(1)
