"""Cached decoding with absorbed projections against the full forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy, LatentCache
from tests.policy.builders import TINY, pack, random_sequences, tiny_policy

CASES = {
    "plain": TINY,
    "q_lora_groups": replace(TINY, q_lora_rank=20, n_group=4, topk_group=2),
    "large_weights": replace(TINY, initializer_range=0.25),
}
PROMPTS = (6, 1, 11, 3)
STEPS = 9
CPU = torch.device("cpu")


def prefilled(model: DeepseekPolicy, sequences: list[list[int]], capacity: int) -> LatentCache:
    """The cache after a packed forward pass over the sequences."""
    input_ids, position_ids, cu_seqlens = pack(sequences)
    latents: list[Tensor] = []
    model(input_ids, position_ids, cu_seqlens, latents)
    cache = LatentCache(model.config, len(sequences), capacity, torch.float32, CPU)
    cache.write_prompts(latents, position_ids, cu_seqlens)
    return cache


def hidden_one_by_one(model: DeepseekPolicy, sequences: list[list[int]]) -> list[Tensor]:
    """Hidden states [length, D] of each sequence alone, without a cache."""
    return [model(*pack([sequence])) for sequence in sequences]


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
        got = model.decode(tokens, cache)
        expected = torch.stack([hidden[place] for hidden, place in zip(full, places, strict=True)])
        assert (got - expected).abs().max() < 1e-5


@torch.no_grad()
def test_decoding_from_an_empty_cache_is_the_full_forward() -> None:
    model = tiny_policy()
    (sequence,) = random_sequences([12])
    cache = LatentCache(TINY, 1, 12, torch.float32, CPU)
    got = torch.cat([model.decode(torch.tensor([token]), cache) for token in sequence])
    assert (got - hidden_one_by_one(model, [sequence])[0]).abs().max() < 1e-5


def test_the_cache_holds_the_latent_and_the_rotated_key_only() -> None:
    config = replace(TINY, kv_lora_rank=512, qk_rope_head_dim=64)
    cache = LatentCache(config, 5, 7, torch.bfloat16, CPU)
    tensors = {name: value for name, value in vars(cache).items() if isinstance(value, Tensor)}
    assert tensors.keys() == {"values", "lengths"}
    assert cache.values.shape == (TINY.num_hidden_layers, 5, 7, 512 + 64)
    assert cache.values.element_size() * cache.values.numel() == TINY.num_hidden_layers * 5 * 7 * 576 * 2


@torch.no_grad()
def test_the_cache_holds_what_the_layers_leave() -> None:
    model = tiny_policy()
    sequences = random_sequences(PROMPTS)
    cache = prefilled(model, sequences, 20)
    for row, sequence in enumerate(sequences):
        latents: list[Tensor] = []
        model(*pack([sequence]), latents)
        assert (cache.values[:, row, : len(sequence)] - torch.stack(latents)).abs().max() < 1e-5
        assert cache.values[:, row, len(sequence) :].abs().max() == 0


@torch.no_grad()
def test_kept_sequences_decode_as_before() -> None:
    model = tiny_policy()
    sequences = random_sequences([length + 2 for length in PROMPTS])
    prompts = [s[:length] for s, length in zip(sequences, PROMPTS, strict=True)]
    cache = prefilled(model, prompts, 20)
    first = torch.tensor([s[length] for s, length in zip(sequences, PROMPTS, strict=True)])
    second = torch.tensor([s[length + 1] for s, length in zip(sequences, PROMPTS, strict=True)])
    model.decode(first, cache)
    rows = torch.tensor([3, 0])
    cache.keep(rows)
    assert cache.lengths.tolist() == [PROMPTS[3] + 1, PROMPTS[0] + 1]
    assert cache.values.shape[1] == 2
    got = model.decode(second[rows], cache)
    expected = torch.stack([hidden[-1] for hidden in hidden_one_by_one(model, [sequences[3], sequences[0]])])
    assert (got - expected).abs().max() < 1e-5


@torch.no_grad()
def test_rotation_frequencies_stay_in_fp32_under_half_precision() -> None:
    model = tiny_policy().to(torch.bfloat16)
    (sequence,) = random_sequences([100])
    input_ids, positions, cu_seqlens = pack([sequence])
    latents: list[Tensor] = []
    model(input_ids, positions, cu_seqlens, latents)
    rotated = latents[0][:, TINY.kv_lora_rank :].float()
    attention = model.model.get_submodule("layers.0.self_attn")
    x = model.model.get_submodule("layers.0.input_layernorm")(model.model.embed_tokens(input_ids))
    raw = attention.get_submodule("kv_a_proj_with_mqa")(x)[:, TINY.kv_lora_rank :].double()
    half = torch.arange(0, TINY.qk_rope_head_dim, 2, dtype=torch.float64) / TINY.qk_rope_head_dim
    angles = positions[:, None] / TINY.rope_theta**half
    expected = torch.polar(torch.ones_like(angles), angles) * torch.complex(raw[:, 0::2], raw[:, 1::2])
    # One rounding to bfloat16; frequencies in bfloat16 would turn the last positions by tenths of a radian.
    assert torch.allclose(rotated, torch.cat((expected.real, expected.imag), -1).float(), rtol=2**-8, atol=1e-5)
