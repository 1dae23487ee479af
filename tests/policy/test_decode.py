"""Cached decoding with absorbed projections against the full forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from policy.config import PolicyConfig, YarnScaling
from policy.deepseek import DeepseekPolicy, LatentCache
from tests.policy.builders import TINY, pack, random_sequences, tiny_policy

CASES = {
    "plain": TINY,
    "q_lora_groups": replace(TINY, q_lora_rank=20, n_group=4, topk_group=2),
    "large_weights": replace(TINY, initializer_range=0.25),
    "yarn": replace(TINY, rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=8, mscale_all_dim=0.7)),
    "v2": replace(TINY, topk_method="group_limited_greedy", n_group=2, topk_group=1, norm_topk_prob=False),
}
PROMPTS = (6, 1, 11, 3)
STEPS = 9
CPU = torch.device("cpu")


def prefilled(model: DeepseekPolicy, sequences: list[list[int]], capacity: int) -> LatentCache:
    """The cache after a packed forward pass over the sequences."""
    input_ids, position_ids, cu_seqlens = pack(sequences)
    cache = model.new_cache(len(sequences), capacity, torch.float32, CPU)
    model.prefill(input_ids, position_ids, cu_seqlens, cache)
    return cache


def decoded(model: DeepseekPolicy, tokens: Tensor, cache: LatentCache) -> Tensor:
    """Hidden states [B, n, D] of tokens [B, n], which the cache keeps."""
    hidden = model.decode(tokens, cache)
    cache.lengths = cache.lengths + tokens.shape[1]
    return hidden


def hidden_one_by_one(model: DeepseekPolicy, sequences: list[list[int]]) -> list[Tensor]:
    """Hidden states [length, D] of each sequence alone, without a cache."""
    return [model(*pack([sequence])).hidden for sequence in sequences]


@torch.no_grad()
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_decoding_is_the_full_forward(config: PolicyConfig) -> None:
    model = tiny_policy(config)
    sequences = random_sequences([length + STEPS for length in PROMPTS])
    full = hidden_one_by_one(model, sequences)
    cache = prefilled(model, [s[:length] for s, length in zip(sequences, PROMPTS, strict=True)], max(PROMPTS) + STEPS)
    for step in range(STEPS):
        places = [length + step for length in PROMPTS]
        assert cache.lengths.tolist() == places
        tokens = torch.tensor([s[place] for s, place in zip(sequences, places, strict=True)])
        got = decoded(model, tokens[:, None], cache)[:, 0]
        expected = torch.stack([hidden[place] for hidden, place in zip(full, places, strict=True)])
        assert (got - expected).abs().max() < 1e-5


@torch.no_grad()
def test_decoding_from_an_empty_cache_is_the_full_forward() -> None:
    model = tiny_policy()
    (sequence,) = random_sequences([12])
    cache = model.new_cache(1, 12, torch.float32, CPU)
    got = torch.cat([decoded(model, torch.tensor([[token]]), cache)[0] for token in sequence])
    assert (got - hidden_one_by_one(model, [sequence])[0]).abs().max() < 1e-5


def test_the_cache_holds_the_latent_and_the_rotated_key_only() -> None:
    config = replace(TINY, kv_lora_rank=512, qk_rope_head_dim=64)
    cache = DeepseekPolicy(config).new_cache(5, 7, torch.bfloat16, CPU)
    tensors = {name: value for name, value in vars(cache).items() if isinstance(value, Tensor)}
    assert tensors.keys() == {"values", "lengths"}
    assert cache.values.shape == (TINY.num_hidden_layers, 5, 7 + 1, 512 + 64)
    assert cache.values.element_size() * cache.values.numel() == TINY.num_hidden_layers * 5 * 8 * 576 * 2


@torch.no_grad()
def test_several_tokens_at_once_decode_like_one_after_the_other() -> None:
    model = tiny_policy(CASES["q_lora_groups"])
    sequences = random_sequences([length + 4 for length in PROMPTS])
    cache = prefilled(model, [s[:length] for s, length in zip(sequences, PROMPTS, strict=True)], 20)
    ahead = torch.tensor([s[length:] for s, length in zip(sequences, PROMPTS, strict=True)])
    got = torch.cat((decoded(model, ahead[:, :3], cache), decoded(model, ahead[:, 3:], cache)), 1)
    expected = torch.stack([hidden[-4:] for hidden in hidden_one_by_one(model, sequences)])
    assert (got - expected).abs().max() < 1e-5


@torch.no_grad()
def test_what_lies_behind_the_length_is_written_over() -> None:
    model = tiny_policy()
    sequences = random_sequences([length + 2 for length in PROMPTS])
    cache = prefilled(model, [s[:length] for s, length in zip(sequences, PROMPTS, strict=True)], 20)
    model.decode(torch.tensor([[1, 2, 3]] * len(PROMPTS)), cache)  # drafts that were all wrong
    ahead = torch.tensor([s[length:] for s, length in zip(sequences, PROMPTS, strict=True)])
    got = torch.cat((decoded(model, ahead[:, :1], cache), decoded(model, ahead[:, 1:], cache)), 1)
    expected = torch.stack([hidden[-2:] for hidden in hidden_one_by_one(model, sequences)])
    assert (got - expected).abs().max() < 1e-5


@torch.no_grad()
def test_selected_sequences_decode_as_before() -> None:
    model = tiny_policy()
    sequences = random_sequences([length + 2 for length in PROMPTS])
    prompts = [s[:length] for s, length in zip(sequences, PROMPTS, strict=True)]
    cache = prefilled(model, prompts, 20)
    ahead = torch.tensor([s[length:] for s, length in zip(sequences, PROMPTS, strict=True)])
    decoded(model, ahead[:, :1], cache)
    rows = torch.tensor([3, 0, 3])
    cache = cache.select(rows, 13)
    assert cache.lengths.tolist() == [PROMPTS[row] + 1 for row in rows]
    assert (cache.values.shape[1], cache.capacity) == (3, 13)
    got = decoded(model, ahead[rows, 1:], cache)[:, 0]
    expected = torch.stack([hidden_one_by_one(model, [sequences[row]])[0][-1] for row in rows])
    assert (got - expected).abs().max() < 1e-5


@torch.no_grad()
def test_rotation_frequencies_stay_in_fp32_under_half_precision() -> None:
    model = tiny_policy().to(torch.bfloat16)
    (sequence,) = random_sequences([100])
    input_ids, positions, _ = pack([sequence])
    cache = prefilled(model, [sequence], 100)
    rotated = cache.values[0, 0, :100, TINY.kv_lora_rank :].float()
    attention = model.model.get_submodule("layers.0.self_attn")
    x = model.model.get_submodule("layers.0.input_layernorm")(model.model.embed_tokens(input_ids))
    raw = attention.get_submodule("kv_a_proj_with_mqa")(x)[:, TINY.kv_lora_rank :].double()
    half = torch.arange(0, TINY.qk_rope_head_dim, 2, dtype=torch.float64) / TINY.qk_rope_head_dim
    angles = positions[:, None] / TINY.rope_theta**half
    expected = torch.polar(torch.ones_like(angles), angles) * torch.complex(raw[:, 0::2], raw[:, 1::2])
    # One rounding to bfloat16; frequencies in bfloat16 would turn the last positions by tenths of a radian.
    assert torch.allclose(rotated, torch.cat((expected.real, expected.imag), -1).float(), rtol=2**-8, atol=1e-5)


@torch.no_grad()
def test_both_ways_to_attend_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_policy(CASES["large_weights"])
    packed = pack(random_sequences(PROMPTS))
    by_products = model(*packed).hidden
    monkeypatch.setattr("policy.deepseek.SHORT_SEQUENCE", 0)
    assert (model(*packed).hidden - by_products).abs().max() < 1e-5
