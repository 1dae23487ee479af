"""Tiny learners, and batches for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.batch import Batch, build_batch
from grpo.config import AlgorithmConfig, LearnerConfig
from grpo.learner import Learner
from policy.deepseek import DeepseekPolicy
from policy.logprobs import token_logprobs
from rollout.records import Sample
from tests.policy.builders import TINY, pack, random_sequences, tiny_policy

SMALL = dataclasses.replace(TINY, num_hidden_layers=2)
PROMPTS, COMPLETIONS = (3, 6, 2, 4, 5, 1), (5, 2, 9, 7, 1, 4)
ADVANTAGES = (1.0, -0.5, 0.7, -1.3, 0.4, 2.0)
TEMPERATURE = 0.9
NO_CLIPPING = 1e9


def make_samples(model: DeepseekPolicy, seed: int = 0) -> list[Sample]:
    """Random prompts and completions, with the model's own log-probabilities of these."""
    sequences = random_sequences([p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], seed)
    samples = []
    for index, (sequence, prompt) in enumerate(zip(sequences, PROMPTS, strict=True)):
        with torch.no_grad():
            logprobs, *_ = token_logprobs(model, *pack([sequence]), temperature=TEMPERATURE)
        samples.append(
            Sample(
                task_id=f"toy/{index}",
                sample_index=0,
                prompt_ids=tuple(sequence[:prompt]),
                completion_ids=tuple(sequence[prompt:]),
                rollout_logprobs=logprobs[prompt:].numpy(),
                policy_versions=(0, 0),
                finish_reason="stop",
                completion_text="",
            )
        )
    return samples


def make_batch(model: DeepseekPolicy, advantages: Sequence[float] = ADVANTAGES, seed: int = 0) -> Batch:
    return build_batch(make_samples(model, seed), advantages)


def make_learner(
    folder: Path,
    model: DeepseekPolicy | None = None,
    *,
    kl_coef: float = 0.0,
    aggregation: Any = "token_mean",
    algorithm: Mapping[str, Any] | None = None,
    **learner: Any,
) -> Learner:
    """A learner of `tiny_policy(SMALL)` unless another model is given; `learner` are fields of LearnerConfig."""
    return Learner(
        model or tiny_policy(SMALL),
        LearnerConfig(**({"lr": 1e-3} | learner)),
        AlgorithmConfig(**({"kl_coef": kl_coef, "aggregation": aggregation} | dict(algorithm or {}))),
        temperature=TEMPERATURE,
        seed=3,
        bad_batch_path=folder / "bad" / "batch.pt",
    )


def weights_of(learner: Learner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learner.model.named_parameters()}


def largest_move(learner: Learner, before: dict[str, Tensor]) -> float:
    return max(float((value.detach() - before[name]).abs().max()) for name, value in learner.model.named_parameters())
