"""Log-probabilities of tokens under the policy: the only place in the project where a sequence is shifted by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from policy.kernels.linear_logprob import SamplingMask, linear_logprob

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
    sampling_mask: SamplingMask | None = None,
) -> TokenLogprobs:
    """Log-probability and entropy of every token of packed sequences (as in the model's `forward`).

    Entries of first tokens, and where `mask` [T] is false, are 0; at depth k of multi-token prediction so are those of
    the k tokens after the first. The full logits never exist at once (`linear_logprob`).

    `sampling_mask`, one span per token, is what top-k and top-p kept when the tokens were sampled: probabilities and
    entropy are then those of the distribution cut to it and renormalised ("Keep Sampling Mask", DeepSeek-V3.2), and the
    empty span of a prompt's token stands for the whole vocabulary. Multi-token prediction takes no part in it. A
    temperature that is not positive, and a token outside of its span, are a ValueError.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0 to define log-probabilities, not {temperature}")
    if sampling_mask is not None:
        _check_sampling_mask(
            sampling_mask, input_ids, position_ids > 0 if mask is None else (position_ids > 0) & mask.bool()
        )
    zeros = torch.zeros(len(input_ids), dtype=torch.float32, device=input_ids.device)

    def head(hidden: Tensor, weight: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        wanted = position_ids > depth if mask is None else (position_ids > depth) & mask.bool()
        rows = wanted.nonzero().squeeze(1)
        spans = None if depth or sampling_mask is None else sampling_mask.select(rows)
        logprobs, entropy = linear_logprob(
            hidden[rows - 1 - depth],
            weight,
            input_ids[rows],
            temperature,
            chunk_tokens=chunk_tokens,
            sampling_mask=spans,
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


def _check_sampling_mask(sampling_mask: SamplingMask, input_ids: Tensor, wanted: Tensor) -> None:
    """ValueError, before the forward pass, for the first token whose span lacks it."""
    num_spans = len(sampling_mask.offsets) - 1
    if num_spans != len(input_ids):
        raise ValueError(f"sampling_mask has {num_spans} spans for {len(input_ids)} tokens: it needs one each")
    lacking = sampling_mask.without_target(input_ids)
    lacking = lacking[wanted[lacking]]
    if len(lacking):
        place = int(lacking[0])
        kept = sampling_mask.token_ids[sampling_mask.offsets[place] : sampling_mask.offsets[place + 1]].tolist()
        shown = ", ".join(map(str, kept[:8])) + (", ..." if len(kept) > 8 else "")
        raise ValueError(
            f"token {place} of the packed sequences has the id {int(input_ids[place])}, which is not among the {len(kept)} "
            f"ids that its sampling kept ({shown}); {len(lacking)} tokens are like that: mask and tokens are not of the "
            "same completions"
        )
