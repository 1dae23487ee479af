"""Log-probabilities of tokens under the policy: the only place in the project where a sequence is shifted by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from policy.kernels.linear_logprob import linear_logprob

if TYPE_CHECKING:
    from policy.deepseek import MtpMode
    from policy.interface import Policy


class TokenLogprobs(NamedTuple):
    """What the policy says of each token given its prefix, fp32, in nats; every entry stands at its own token.

    `logprobs` and `entropy` are [T]. Only if asked for: `mtp_logprobs`, one [T] per depth of multi-token prediction,
    `balance_loss` [B] without alpha, `routed_experts` [T, M, K].
    """

    logprobs: Tensor
    entropy: Tensor
    mtp_logprobs: tuple[Tensor, ...] = ()
    balance_loss: Tensor | None = None
    routed_experts: Tensor | None = None


def token_logprobs(
    model: Policy,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    mtp: MtpMode = False,
    routed_experts: Tensor | None = None,
    return_routed_experts: bool = False,
    return_balance_loss: bool = False,
) -> TokenLogprobs:
    """Log-probability and entropy of every token of packed sequences (as in the model's `forward`).

    Entries of first tokens, and where `mask` [T] is false, are 0; at depth k of multi-token prediction so are those of
    the k tokens after the first. The full logits never exist at once (`linear_logprob`). A temperature that is not
    positive is a ValueError.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0 to define log-probabilities, not {temperature}")
    zeros = torch.zeros(len(input_ids), dtype=torch.float32, device=input_ids.device)

    def head(hidden: Tensor, weight: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        wanted = position_ids > depth if mask is None else (position_ids > depth) & mask.bool()
        rows = wanted.nonzero().squeeze(1)
        logprobs, entropy = linear_logprob(
            hidden[rows - 1 - depth], weight, input_ids[rows], temperature, chunk_tokens=chunk_tokens
        )
        return zeros.index_copy(0, rows, logprobs.float()), zeros.index_copy(0, rows, entropy.float())

    output = model(
        input_ids,
        position_ids,
        cu_seqlens,
        head=head,
        mtp=mtp,
        routed_experts=routed_experts,
        return_routed_experts=return_routed_experts,
        return_balance_loss=return_balance_loss,
    )
    ahead = tuple(logprobs for logprobs, _ in output.mtp)
    logprobs, entropy = output.hidden
    return TokenLogprobs(logprobs, entropy, ahead, output.balance_loss, output.routed_experts)
