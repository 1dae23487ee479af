"""The layer groups that parameters belong to: what a diagnosis names and what learning rates are set by."""

from __future__ import annotations

LAYER_GROUPS = (
    "embedding",
    "norms",
    "attention",
    "router",
    "router_bias",
    "experts",
    "shared_experts",
    "dense_mlp",
    "mtp",
    "head",
)


def layer_group(name: str) -> str:
    """The group of a parameter by its Hugging Face name (per expert or stacked); an unknown name is a ValueError."""
    if name.endswith("e_score_correction_bias"):
        return "router_bias"
    if "embed_tokens" in name:
        return "embedding"
    if name.startswith("lm_head"):
        return "head"
    if "norm" in name:
        return "norms"
    if ".eh_proj." in name:
        return "mtp"
    if ".self_attn." in name:
        return "attention"
    if ".mlp.gate." in name:
        return "router"
    if ".shared_experts." in name:
        return "shared_experts"
    if ".experts." in name:
        return "experts"
    if ".mlp." in name:
        return "dense_mlp"
    raise ValueError(f"{name} is not a parameter of the policy")
