"""Drafts by multi-token prediction change the speed alone; routed experts come back as they were used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from policy.deepseek import DeepseekPolicy
from policy.logprobs import token_logprobs
from rollout.engine import Completion, SamplingParams
from rollout.torch_engine import TorchEngine
from tests.policy.builders import TINY, VOCAB, pack, random_sequences, tiny_policy

DEEP = replace(TINY, num_nextn_predict_layers=3, max_position_embeddings=256)
PROMPTS = [*random_sequences([5, 1, 9], seed=4), *random_sequences([5], seed=4)]
SEEDS = [11, 12, 13, 14]


def trained_to_look_ahead() -> DeepseekPolicy:
    """A policy whose sequences are easy to foresee: it counts upwards, and its extra layers have learnt that."""
    torch.manual_seed(0)
    model = tiny_policy(replace(DEEP, initializer_range=0.05)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        starts = torch.randint(VOCAB, (24,), generator=generator).tolist()
        said = token_logprobs(model, *pack([[(s + i) % VOCAB for i in range(16)] for s in starts]), mtp=True)
        loss = -said.logprobs.mean() - sum(logprobs.mean() for logprobs in said.mtp_logprobs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def foreseeing() -> DeepseekPolicy:
    return trained_to_look_ahead()


def completions(model: DeepseekPolicy, num_draft_tokens: int, **params: object) -> list[Completion]:
    engine = TorchEngine(model, num_draft_tokens=num_draft_tokens)
    sampling = SamplingParams(**{"max_completion_tokens": 40, "stop_token_ids": (7,), **params})
    return engine.generate(PROMPTS, sampling, SEEDS)


def same(ours: list[Completion], theirs: list[Completion]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids
        assert a.finish_reason == b.finish_reason
        assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 1e-4


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"stop_token_ids": ()}]
)
def test_drafts_change_no_token(foreseeing: DeepseekPolicy, depth: int, params: dict[str, object]) -> None:
    plain, drafted = completions(foreseeing, 0, **params), completions(foreseeing, depth, **params)
    same(drafted, plain)
    assert all(c.num_draft_tokens == 0 for c in plain)


@pytest.mark.parametrize("depth", [1, 3])
def test_drafts_of_an_untrained_layer_are_wrong_and_change_no_token_either(depth: int) -> None:
    model = tiny_policy(DEEP)
    drafted = completions(model, depth)
    same(drafted, completions(model, 0))
    assert sum(c.num_accepted_tokens for c in drafted) < 0.5 * sum(c.num_draft_tokens for c in drafted)


def test_what_can_be_foreseen_is_accepted(foreseeing: DeepseekPolicy) -> None:
    drafted = completions(foreseeing, 2, temperature=0.0, stop_token_ids=())
    proposed, accepted = (sum(getattr(c, f"num_{n}_tokens") for c in drafted) for n in ("draft", "accepted"))
    assert accepted > 0.8 * proposed
    # 40 tokens in rounds of up to three: a round that decodes one token drafts two.
    assert all(c.num_draft_tokens < 2 * 40 / 2 for c in drafted)
    assert all(len(c.token_ids) == 40 for c in drafted)


def test_the_limit_and_the_stop_hold_within_a_round_of_accepted_drafts(foreseeing: DeepseekPolicy) -> None:
    for limit in range(1, 9):
        drafted = completions(foreseeing, 3, temperature=0.0, max_completion_tokens=limit)
        same(drafted, completions(foreseeing, 0, temperature=0.0, max_completion_tokens=limit))
        assert all(len(c.token_ids) <= limit for c in drafted)
        assert all(7 not in c.token_ids[:-1] for c in drafted)


def test_drafts_are_refused_without_layers_that_make_them() -> None:
    with pytest.raises(ValueError, match="num_draft_tokens=4, but the policy of engine-0 has 3 layers"):
        TorchEngine(tiny_policy(DEEP), num_draft_tokens=4)
    with pytest.raises(ValueError, match="has 0 layers of multi-token prediction"):
        TorchEngine(tiny_policy(), num_draft_tokens=1)


@pytest.mark.parametrize("depth", [0, 2])
def test_routed_experts_are_those_of_the_full_forward(depth: int) -> None:
    model = tiny_policy(DEEP)
    engine = TorchEngine(model, num_draft_tokens=depth, return_routed_experts=True)
    params = SamplingParams(max_completion_tokens=30, stop_token_ids=(7,))
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, params, SEEDS), strict=True):
        ids = [*prompt, *completion.token_ids]
        with torch.no_grad():
            full = model(*pack([ids]), return_routed_experts=True).routed_experts
        routed = completion.routed_experts
        assert routed is not None
        assert routed.shape == (len(ids), DEEP.num_moe_layers, DEEP.num_experts_per_tok)
        assert (routed[-1] == -1).all()
        assert (torch.from_numpy(routed[:-1]).long().sort(-1).values == full[:-1].sort(-1).values).all()


def test_replaying_an_engines_choices_in_bfloat16_closes_the_gap() -> None:
    """Engine and learner compute the same tokens along other paths; in bf16 their routers part ways, unless replayed."""
    config = replace(TINY, initializer_range=0.15, n_routed_experts=16, num_hidden_layers=5)
    model = tiny_policy(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    engine = TorchEngine(model, dtype="bfloat16", return_routed_experts=True)
    prompts = random_sequences([8] * 24, seed=5)
    sampled = engine.generate(prompts, SamplingParams(max_completion_tokens=40), list(range(24)))
    gaps: dict[bool, list[float]] = {False: [], True: []}
    for prompt, completion in zip(prompts, sampled, strict=True):
        packed = pack([[*prompt, *completion.token_ids]])
        for replay in gaps:
            routed = torch.from_numpy(completion.routed_experts).long() if replay else None
            with torch.no_grad():
                own = token_logprobs(model, *packed, routed_experts=routed).logprobs[len(prompt) :]
            gaps[replay] += (own - torch.tensor(completion.logprobs)).abs().tolist()
    assert max(gaps[True]) < 0.6 * max(gaps[False])
    assert sum(gaps[True]) < 0.7 * sum(gaps[False])
