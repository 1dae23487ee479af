"""The policy's weights under the released checkpoints' names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy

ROUTER_BIAS = "e_score_correction_bias"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def expert_names(model: DeepseekPolicy) -> dict[str, Tensor]:
    """The policy's own weights, one entry per expert, as views (nothing is copied); a tied head is left out.

    What multi-token prediction shares with the rest of the policy is not repeated here: see `shared_names`.
    """
    named: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                named[f"{stem}{expert}.gate_proj.weight"], named[f"{stem}{expert}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            named |= {f"{stem}{expert}.down_proj.weight": down for expert, down in enumerate(value)}
        elif not (name == HEAD and model.config.tie_word_embeddings):
            named[name] = value
    return named


def shared_names(config: PolicyConfig) -> dict[str, str]:
    """Second names of the embedding and the head, and the first: the release repeats both in each prediction layer."""
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    shared: dict[str, str] = {}
    for layer in range(config.num_hidden_layers, last):
        shared[f"model.layers.{layer}.embed_tokens.weight"] = EMBEDDING
        shared[f"model.layers.{layer}.shared_head.head.weight"] = head
    return shared


def layer_index(name: str) -> int | None:
    """The layer that a weight belongs to; None for embedding, final norm and head."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2].isdigit() else None


def prediction_layers(names: Iterable[str]) -> set[int]:
    """The layers of multi-token prediction among stored weights: those with a projection of embedding and hidden state."""
    found = (layer_index(name) for name in names if name.endswith(".eh_proj.weight"))
    return {index for index in found if index is not None}
