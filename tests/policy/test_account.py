"""What a model costs: against published figures, against the modules themselves, and against FLOPs that torch counts."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from policy.account import (
    account_of,
    decoding_flops,
    forward_flops,
)
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from tests.policy.builders import TINY

ROOT = Path(__file__).resolve().parents[2]
SMALL = replace(TINY, v_head_dim=24)
# (total, active, MTP) in billions as published: arXiv 2405.04434 sections 3.1.2 and B, 2412.19437 section 4.2. Of MTP, the
# release says 11.5; the layer's own shapes give 11.6.
PUBLISHED = {
    "deepseek_v2_lite": (15.7, 2.4, 0),
    "deepseek_v2": (236, 21, 0),
    "deepseek_v3": (671, 37, 11.6),
}
# Training FLOPs per token at 4,096 tokens in 1e9: arXiv 2505.09343, table 2.
PUBLISHED_TRAINING = {"deepseek_v2": 155, "deepseek_v3": 250}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False, "num_key_value_heads": 8}
DENSE = {
    "deepseek_67b": LLAMA
    | {"vocab_size": 102400, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 95}
    | {"num_attention_heads": 64},
    "llama_3.1_8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama_3.1_405b": LLAMA
    | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "qwen2.5_1.5b": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen3_0.6b": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    | {"tie_word_embeddings": True},
}


def named(name: str) -> PolicyConfig:
    return PolicyConfig(**tomllib.loads((ROOT / "configs/models" / f"{name}.toml").read_text()))


def dense(name: str):
    pytest.importorskip("transformers")
    from policy.dense_config import DenseConfig

    return DenseConfig.from_hf_dict(DENSE[name])


def counted(config: PolicyConfig) -> tuple[int, int, int]:
    """(total, active, MTP) from the modules' own parameters, built without memory."""
    with torch.device("meta"):
        model = DeepseekPolicy(config)
    ahead = {id(p) for layer in model.mtp_layers for p in layer.parameters()}
    sizes = {name: p.numel() for name, p in model.named_parameters() if id(p) not in ahead}
    total = sum(sizes.values())
    idle = sum(size for name, size in sizes.items() if ".experts." in name) / config.n_routed_experts
    idle *= config.n_routed_experts - config.num_experts_per_tok
    looked_up = 0 if config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
    return total, int(total - idle - looked_up), sum(p.numel() for p in model.parameters()) - total


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_configs_have_the_published_sizes(name: str) -> None:
    account = account_of(named(name))
    total, active, mtp = PUBLISHED[name]
    assert account.parameters.total / 1e9 == pytest.approx(total, rel=0.002)
    assert account.parameters.active / 1e9 == pytest.approx(active, rel=0.025)
    assert account.mtp.total / 1e9 == pytest.approx(mtp, rel=0.002)


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_configs_count_as_the_model_itself_does(name: str) -> None:
    account = account_of(named(name))
    assert (account.parameters.total, account.parameters.active, account.mtp.total) == counted(named(name))


def test_the_active_parameters_of_v3_are_those_that_its_release_counts() -> None:
    # README_WEIGHTS.md of the release: 36.6B active, 0.9B of them in the head.
    parameters = account_of(named("deepseek_v3")).parameters
    assert round(parameters.active / 1e9, 1) == 36.6
    assert round(parameters.head / 1e9, 1) == 0.9


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    q_lora_rank=st.sampled_from([None, 20]),
    first_k_dense_replace=st.integers(0, 5),
    n_shared_experts=st.integers(1, 2),
    num_nextn_predict_layers=st.integers(0, 2),
    tie_word_embeddings=st.booleans(),
    v_head_dim=st.sampled_from([8, 24]),
    num_experts_per_tok=st.integers(1, 8),
)
def test_every_shape_counts_as_the_model_itself_does(**changes) -> None:
    config = replace(SMALL, **changes)
    account = account_of(config)
    assert (account.parameters.total, account.parameters.active, account.mtp.total) == counted(config)
    assert account.parameters.matrices + account.parameters.vectors == account.parameters.active


@pytest.mark.parametrize(
    ("name", "billions"), [("deepseek_67b", 67.4), ("llama_3.1_8b", 8.03), ("qwen2.5_1.5b", 1.54), ("qwen3_0.6b", 0.6)]
)
def test_dense_models_have_the_published_sizes(name: str, billions: float) -> None:
    parameters = account_of(dense(name)).parameters
    assert parameters.total / 1e9 == pytest.approx(billions, rel=0.007)
    tied = DENSE[name]["tie_word_embeddings"]
    assert parameters.total - parameters.active == (0 if tied else parameters.embedding)
    assert (parameters.head == 0) == tied


def test_a_dense_model_is_taken_apart_by_role() -> None:
    # Qwen2.5-1.5B by hand; its card says 1.31B without embedding.
    parameters = account_of(dense("qwen2.5_1.5b")).parameters
    layers, hidden, kv = 28, 1536, 2 * 128
    assert parameters.embedding == 151936 * hidden
    assert parameters.attention == layers * (2 * hidden * hidden + 2 * hidden * kv)
    assert parameters.dense_mlp == layers * 3 * hidden * 8960
    assert parameters.vectors == layers * (2 * hidden + hidden + 2 * kv) + hidden  # norms and the biases of q, k, v
    assert round((parameters.total - parameters.embedding) / 1e9, 2) == 1.31


# The decoding cache.


def test_the_cache_is_the_one_that_decoding_allocates() -> None:
    model = DeepseekPolicy(SMALL)
    small, large = (
        model.new_cache(1, capacity, torch.float32, torch.device("cpu")).values.numel() for capacity in (4, 5)
    )
    assert account_of(SMALL).cached_values == large - small == 3 * (24 + 8)


def test_v2_keeps_56_9_times_less_than_multi_head_attention() -> None:
    account = account_of(named("deepseek_v2"))
    assert (account.attention.cached_values, account.attention.multi_head_values) == (576, 32768)
    assert round(account.multi_head_values / account.cached_values, 1) == 56.9


def test_93_3_percent_is_6_bits_of_v2_against_16_bits_of_the_67b_model() -> None:
    latent, grouped = account_of(named("deepseek_v2")), account_of(dense("deepseek_67b"))
    assert (latent.cached_values, grouped.cached_values) == (34_560, 194_560)
    assert round(1 - latent.cached_values / grouped.cached_values, 3) == 0.822
    assert round(1 - 6 * latent.cached_values / (16 * grouped.cached_values), 3) == 0.933


def test_caches_are_the_published_ones() -> None:
    # Bytes per token in bf16: arXiv 2505.09343, table 1.
    assert 2 * account_of(named("deepseek_v3")).cached_values == 70_272
    llama = account_of(dense("llama_3.1_405b"))
    assert 2 * llama.cached_values == 516_096
    assert llama.multi_head_values == 16 * llama.cached_values


# FLOPs.


@pytest.mark.parametrize("name", PUBLISHED_TRAINING)
def test_training_flops_are_the_published_ones(name: str) -> None:
    flops = 3 * forward_flops(account_of(named(name)), 4096)
    assert flops / 1e9 == pytest.approx(PUBLISHED_TRAINING[name], rel=0.003)


# Layers without experts: torch's counter knows no grouped products.
COUNTABLE = (replace(SMALL, first_k_dense_replace=3), replace(SMALL, first_k_dense_replace=3, q_lora_rank=20))


@torch.no_grad()
@pytest.mark.parametrize("config", COUNTABLE)
def test_forward_flops_are_those_that_torch_counts(config: PolicyConfig) -> None:
    model, account, length = DeepseekPolicy(config), account_of(config), 32
    places = torch.arange(length)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.lm_head(model(places, places, torch.tensor([0, length])).hidden)
    # The plain kernel multiplies with all keys, masked or not: as many as the last token sees, for every token.
    masked = 2 * 3 * 3 * (24 + 24) * sum(length - seen for seen in range(1, length + 1))
    assert length * forward_flops(account, length) == counter.get_total_flops() - masked


@torch.no_grad()
@pytest.mark.parametrize("config", COUNTABLE)
def test_decoding_flops_are_those_that_torch_counts(config: PolicyConfig) -> None:
    model, account, length = DeepseekPolicy(config), account_of(config), 32
    places = torch.arange(length)
    cache = model.new_cache(1, 40, torch.float32, torch.device("cpu"))
    model.prefill(places, places, torch.tensor([0, length]), cache)
    with FlopCounterMode(display=False) as counter:
        model.lm_head(model.decode(torch.tensor([[3]]), cache))
    assert decoding_flops(account, length + 1) == counter.get_total_flops()


def test_experts_that_a_token_skips_cost_no_flops() -> None:
    one, three = (forward_flops(account_of(replace(SMALL, num_experts_per_tok=k)), 16) for k in (1, 3))
    more = forward_flops(account_of(replace(SMALL, n_routed_experts=16)), 16)
    expert, moe_layers = 3 * 48 * 16, 2
    assert three - one == 2 * 2 * expert * moe_layers
    assert more - three == 2 * 8 * 48 * moe_layers  # their scores in the router
