"""Drafts by multi-token prediction change the speed alone; routed experts come back as they were used."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from policy.deepseek import DeepseekPolicy
from policy.logprobs import SamplingMask, token_logprobs
from rollout.engine import Completion, SamplingParams
from rollout.torch_engine import TorchEngine
from tests.policy.builders import TINY, VOCAB, pack, packed_logits, random_sequences, tiny_policy

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


def spans(completion: Completion) -> list[list[int]]:
    """What was kept at each token."""
    assert completion.sampling_mask is not None
    offsets, token_ids = completion.sampling_mask
    assert (offsets.dtype, token_ids.dtype) == (np.int64, np.int32)
    assert (offsets[0], offsets[-1], len(offsets)) == (0, len(token_ids), len(completion.token_ids) + 1)
    return [token_ids[start:end].tolist() for start, end in pairwise(offsets)]


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


CUTS = [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 7, "top_p": 0.9, "temperature": 1.3}]


@pytest.mark.parametrize(("depth", "cut"), list(zip([1, 2, 3], CUTS, strict=True)))
def test_drafts_change_nothing_that_is_kept(foreseeing: DeepseekPolicy, depth: int, cut: dict[str, object]) -> None:
    plain, drafted = (completions(foreseeing, n, return_sampling_mask=True, **cut) for n in (0, depth))
    same(drafted, plain)
    assert [spans(c) for c in drafted] == [spans(c) for c in plain]
    assert sum(c.num_accepted_tokens for c in drafted) > 0


@pytest.mark.parametrize("cut", CUTS)
def test_the_policy_cut_to_what_was_kept_has_the_engines_probabilities(cut: dict[str, object]) -> None:
    model = tiny_policy(DEEP)
    params = SamplingParams(max_completion_tokens=40, return_sampling_mask=True, stop_token_ids=(7,), **cut)  # type: ignore[arg-type]
    sampled = TorchEngine(model, max_num_seqs=3).generate(PROMPTS, params, SEEDS)
    with_mask, without = [], []
    for prompt, completion in zip(PROMPTS, sampled, strict=True):
        kept = [[]] * len(prompt) + spans(completion)
        offsets = torch.tensor([0, *map(len, kept)]).cumsum(0)
        mask = SamplingMask(offsets, torch.tensor([token for ids in kept for token in ids]))
        for gaps, sampling_mask in ((with_mask, mask), (without, None)):
            with torch.no_grad():
                packed = pack([[*prompt, *completion.token_ids]])
                own = token_logprobs(model, *packed, temperature=params.temperature, sampling_mask=sampling_mask)
            gaps += (own.logprobs[len(prompt) :] - torch.tensor(completion.logprobs)).abs().tolist()
    assert max(with_mask) < 1e-5
    assert sum(without) / len(without) > 0.1


def test_what_is_kept_are_the_likeliest_of_the_full_forward() -> None:
    model = tiny_policy(DEEP)
    params = SamplingParams(max_completion_tokens=20, top_k=6, top_p=0.7, temperature=0.9, return_sampling_mask=True)
    for prompt, completion in zip(PROMPTS, TorchEngine(model).generate(PROMPTS, params, SEEDS), strict=True):
        with torch.no_grad():
            logits = packed_logits(model, [[*prompt, *completion.token_ids]])[len(prompt) - 1 : -1] / 0.9
        for row, token, kept in zip(logits, completion.token_ids, spans(completion), strict=True):
            probabilities, order = row.softmax(-1).sort(descending=True)
            among = probabilities[:6] / probabilities[:6].sum()
            assert kept == sorted(order[: int((among.cumsum(0) < 0.7).sum()) + 1].tolist())
            assert token in kept


@pytest.mark.parametrize("params", [{"temperature": 0.0, "top_k": 3}, {"temperature": 1.0}])
def test_where_nothing_is_cut_off_every_span_is_empty(params: dict[str, object]) -> None:
    model = tiny_policy(DEEP)
    for completion in completions(model, 0, return_sampling_mask=True, **params):
        assert spans(completion) == [[]] * len(completion.token_ids)
    assert all(c.sampling_mask is None for c in completions(model, 0, top_k=3))


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
