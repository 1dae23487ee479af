"""A loss on token log-probabilities and entropies with its gradient taken in the same pass: three products, not four.

`linear_logprob` learns its outputs' gradients after it has dropped the logits, and multiplies them again. A loss that
is a sum over tokens of functions of each token's own two values, as GRPO's is, can be differentiated while they are
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from policy.kernels.dispatch import Backend
from policy.kernels.linear_logprob import backend_for, check_inputs, linear_logprob

# (log-probabilities [n], entropies [n], which of the N rows they are) -> their part of the loss, a scalar.
TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]


def linear_logprob_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    temperature: float = 1.0,
    *,
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `token_loss` over all rows, and log p(target) and entropy [N] without gradients, as `linear_logprob`.

    `token_loss` is called with consecutive rows (by the kernels `chunk_tokens` at a time, default 2,048; otherwise with
    all at once) and must be a sum over them; it is the same where a row's figures are. Where the kernels compute, the
    gradients for hidden and weight are ready when this returns, and backward, once, scales them: a RuntimeError if it
    runs again. Which computes, and what is out of order, is as in `linear_logprob`.
    """
    if backend_for(hidden, None, backend) == "torch":
        logprobs, entropy = linear_logprob(
            hidden, weight, targets, temperature, chunk_tokens=chunk_tokens, backend="torch"
        )
        return token_loss(logprobs, entropy, slice(0, len(hidden))), logprobs.detach(), entropy.detach()
    check_inputs(hidden, weight, targets, temperature, chunk_tokens, look=False)
    outputs = _OnePass.apply(hidden, weight, targets.long(), token_loss, temperature, chunk_tokens)
    assert isinstance(outputs, tuple)
    return outputs


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_loss: TokenLoss,
        temperature: float,
        rows: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from policy.kernels import linear_logprob_triton as kernels

        step = kernels.Chunks(hidden, weight, temperature, rows, ctx.needs_input_grad[:2])
        loss = hidden.new_zeros((), dtype=torch.float32)
        logprobs, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        for chunk in step.slices():
            step.multiply(chunk)
            logprobs[chunk], entropy[chunk], *normaliser = step.figures(targets[chunk])
            part, *grads = _differentiated(token_loss, logprobs[chunk], entropy[chunk], chunk)
            loss += part
            if any(ctx.needs_input_grad[:2]):
                step.differentiate(chunk, targets[chunk], entropy[chunk], *normaliser, *grads)
        ctx.gradients = step.gradients()
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_logprob_loss: backward ran before and has scaled the gradients in place")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if grad is None else grad.mul_(grads[0]) for grad in gradients), None, None, None, None


def _differentiated(
    token_loss: TokenLoss, logprobs: Tensor, entropy: Tensor, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of some rows and its gradients for their log-probabilities and entropies, zero where it ignores them."""
    leaves = logprobs.detach().clone().requires_grad_(), entropy.detach().clone().requires_grad_()
    with torch.enable_grad():
        part = token_loss(*leaves, rows)
    if not part.requires_grad:
        return part, torch.zeros_like(logprobs), torch.zeros_like(entropy)
    first, second = torch.autograd.grad(part, leaves, allow_unused=True, materialize_grads=True)
    return part.detach(), first.contiguous(), second.contiguous()
