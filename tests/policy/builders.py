"""Tiny policies whose weights are large enough to tell right from wrong, and packed inputs for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from policy.packing import layout

VOCAB = 61
TINY = PolicyConfig(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=3,
    n_routed_experts=8,
    num_experts_per_tok=3,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    initializer_range=0.08,
    max_position_embeddings=128,
)


def tiny_policy(config: PolicyConfig = TINY, seed: int = 0) -> DeepseekPolicy:
    """Weights of standard deviation `initializer_range`, norm gains around 1 and router biases around 0, none trivial."""
    model = DeepseekPolicy(config)
    model.reset_parameters(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "norm" in name:
                value.copy_(1 + 0.2 * torch.randn(value.shape, generator=generator))
            elif name.endswith("e_score_correction_bias"):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return model.eval()


def random_sequences(lengths: Sequence[int], seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Token ids, one list per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids [T], position_ids [T] and cu_seqlens [B + 1] of sequences laid end to end."""
    _, position_ids, cu_seqlens = layout(torch.tensor([len(sequence) for sequence in sequences]))
    return torch.tensor([token for sequence in sequences for token in sequence]), position_ids, cu_seqlens


def packed_logits(model: DeepseekPolicy, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits [T, V] of sequences computed in one packed forward pass."""
    return model.lm_head(model(*pack(sequences)).hidden)
