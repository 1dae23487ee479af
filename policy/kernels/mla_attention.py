"""Causal attention of packed sequences as multi-head latent attention has it (arXiv 2405.04434, section 2.1): a query and
key of two parts, one per head, one (rotated) whose key all heads share.

Shape letters: T tokens of all sequences, B sequences, H heads, N nope width, R rope width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from policy.kernels.dispatch import Backend, choose_backend


def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(scale * (q_nope k_nope^T + q_rope k_rope^T)) v over what is not ahead in the same sequence: [T, H, V].

    q_nope and k_nope [T, H, N], q_rope [T, H, R], k_rope [T, R], v [T, H, V], of one type; `cu_seqlens` [B + 1] (int32
    or int64) rises from 0 to T, empty sequences allowed. Scores and softmax are in fp32 (fp64 for fp64), and all five
    tensors have gradients. Neither result nor gradients depend on what else is packed, and both repeat bit for bit.

    The kernels (bf16, fp16 and fp32) read heads where they lie, so slices of wider tensors are not copied, never expand
    k_rope, and never hold an [L, L] tensor; they round probabilities and their gradients to the inputs' type for the
    products, as flash attention does. They trust `cu_seqlens`, which the CPU checks; shapes or types out of order are a
    ValueError.
    """
    _check(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens)
    if choose_backend("mla_attention", q_nope, backend) == "torch":
        return _by_sequence(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale)
    if q_nope.dtype == torch.float64:
        raise ValueError("mla_attention: the kernels take bf16, fp16 and fp32, not fp64")
    out = _MlaAttention.apply(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale)
    assert isinstance(out, Tensor)
    return out


def _check(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    tensors = {"q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope, "v": v}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if any(tensor.dim() != (2 if name == "k_rope" else 3) for name, tensor in tensors.items()):
        raise ValueError(f"mla_attention takes [T, H, width] and k_rope [T, R], not {shapes}")
    num_tokens, heads, nope = q_nope.shape
    rope = q_rope.shape[2]
    wanted = {
        "q_nope": [num_tokens, heads, nope],
        "q_rope": [num_tokens, heads, rope],
        "k_nope": [num_tokens, heads, nope],
        "k_rope": [num_tokens, rope],
        "v": [num_tokens, heads, v.shape[2]],
    }
    if shapes != wanted or 0 in (heads, nope, rope, v.shape[2]):
        raise ValueError(f"mla_attention: shapes {shapes} do not agree; with these q_nope, q_rope and v: {wanted}")
    if len({tensor.dtype for tensor in tensors.values()}) > 1 or not q_nope.dtype.is_floating_point:
        types = {name: str(tensor.dtype) for name, tensor in tensors.items()}
        raise ValueError(f"mla_attention takes tensors of one floating-point type, not {types}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64 [B + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens must rise from 0 to {num_tokens} tokens, not {bounds[:4]} .. {bounds[-1]}")


def _by_sequence(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """The definition, one sequence after the other."""
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    outputs = []
    for length, *parts in _sequences(cu_seqlens, q_nope, q_rope, k_nope, k_rope, v):
        own_q, rotated_q, own_k, rotated_k, values = (part.to(wide) for part in parts)
        scores = torch.einsum("ihn,jhn->hij", own_q, own_k) + torch.einsum("ihr,jr->hij", rotated_q, rotated_k)
        ahead = torch.ones(length, length, dtype=torch.bool, device=v.device).triu(1)
        weights = (scores * scale).masked_fill(ahead, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hij,jhv->ihv", weights, values).to(v.dtype))
    return torch.cat(outputs)


def _sequences(cu_seqlens: Tensor, *tensors: Tensor) -> list[Any]:
    lengths = cu_seqlens.diff().tolist() or [0]
    return [(length, *parts) for length, *parts in zip(lengths, *(t.split(lengths) for t in tensors), strict=True)]


class _MlaAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_nope: Tensor,
        q_rope: Tensor,
        k_nope: Tensor,
        k_rope: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        scale: float,
    ) -> Tensor:
        from policy.kernels import mla_attention_triton

        out, lse = mla_attention_triton.forward(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale)
        ctx.save_for_backward(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        from policy.kernels import mla_attention_triton

        return *mla_attention_triton.backward(grads[0], *ctx.saved_tensors, scale=ctx.scale), None, None
