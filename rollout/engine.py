"""The two methods every engine has, and the records they take and return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rollout.records import FinishReason, SamplingMask

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample: temperature 0 is greedy; a completion ends at a stop token (kept) or after max_completion_tokens.

    Of the distribution at `temperature`, the `top_k` likeliest tokens stay (0: all), and of these, renormalised, the
    fewest likeliest whose probability reaches `top_p`. `return_sampling_mask` leaves each completion with these tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    return_sampling_mask: bool = False

    @property
    def cuts_off(self) -> bool:
        """Whether top-k or top-p may take tokens away; what is greedy takes the likeliest and reports all."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled continuation: ids as sampled, one log-probability (natural log) per id, and the weights' version.

    `routed_experts` [prompt + completion tokens, MoE layers, top-k] is -1 where a token was not forwarded;
    `sampling_mask` has one span per id.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    policy_version: int
    routed_experts: np.ndarray | None = None
    sampling_mask: SamplingMask | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class Engine(Protocol):
    """Samples completions with some version of the policy's weights."""

    name: str
    policy_version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order; a group is one prompt repeated with other seeds."""
        ...

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights (Hugging Face names, one entry per expert) and take `version`."""
        ...

    def close(self) -> None:
        """Free the engine's processes and memory."""
        ...
