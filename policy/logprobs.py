"""Log-probabilities of tokens under the policy: the only place in the project where a sequence is shifted by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from policy.deepseek import DeepseekPolicy


def token_logprobs(
    model: DeepseekPolicy,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [T] each (fp32, nats) of every token given its prefix.

    Inputs are packed as in `DeepseekPolicy.forward`. Entries of first tokens, and where `mask` [T] is false, are 0. The
    vocabulary projection runs over `chunk_tokens` tokens at a time and is recomputed in backward, so the full logits
    never exist at once. A temperature that is not positive is a ValueError.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0 to define log-probabilities, not {temperature}")
    hidden = model(input_ids, position_ids, cu_seqlens)
    wanted = position_ids > 0 if mask is None else (position_ids > 0) & mask.bool()
    index = wanted.nonzero().squeeze(1)
    parts = [
        _project(model, hidden[rows - 1], input_ids[rows], temperature, recompute=len(index) > chunk_tokens)
        for rows in index.split(chunk_tokens)
    ]
    zeros = torch.zeros(len(input_ids), dtype=torch.float32, device=input_ids.device)
    logprobs, entropy = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return zeros.index_copy(0, index, logprobs), zeros.index_copy(0, index, entropy)


def _project(
    model: DeepseekPolicy, hidden: Tensor, targets: Tensor, temperature: float, *, recompute: bool
) -> tuple[Tensor, Tensor]:
    def logprob_and_entropy(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = (model.lm_head(hidden).float() / temperature).log_softmax(-1)
        with torch.no_grad():
            # Not log_z - E[logits]: where one token is certain, that difference comes out negative.
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(1), entropy

    if recompute and torch.is_grad_enabled():
        result = checkpoint(logprob_and_entropy, hidden, targets, use_reentrant=False)
        assert isinstance(result, tuple)
        return result
    return logprob_and_entropy(hidden, targets)
