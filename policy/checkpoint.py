"""Hugging Face checkpoints of the policy: written whole or not at all, refused when anything is missing or misshapen."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from policy.config import PolicyConfig, PolicyConfigError
from policy.deepseek import DeepseekPolicy


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read or written; the message names the folder and what is wrong with it."""


def hf_state_dict(model: DeepseekPolicy) -> dict[str, Tensor]:
    """The weights under the released checkpoint's names, one entry per expert, as views (nothing is copied)."""
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
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            named[name] = value
    return named


@torch.no_grad()
def load_hf_state_dict(model: DeepseekPolicy, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into the model in place; names that are missing, unknown or misshapen are listed in the error."""
    own = hf_state_dict(model)
    problems = [f"missing {name}" for name in own.keys() - weights.keys()]
    problems += [f"unknown {name}" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} is {list(weights[name].shape)}, the config says {list(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8])
        raise CheckpointError(f"{where} does not fit the policy in {len(problems)} places: {shown}")
    for name, target in own.items():
        target.copy_(weights[name])


def save_policy(model: DeepseekPolicy, folder: Path) -> None:
    """Write config.json and safetensors into an existing folder (see `atomic_folder`)."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    weights = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in hf_state_dict(model).items()
    }
    save_torch_state_dict(weights, folder, max_shard_size="4GB")
    (folder / "config.json").write_text(json.dumps(model.config.to_hf_dict(dtype), indent=2) + "\n")


def read_config(folder: Path) -> PolicyConfig:
    """The policy's config of a checkpoint; a folder that holds none is a CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        return PolicyConfig.from_hf_dict(_json_object(path))
    except PolicyConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_policy(folder: Path, dtype: torch.dtype = torch.float32) -> DeepseekPolicy:
    """Build the policy of a checkpoint and load its weights as `dtype` (buffers stay fp32)."""
    folder = Path(folder)
    config = read_config(folder)
    model = DeepseekPolicy(config).to(dtype)
    for buffer in model.buffers():  # biases move in steps too small, and loads count too high, for half precision
        buffer.data = buffer.data.float()
    load_hf_state_dict(model, read_weights(folder), str(folder))
    return model


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors files, one file or several with an index."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        weight_map = _json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted(set(weight_map.values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}")
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged or cut off: {error}") from error
    return weights


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # of JSON or of UTF-8
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return values


@contextmanager
def atomic_folder(folder: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well and vanishes when it doesn't.

    Raises CheckpointError when fewer than `needed_bytes` are free, or when writing fails; what was at `folder` before
    stays whole until the new one is on disk.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes:
        raise CheckpointError(
            f"no space for {folder}: {needed_bytes / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free"
        )
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _replace(folder, temporary)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError of its archive writer.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise CheckpointError(
            f"writing {folder} failed: {error}. Earlier checkpoints are whole; free some space or choose another disk."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(folder: Path, temporary: Path) -> None:
    """Put `temporary` in the place of `folder`, which comes back if that fails."""
    replaced = folder.parent / f".{folder.name}.{os.getpid()}.old"
    if folder.exists():
        folder.rename(replaced)
    try:
        temporary.rename(folder)
    except BaseException:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
