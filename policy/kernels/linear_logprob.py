"""Token log-probabilities straight from hidden states: the logits [N, V] exist a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# What a chunk's buffers may hold: a twelfth of the whole logits in fp32, but never less than MIN_BUFFER_BYTES, because
# products of few rows are slow. At N = 8192, V = 32768 that is 8.3 % of the logits.
BUFFER_SHARE = 1 / 12
MIN_BUFFER_BYTES = 64 * 2**20


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy [N] each (nats) of softmax(hidden @ weight.T / temperature).

    hidden [N, D] and weight [V, D] are of one type, targets [N] whole numbers in 0..V-1. The results are fp32, or fp64
    where the inputs are. The products run in the inputs' type, the softmax in fp32; both outputs have gradients for
    hidden and weight. Backward recomputes the logits, `chunk_tokens` rows at a time (default: by BUFFER_SHARE), and
    sums the weight's gradient in fp32. Shapes, types, targets or a temperature out of order are a ValueError.
    """
    _check(hidden, weight, targets, temperature, chunk_tokens)
    rows = chunk_tokens or _rows_per_chunk(len(hidden), len(weight), hidden.dtype)
    rows = max(1, min(rows, len(hidden)))
    outputs = _LinearLogprob.apply(hidden, weight, targets.long(), temperature, rows)
    assert isinstance(outputs, tuple)
    return outputs


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int | None) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 to define log-probabilities, not {temperature}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, D] and [V, D]")
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must be of one floating-point type")
    if targets.shape != hidden.shape[:1] or targets.dtype.is_floating_point:
        raise ValueError(f"targets are {targets.dtype} {list(targets.shape)}; they must be ids [{len(hidden)}]")
    if len(targets):
        lowest, highest = torch.stack(torch.aminmax(targets)).tolist()
        if lowest < 0 or highest >= len(weight):
            raise ValueError(f"targets run from {lowest} to {highest}, the vocabulary from 0 to {len(weight) - 1}")


def _rows_per_chunk(num_rows: int, vocab: int, dtype: torch.dtype) -> int:
    wide = _wide(dtype).itemsize
    bytes_per_row = vocab * (2 * wide + (dtype.itemsize if dtype.itemsize < wide else 0))
    budget = max(MIN_BUFFER_BYTES, int(4 * num_rows * vocab * BUFFER_SHARE))
    return max(1, budget // bytes_per_row)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Buffers:
    """What one chunk of logits passes through, allocated once: on the CPU, fresh pages cost more than the softmax."""

    def __init__(self, weight: Tensor, rows: int):
        shape = (rows, len(weight))
        self.first = weight.new_empty(shape, dtype=_wide(weight.dtype))
        self.second = torch.empty_like(self.first)
        self.narrow = None if weight.dtype == self.first.dtype else weight.new_empty(shape)

    def log_softmax(self, hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """log p and p [n, V] of a chunk [n, D]; both are overwritten by the next call."""
        n = len(hidden)
        logits = self.first[:n]
        if self.narrow is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            logits.copy_(torch.mm(hidden, weight.t(), out=self.narrow[:n]))
        if temperature != 1:
            logits.div_(temperature)
        logp = torch.log_softmax(logits, -1, out=self.second[:n])
        return logp, torch.exp(logp, out=logits)

    def in_type_of_weight(self, grad: Tensor) -> Tensor:
        return grad if self.narrow is None else self.narrow[: len(grad)].copy_(grad)


class _LinearLogprob(torch.autograd.Function):
    """With p the softmax and H its entropy: d log p_t / d logits = onehot_t - p, d H / d logits = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        entropy = torch.empty_like(logprobs)
        if len(hidden):
            buffers = _Buffers(weight, rows)
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                logp, p = buffers.log_softmax(hidden[chunk], weight, temperature)
                logprobs[chunk] = logp.gather(1, targets[chunk, None]).squeeze(1)
                # Not log_z - E[logits]: where one token is certain, that difference comes out negative.
                torch.sum(p.mul_(logp), -1, out=entropy[chunk]).neg_()
        ctx.save_for_backward(hidden, weight, targets, entropy)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 5
        hidden, weight, targets, entropy = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if for_weight else None
        buffers = _Buffers(weight, ctx.rows) if len(hidden) else None
        for start in range(0, len(hidden), ctx.rows):
            assert buffers is not None
            chunk = slice(start, start + ctx.rows)
            logp, p = buffers.log_softmax(hidden[chunk], weight, ctx.temperature)
            parts = [None if grad is None else grad[chunk, None] / ctx.temperature for grad in grads]
            grad_logits = _grad_logits(logp, p, targets[chunk, None], entropy[chunk, None], *parts)
            grad_logits = buffers.in_type_of_weight(grad_logits)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.t(), hidden[chunk])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _grad_logits(
    logp: Tensor, p: Tensor, targets: Tensor, entropy: Tensor, for_logprob: Tensor | None, for_entropy: Tensor | None
) -> Tensor:
    """Both outputs' gradients on the logits [n, V], from logp and p, whose memory it takes; columns [n, 1] otherwise."""
    along = torch.zeros_like(entropy) if for_logprob is None else for_logprob
    if for_entropy is None:
        grad = p.mul_(-along)
    else:
        grad = p.mul_(torch.addcmul(along + for_entropy * entropy, for_entropy, logp, out=logp)).neg_()
    return grad.scatter_add_(1, targets, along)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total may be of a wider type than the product."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
