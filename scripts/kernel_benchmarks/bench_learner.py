"""The learner's other two: log-probabilities from hidden states, and attention over packed sequences."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from policy.deepseek import Packing, causal_attention
from policy.kernels.linear_logprob import linear_logprob
from policy.kernels.linear_logprob_loss import linear_logprob_loss
from policy.kernels.mla_attention import mla_attention
from policy.packing import layout
from scripts.kernel_benchmarks import BenchCase, Contenders, Shape, normal, relative_error, sampled


class Head(NamedTuple):
    """T tokens, width D, V words."""

    name: str
    num_tokens: int
    hidden: int
    vocab: int


class Attention(NamedTuple):
    """Sequences by their lengths; H heads of widths N + R and V."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    nope: int = 128
    rope: int = 64
    value: int = 128


HEADS = (Head("V2-Lite head", 16384, 2048, 102400), Head("V3 head", 8192, 7168, 129280))
ATTENTIONS = (
    Attention("V2-Lite 8x4096", (4096,) * 8, 16),
    Attention("V2-Lite ragged 32k", (8192, 4096, 4096, 2048, 6144, 1024, 3072, 512, 1536, 2048), 16),
)


def cases(
    shapes: Sequence[Shape],
    device: str,
    heads: Sequence[Head] = HEADS,
    attentions: Sequence[Attention] = ATTENTIONS,
) -> list[BenchCase]:
    """Scoring is one product, one pass forward and backward three; attention's backward is 2.5 times its forward."""
    listed = []
    for head in heads:
        t, d, v = head.num_tokens, head.hidden, head.vocab
        product, moved = 2.0 * t * d * v, 2.0 * (t * d + v * d)
        listed += [
            BenchCase("logprob scoring", head.name, partial(_scoring, head, device), product, moved, "bf16"),
            BenchCase(
                "logprob loss forward+backward", head.name, partial(_loss, head, device), 3 * product, 3 * moved, "bf16"
            ),
        ]
    for attention in attentions:
        pairs = sum(length**2 / 2 for length in attention.lengths) * attention.heads
        flops = 2.0 * pairs * (attention.nope + attention.rope + attention.value)
        width = attention.heads * 2 * (attention.nope + attention.rope + attention.value)
        moved = 2.0 * sum(attention.lengths) * width
        for backward in (False, True):
            listed.append(
                BenchCase(
                    "attention forward+backward" if backward else "attention forward",
                    attention.name,
                    partial(_attention, attention, backward, device),
                    flops * (3.5 if backward else 1),
                    moved * (3 if backward else 1),
                    "bf16",
                )
            )
    return listed


def _inputs(head: Head, device: str) -> tuple[Tensor, Tensor, Tensor]:
    hidden = normal(head.num_tokens, head.hidden, device=device).requires_grad_()
    weight = nn.Parameter(normal(head.vocab, head.hidden, device=device, scale=2 * head.hidden**-0.5, seed=1))
    generator = torch.Generator().manual_seed(2)
    return hidden, weight, torch.randint(head.vocab, (head.num_tokens,), generator=generator).to(device)


def _exact_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, some: Tensor) -> Tensor:
    logits = hidden.detach()[some].double() @ weight.detach().double().T
    return logits.log_softmax(-1).gather(1, targets[some, None])[:, 0]


@torch.no_grad()
def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch, 2,048 rows of logits at a time."""
    parts = []
    for rows, ids in zip(hidden.split(2048), targets.split(2048), strict=True):
        logp = (rows @ weight.T).float().log_softmax(-1)
        parts.append((logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _scoring(head: Head, device: str) -> Contenders:
    hidden, weight, targets = _inputs(head, device)
    some = sampled(head.num_tokens, device, min(16, head.num_tokens))
    want = _exact_logprobs(hidden, weight, targets, some)
    ours = partial(linear_logprob, hidden.detach(), weight.detach(), targets)
    peers = {"torch, chunked": partial(_chunked, hidden.detach(), weight.detach(), targets)}
    return Contenders({"ours": ours}, lambda got: relative_error(got[0][some], want), 5e-3, peers)


def _loss(head: Head, device: str) -> Contenders:
    """A GRPO-like loss: the sum of log-probabilities times advantages."""
    hidden, weight, targets = _inputs(head, device)
    advantages = normal(1, head.num_tokens, device=device, dtype=torch.float32, seed=3)[0]
    some = sampled(head.num_tokens, device, min(16, head.num_tokens))
    p = (hidden.detach()[some].double() @ weight.detach().double().T).softmax(-1)
    own = weight.detach()[targets[some]].double() - p @ weight.detach().double()
    want = own * advantages[some, None].double()

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (hidden, weight))

    def one_pass() -> tuple[Tensor, ...]:
        loss, _, _ = linear_logprob_loss(
            hidden, weight, targets, lambda logp, entropy, rows: (logp * advantages[rows]).sum()
        )
        return gradients(loss)

    def recomputing() -> tuple[Tensor, ...]:
        return gradients((linear_logprob(hidden, weight, targets)[0] * advantages).sum())

    peers: dict[str, Callable[[], Any]] = {}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        peers["Liger fused linear GRPO"] = _liger(hidden, weight, targets, advantages)
    ours = {"ours, one pass": one_pass, "ours, recomputing": recomputing}
    return Contenders(ours, lambda got: relative_error(got[0][some], want), 2e-2, peers)


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Callable[[], Any]:
    """Its loss is a mean of ratios with an advantage per sequence: the same products, other numbers."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]

    loss_of = LigerFusedLinearGRPOLoss(beta=0.0, compiled=True, use_ref_model=False)
    rows = hidden.unflatten(0, (-1, 2048))
    ids = targets.view(-1, 2048)

    def run() -> tuple[Tensor, ...]:
        loss, *_ = loss_of(rows, weight, ids, torch.ones_like(ids), advantages[: len(ids)])
        return torch.autograd.grad(loss, (hidden, weight))

    return run


def _attention(attention: Attention, backward: bool, device: str) -> Contenders:
    total, heads = sum(attention.lengths), attention.heads
    widths = (attention.nope, attention.rope, attention.nope, None, attention.value)
    parts = [
        normal(total, attention.rope, device=device, seed=seed)
        if width is None
        else normal(total, heads, width, device=device, seed=seed)
        for seed, width in enumerate(widths)
    ]
    parts = [part.requires_grad_() for part in parts]
    _, position_ids, cu_seqlens = layout(torch.tensor(attention.lengths))
    packing = Packing.of(position_ids.to(device), cu_seqlens.to(device))
    dout = normal(total, heads, attention.value, device=device, seed=9)
    scale = (attention.nope + attention.rope) ** -0.5
    first, head = slice(0, attention.lengths[0]), heads - 1
    leaves = [part.detach()[first].double() for part in parts]
    q_nope, q_rope, k_nope, k_rope, v = (part[:, head] if part.dim() == 3 else part for part in leaves)
    scores = (q_nope @ k_nope.T + q_rope @ k_rope.T) * scale
    ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
    want = scores.masked_fill(ahead, float("-inf")).softmax(-1) @ v

    def both(core: Callable[..., Tensor]) -> Tensor:
        with torch.set_grad_enabled(backward):
            out = core(*parts, packing, scale)
        if backward:
            torch.autograd.grad(out, parts, dout)
        return out.detach()

    peers = {"padded SDPA": partial(both, _padded)}
    if device == "cuda":
        peers["varlen_attn, padded values"] = partial(both, partial(_varlen, longest=max(attention.lengths)))
    return Contenders({"ours": partial(both, _ours)}, lambda out: relative_error(out[first, head], want), 1e-2, peers)


def _ours(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, packing: Packing, scale: float
) -> Tensor:
    return mla_attention(q_nope, q_rope, k_nope, k_rope, v, packing.cu_seqlens, scale)


def _joined(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    shared = k_rope[:, None].expand(-1, k_nope.shape[1], -1)
    return torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, shared), -1)


def _padded(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, packing: Packing, scale: float
) -> Tensor:
    q, k = _joined(q_nope, q_rope, k_nope, k_rope)
    q, k, v = (packing.pad(t).transpose(1, 2) for t in (q, k, v))
    return packing.unpad(causal_attention(q, k, v, scale).transpose(1, 2))


def _varlen(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    packing: Packing,
    scale: float,
    longest: int,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k = _joined(q_nope, q_rope, k_nope, k_rope)
    values = torch.nn.functional.pad(v, (0, q.shape[-1] - v.shape[-1]))
    ends = packing.cu_seqlens.int()
    attend: Any = varlen_attn
    # Versions of torch name it differently; the scale by default is that of the queries' width, which is ours.
    causal = {"is_causal": True} if "is_causal" in signature(attend).parameters else {"window_size": (-1, 0)}
    return attend(q, k, values, ends, ends, longest, longest, **causal)[..., : v.shape[-1]]
