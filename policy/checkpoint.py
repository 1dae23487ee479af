"""Checkpoints of policies: config.json and safetensors, written whole or not at all, refused when anything is amiss.

Both ways are streams: beyond the model itself, memory holds one file's mapped pages (reading) or one piece of a tensor
(writing). Formats are in `checkpoint_read`, `checkpoint_write` and `fp8_format`, names in `checkpoint_names`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from policy.atomic import CheckpointError, atomic_folder
from policy.checkpoint_names import (
    EMBEDDING,
    HEAD,
    ROUTER_BIAS,
    expert_names,
    layer_index,
    prediction_layers,
    shared_names,
)
from policy.checkpoint_read import Target, check_alias, check_fit, config_values, load_weights, read_headers
from policy.checkpoint_write import MAX_SHARD_BYTES, SaveDtype, Source, write_weights
from policy.config import PolicyConfig, PolicyConfigError
from policy.deepseek import DeepseekPolicy
from policy.dense import load_dense
from policy.dense_config import DenseConfig
from policy.fp8_format import QUANTIZATION_CONFIG
from policy.interface import Policy

OUR_MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
__all__ = [
    "CheckpointError",
    "atomic_folder",
    "hf_state_dict",
    "load_hf_state_dict",
    "load_policy",
    "read_config",
    "save_policy",
]


def hf_state_dict(model: Policy) -> dict[str, Tensor]:
    """The weights under the released checkpoint's names, one entry per expert, as views (nothing is copied)."""
    return expert_names(model) if isinstance(model, DeepseekPolicy) else model.hf_state_dict()


def targets_of(model: Policy) -> list[Target]:
    """What has to be filled to load the model; weights that a checkpoint may repeat are compared."""
    own = hf_state_dict(model)
    targets = [Target(name, tuple(value.shape), value) for name, value in own.items()]
    if isinstance(model, DeepseekPolicy):
        repeated = shared_names(model.config)
        if model.config.tie_word_embeddings:
            repeated[HEAD] = EMBEDDING
        targets += [Target(name, tuple(own[of].shape), own[of], alias=True) for name, of in repeated.items()]
    return targets


def sources_of(model: Policy) -> list[Source]:
    """What a checkpoint of the model holds; the prediction layers repeat embedding and head, as in the release."""
    own = hf_state_dict(model)
    if isinstance(model, DeepseekPolicy):
        own |= {name: own[of] for name, of in shared_names(model.config).items()}
    return [
        Source(name, tuple(value.shape), value.dtype, lambda value=value: value.detach(), name.endswith(ROUTER_BIAS))
        for name, value in own.items()
    ]


@torch.no_grad()
def load_hf_state_dict(model: Policy, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into the model in place; names that are missing, unknown or misshapen are listed in the error."""
    targets = targets_of(model)
    check_fit({name: tuple(value.shape) for name, value in weights.items()}, targets, where)
    firsts = {target.into: target.name for target in targets if not target.alias}
    for target in targets:
        if target.alias and target.name in weights:
            check_alias(target.name, weights[firsts[target.into]], weights[target.name], where)
    for target in targets:
        if not target.alias and target.into is not None:
            target.into.copy_(weights[target.name])


def save_policy(
    model: Policy,
    folder: Path,
    dtype: SaveDtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and safetensors into an existing folder (see `atomic_folder`), as `dtype` or as they are.

    "float8_e4m3fn" is the released FP8 format; what it leaves out is written in bfloat16. Router biases stay in fp32.
    """
    write_weights(sources_of(model), folder, dtype, max_shard_bytes)
    write_config(model, folder, dtype)


def write_config(model: Policy, folder: Path, dtype: SaveDtype | None = None) -> None:
    """Write config.json for weights saved as `dtype`."""
    quantised = dtype == "float8_e4m3fn"
    stated = "bfloat16" if quantised else dtype or str(next(model.parameters()).dtype).removeprefix("torch.")
    values = model.config.to_hf_dict(stated)
    if quantised:
        values["quantization_config"] = QUANTIZATION_CONFIG
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def read_config(folder: Path) -> PolicyConfig | DenseConfig:
    """The policy's config of a checkpoint, a dense one's for an architecture other than DeepSeek's; CheckpointError."""
    values = config_values(folder)
    try:
        ours = values.get("model_type") in OUR_MODEL_TYPES
        return PolicyConfig.from_hf_dict(values) if ours else DenseConfig.from_hf_dict(values)
    except PolicyConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def load_policy(folder: Path, dtype: torch.dtype = torch.float32, drop_mtp: bool = False) -> Policy:
    """Build the policy of a checkpoint and load its weights as `dtype` (buffers stay fp32); FP8 is dequantised.

    `drop_mtp` leaves out multi-token prediction, whatever of it config.json and the files hold; without it the two have
    to agree. An architecture other than DeepSeek's is loaded as a dense model.
    """
    folder = Path(folder)
    config = read_config(folder)
    if isinstance(config, DenseConfig):
        return load_dense(folder, dtype)
    if drop_mtp:
        config = replace(config, num_nextn_predict_layers=0)
    ignored = ignored_tensors(folder, config, drop_mtp)
    model = empty_policy(config, dtype)
    load_weights(folder, targets_of(model), ignored)
    return model


def empty_policy(config: PolicyConfig, dtype: torch.dtype) -> DeepseekPolicy:
    """A policy whose parameters, of type `dtype`, hold arbitrary values; buffers are fp32 zeros.

    Biases move in steps too small, and loads count too high, for half precision.
    """
    with torch.device("meta"):  # nothing is allocated twice, or initialised in vain
        model = DeepseekPolicy(config)
    model = model.to(dtype).to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for buffer in model.buffers():
        buffer.data = torch.zeros(buffer.shape)
    return model


def ignored_tensors(folder: Path, config: PolicyConfig, drop_mtp: bool) -> list[str]:
    """Stored tensors to pass over: rotary frequencies, which follow from the config, and prediction layers to drop.

    Prediction layers that config.json and the files do not agree on are a CheckpointError.
    """
    names = list(read_headers(folder))
    held, announced = prediction_layers(names), config.num_nextn_predict_layers
    if not drop_mtp and len(held) != announced:
        raise CheckpointError(
            f"{folder}: config.json announces {announced} layers of multi-token prediction (num_nextn_predict_layers), "
            f"its files hold {len(held)} (model.layers.N.eh_proj.weight). Correct config.json, or load without them "
            "(drop_mtp)."
        )
    dropped = [name for name in names if drop_mtp and layer_index(name) in held]
    return dropped + [name for name in names if name.endswith("rotary_emb.inv_freq")]
