"""`groupzero export`: a checkpoint as a plain Hugging Face folder, one tensor in memory at a time, also while the run trains."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.atomic import CheckpointError, atomic_folder
from policy.checkpoint import read_config
from policy.checkpoint_names import ROUTER_BIAS
from policy.checkpoint_read import Stored, open_file, read_headers
from policy.checkpoint_write import SaveDtype, Source, write_weights
from policy.fp8_format import FP8, QUANTIZATION_CONFIG, SCALE_SUFFIX, dequantise, is_quantised, quantise
from rollout.checkpoints import MANIFEST, latest_checkpoint, verify_checkpoint
from rollout.errors import UserError
from rollout.run import CONFIG
from rollout.tokenizer import load_tokenizer, stop_ids

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES: dict[str, SaveDtype] = {"float32": "float32", "bfloat16": "bfloat16", "fp8": "float8_e4m3fn"}
_MAX_ATTEMPTS = 5  # a run may remove its checkpoints faster than they can be read, though hardly so often


def run_export(target: Path, out: Path, dtype: str) -> Path:
    """Export a checkpoint, or a run's newest one, to the new folder `out` and return which it was.

    A checkpoint that the run removes meanwhile is exchanged for the then newest, or is a CheckpointError where it was
    named itself. `dtype` is float32, bfloat16 or fp8 (the released format of DeepSeek-V3).
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another name, or remove it first.")
    for _ in range(_MAX_ATTEMPTS):
        source = _newest(target)
        try:
            export_checkpoint(source, out, DTYPES[dtype])
            return source
        except (CheckpointError, UserError, OSError) as error:
            if source.is_dir():
                raise
            if source == target:
                raise CheckpointError(
                    f"{source} was removed by its run while it was read; export the run's folder to get the newest."
                ) from error
    raise CheckpointError(
        f"{target}: the run removed {_MAX_ATTEMPTS} checkpoints while they were read; raise its checkpoint.keep_last."
    )


def _newest(target: Path) -> Path:
    """The checkpoint that a person names: the folder itself, or the newest of a run's folder."""
    if (target / "config.json").is_file():
        return target
    if not target.is_dir():
        raise UserError(f"{target} is no folder: name a run or one of its checkpoints.")
    if not (target / CONFIG).is_file() and not (target / "checkpoints").is_dir():
        raise UserError(f"{target} is neither a run ({CONFIG}) nor a checkpoint (config.json).")
    newest = latest_checkpoint(target / "checkpoints")
    if newest is None:
        raise UserError(f"{target} has no checkpoint yet: wait for the run's first one.")
    return newest


def export_checkpoint(source: Path, out: Path, dtype: SaveDtype) -> None:
    """Write weights as `dtype`, configs and tokenizer of the verified checkpoint `source` to `out`, whole or not at all.

    What was written is read back and compared with the source before `out` appears.
    """
    if (source / MANIFEST).is_file():
        verify_checkpoint(source)
    config = read_config(source).to_hf_dict("bfloat16" if dtype == "float8_e4m3fn" else dtype)
    if dtype == "float8_e4m3fn":
        config["quantization_config"] = QUANTIZATION_CONFIG
    tokenizer = load_tokenizer(source)
    stored = read_headers(source)
    sources = [_source(source, name, stored) for name in stored if not _is_scale(name, stored)]
    with atomic_folder(out) as temporary:
        write_weights(sources, temporary, dtype)
        _compare(sources, temporary, dtype)
        _write(temporary / "config.json", config)
        tokenizer.save_pretrained(temporary)
        _write(temporary / "generation_config.json", _generation_config(source, config, tokenizer))


def _source(folder: Path, name: str, stored: Mapping[str, Stored]) -> Source:
    """A stored tensor, FP8 as the values it stands for."""
    place = stored[name]

    def fetch() -> Tensor:
        with open_file(folder, place.file) as opened:
            value = opened.get_tensor(name)
        if value.dtype != FP8:
            return value
        with open_file(folder, stored[name + SCALE_SUFFIX].file) as opened:
            return dequantise(value, opened.get_tensor(name + SCALE_SUFFIX))

    kind = _TYPES.get(place.dtype, torch.float32)
    return Source(name, place.shape, kind, fetch, keep_dtype=name.endswith(ROUTER_BIAS))


def _is_scale(name: str, stored: Mapping[str, Stored]) -> bool:
    weight = stored.get(name.removesuffix(SCALE_SUFFIX))
    return name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype == "F8_E4M3"


def _compare(sources: Iterable[Source], folder: Path, dtype: SaveDtype) -> None:
    """CheckpointError unless `folder` holds the sources as `dtype`, byte by byte, and nothing else."""
    stored = read_headers(folder)
    expected: set[str] = set()
    by_file = sorted(sources, key=lambda source: stored[source.name].file)
    for file, of_file in groupby(by_file, key=lambda source: stored[source.name].file):
        with open_file(folder, file) as opened:
            for source in of_file:
                for name, value in _as_written(source, dtype).items():
                    expected.add(name)
                    if name not in stored or not _same_bytes(opened.get_tensor(name), value):
                        raise CheckpointError(f"{folder / file}: {name} was not written as it should be")
    if more := stored.keys() - expected:
        raise CheckpointError(f"{folder} holds {sorted(more)[0]}, which the checkpoint does not")


def _as_written(source: Source, dtype: SaveDtype) -> dict[str, Tensor]:
    value = source.fetch()
    if source.keep_dtype:
        return {source.name: value}
    if dtype == "float8_e4m3fn" and is_quantised(source.name, source.shape):
        quantised, scale = quantise(value)
        return {source.name: quantised, source.name + SCALE_SUFFIX: scale}
    return {source.name: value.to(torch.float32 if dtype == "float32" else torch.bfloat16)}


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(value.contiguous().view(-1).view(torch.uint8) for value in (one, other)))


def _generation_config(source: Path, config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The checkpoint's own generation_config.json, or when to stop and what to pad with, sampling as in training."""
    path = source / "generation_config.json"
    if path.is_file():
        return json.loads(path.read_text())
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    start = tokenizer.bos_token_id if config.get("bos_token_id") is None else config["bos_token_id"]
    values = {"bos_token_id": start, "eos_token_id": list(stop_ids(tokenizer)), "pad_token_id": pad}
    return {**values, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
