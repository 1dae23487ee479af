"""Each preset on a bandit with a known optimum: it gets there, on and off policy, and stands still where nothing differs.

A prompt is one of a few contexts, a completion one or two tokens, each drawn from a softmax over the arms of its
context and place. The reward is the share of tokens that are the best arm of their place, so the optimum is to draw
those with certainty. Only the optimizer (Adam, with its own rate) is the test's; the algorithm is the preset's.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from grpo.algorithm_config import AlgorithmConfig
from grpo.batch import Batch, split_minibatches, with_weights
from grpo.objective import advantages_for, penalised_rewards, policy_loss
from policy.packing import layout
from tests.grpo.preset_configs import PRESETS, load_preset

NUM_CONTEXTS, NUM_PLACES, NUM_ARMS = 3, 2, 4
NUM_PROMPTS, GROUP_SIZE = 24, 8
CONTEXTS = (torch.arange(NUM_PROMPTS) % NUM_CONTEXTS).repeat_interleave(GROUP_SIZE)
LENGTHS = 1 + CONTEXTS % 2
BEST = torch.tensor([[1, 0], [3, 2], [0, 0]])
"""Best arm by context and place."""
PLACES = torch.tensor([[True, False], [True, True], [True, False]])
"""Which places a context's completions have."""


def first_logits() -> Tensor:
    """[contexts, places, arms], all arms as likely."""
    return torch.zeros(NUM_CONTEXTS, NUM_PLACES, NUM_ARMS, dtype=torch.float64)


def token_logprobs(logits: Tensor, batch: Batch) -> Tensor:
    """log pi of every token [T]; 0 on prompts. A prompt's token is its context, a completion's the arm."""
    contexts = batch.input_ids[batch.cu_seqlens.long()[batch.sequence_ids]]
    places = (batch.position_ids - 1).clamp(min=0)
    of_tokens = logits.log_softmax(-1)[contexts, places].gather(-1, batch.input_ids[:, None]).squeeze(-1)
    return torch.where(batch.completion_mask, of_tokens, 0.0)


def sample(logits: Tensor, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """A step's samples, advantages still 0, and their rewards [prompts, group]."""
    drawn = torch.multinomial(logits.softmax(-1)[CONTEXTS].flatten(0, 1), 1, generator=generator)
    arms = drawn.reshape(-1, NUM_PLACES)
    exists = torch.arange(NUM_PLACES) < LENGTHS[:, None]
    right = (arms == BEST[CONTEXTS]) & exists
    rewards = (right.sum(1) / LENGTHS).double().reshape(NUM_PROMPTS, GROUP_SIZE)
    sequence_ids, position_ids, cu_seqlens = layout(1 + LENGTHS)
    tokens = torch.cat([CONTEXTS[:, None], arms], dim=1)
    nothing = torch.zeros(len(sequence_ids), dtype=torch.float64)
    batch = Batch(
        input_ids=tokens[sequence_ids, position_ids],
        position_ids=position_ids,
        sequence_ids=sequence_ids,
        cu_seqlens=cu_seqlens,
        completion_mask=position_ids > 0,
        rollout_logprobs=nothing,
        advantages=nothing,
        sequence_index=torch.arange(len(CONTEXTS)),
    )
    return dataclasses.replace(batch, rollout_logprobs=token_logprobs(logits, batch)), rewards


def with_advantages(batch: Batch, rewards: Tensor, algorithm: AlgorithmConfig) -> Batch:
    """The batch as a run prepares it: old and reference log-probabilities, and advantages by the preset."""
    ref = token_logprobs(first_logits(), batch)
    old = batch.rollout_logprobs
    if algorithm.kl_coef and algorithm.kl_placement == "reward":
        where = (batch.completion_mask, batch.sequence_ids, algorithm)
        rewards = penalised_rewards(rewards.flatten(), old, ref, *where).reshape(rewards.shape)
    advantages = advantages_for(rewards, None, algorithm).flatten()
    return dataclasses.replace(
        batch,
        advantages=advantages[batch.sequence_ids],
        old_logprobs=old,
        ref_logprobs=ref if algorithm.kl_coef else None,
    )


def weighted(batch: Batch, algorithm: AlgorithmConfig) -> Batch:
    return with_weights(batch, aggregation=algorithm.aggregation, constant_length=algorithm.constant_length)


def learn(algorithm: AlgorithmConfig, *, num_steps: int, num_minibatches: int, rewarded: bool = True) -> Tensor:
    """The logits after training; without `rewarded` every reward is 1."""
    generator = torch.Generator().manual_seed(0)
    logits = first_logits().requires_grad_()
    # Adam, since a preset's aggregation scales the gradient by up to 1/3000; its eps is far below that.
    optimizer = torch.optim.Adam([logits], lr=0.1, eps=1e-12)
    for step in range(num_steps):
        batch, rewards = sample(logits.detach(), generator)
        batch = with_advantages(batch, rewards if rewarded else torch.ones_like(rewards), algorithm)
        for part in split_minibatches(batch, num_minibatches, seed=step):
            optimizer.zero_grad()
            loss, _ = policy_loss(algorithm, token_logprobs(logits, part), batch=weighted(part, algorithm))
            loss.backward()
            optimizer.step()
    return logits.detach()


@pytest.mark.parametrize("num_minibatches", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_converges_to_the_best_arms(preset: str, num_minibatches: int) -> None:
    logits = learn(load_preset(preset).algorithm, num_steps=60 // num_minibatches, num_minibatches=num_minibatches)
    best = logits.softmax(-1).gather(-1, BEST[..., None]).squeeze(-1)
    assert best[PLACES].min() > 0.9
    assert torch.equal(logits[~PLACES], first_logits()[~PLACES])  # what is never drawn is never touched


@pytest.mark.parametrize("preset", PRESETS)
def test_stands_still_where_all_rewards_are_equal(preset: str) -> None:
    logits = learn(load_preset(preset).algorithm, num_steps=5, num_minibatches=4, rewarded=False)
    assert torch.equal(logits, first_logits())


@pytest.mark.parametrize("preset", PRESETS)
def test_first_gradient_is_reinforce(preset: str) -> None:
    """On policy, at the reference: that of -sum(weight * A * log pi), and along the gradient of the expected reward."""
    algorithm = load_preset(preset).algorithm
    batch, rewards = sample(first_logits(), torch.Generator().manual_seed(1))
    batch = weighted(with_advantages(batch, rewards, algorithm), algorithm)

    logits = first_logits().requires_grad_()
    policy_loss(algorithm, token_logprobs(logits, batch), batch=batch)[0].backward()
    assert logits.grad is not None

    reinforced = first_logits().requires_grad_()
    assert batch.weights is not None
    (-batch.weights * batch.advantages * token_logprobs(reinforced, batch)).sum().backward()
    assert reinforced.grad is not None
    torch.testing.assert_close(logits.grad, reinforced.grad, rtol=1e-12, atol=1e-15)

    exact = first_logits().requires_grad_()
    chances = exact.softmax(-1).gather(-1, BEST[..., None]).squeeze(-1)
    of_context = (chances * PLACES).sum(1) / PLACES.sum(1)
    of_context.mean().backward()
    assert exact.grad is not None
    assert torch.cosine_similarity(-logits.grad.flatten(), exact.grad.flatten(), dim=0) > 0.8
