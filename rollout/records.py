"""The records that travel from a dataset row to a gradient: plain Python and NumPy, frozen, no tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from verifiers.verdict import Verdict

FinishReason = Literal["stop", "length"]


class SamplingMask(NamedTuple):
    """The token ids that top-k and top-p kept at each of C completion tokens, the sampled id always among them.

    Those of completion token i are `token_ids[offsets[i] : offsets[i + 1]]`, ascending; `offsets` is int64 [C + 1],
    `token_ids` int32 [n]. An empty span means that nothing was cut off.
    """

    offsets: np.ndarray
    token_ids: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question with what its verifier needs; `prompt` is text or a list of chat messages."""

    task_id: str
    prompt: str | Sequence[Mapping[str, str]]
    answer: Any
    verifier: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sampled completion; `verdict` and `advantage` are filled once each, by `dataclasses.replace`.

    `completion_ids` are as sampled, end-of-sequence kept; `rollout_logprobs` [len(completion_ids)] are natural-log
    probabilities after temperature, top-k and top-p, from the engine that sampled them; `policy_versions` are the weights'
    versions at the first and at the last token; `routed_experts` [prompt + completion tokens, MoE layers, top-k] are the
    engine's choices, -1 where a token was not forwarded; `sampling_mask` is what top-k and top-p kept.
    """

    task_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logprobs: np.ndarray
    policy_versions: tuple[int, int]
    finish_reason: FinishReason
    completion_text: str
    routed_experts: np.ndarray | None = None
    sampling_mask: SamplingMask | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    verdict: Verdict | None = None
    advantage: float | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """All samples of one task from one step; advantages are relative to it."""

    task: Task
    samples: tuple[Sample, ...]


def seed_for(seed: int, step: int, task_id: str, sample_index: int) -> int:
    """A 31-bit sampling seed from content alone, so that sharding and resuming can't change it."""
    text = f"{seed}\0{step}\0{task_id}\0{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") & 0x7FFFFFFF
