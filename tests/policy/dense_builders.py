"""Tiny dense models with weights large enough to tell right from wrong, as transformers writes them to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from policy.dense import DensePolicy
from policy.dense_config import DenseConfig

VOCAB = 96
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# vLLM on the CPU has attention kernels for heads of 32 values and more.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {**_SHAPE, "model_type": "qwen2", "hidden_size": 128, "tie_word_embeddings": True},
    "qwen2_untied": {**_SHAPE, "model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": {**_SHAPE, "model_type": "qwen3", "head_dim": 32},
    "qwen3_tied": {**_SHAPE, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "llama": {**_SHAPE, "model_type": "llama", "head_dim": 32, "rope_parameters": _LLAMA3},
    "mistral_window": {**_SHAPE, "model_type": "mistral", "head_dim": 32, "sliding_window": 6},
}


def dense_policy(name: str, seed: int = 0) -> DensePolicy:
    """A policy of one of SHAPES: norm gains around 1 and biases around 0, none trivial."""
    model = DensePolicy(DenseConfig.of_shape(SHAPES[name]))
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: DensePolicy, seed: int) -> None:
    """Weights from a seed."""
    model.reset_parameters(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def reference(name: str, folder: Path, seed: int = 0) -> Any:
    """transformers' own model with the weights of `dense_policy(name, seed)`, which it has saved to `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]), attn_implementation="eager")
    model.load_state_dict(dense_policy(name, seed).state_dict())
    model.save_pretrained(folder)
    return model.eval()
