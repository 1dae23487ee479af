"""Safetensors files to tensors in place: every header is checked before the first value is copied.

A file is mapped, not read: memory grows by the pages of one file at most, and no tensor is held twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from policy.atomic import CheckpointError
from policy.fp8_format import SCALE_SUFFIX, dequantise, quantization_problem, scale_shape

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FP8 = "F8_E4M3"
_READABLE = {"F64", "F32", "F16", "BF16", _FP8}
_PIECE = 2**19  # elements dequantised or compared at a time
_SHOWN = 8  # problems listed in an error


class Stored(NamedTuple):
    """Where a tensor lies: file, safetensors' name of its type, shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Target(NamedTuple):
    """A tensor to fill: its name on disk, its whole shape, and where its rows from `start_row` on go.

    `into` None: the tensor must be there, but its rows are another process's. An alias may be absent; when it is there
    it must equal `into`, which another target fills.
    """

    name: str
    shape: tuple[int, ...]
    into: Tensor | None
    start_row: int = 0
    alias: bool = False


def read_headers(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint by name, from its files' headers alone; damage and mixed files are named."""
    weight_map = _read_index(folder)
    files = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
    stored: dict[str, Stored] = {}
    problems: list[str] = [] if files else [f"{INDEX} lists no tensor"]
    for file in files:
        with open_file(folder, file) as opened:
            headers = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            found = {name: Stored(file, h.get_dtype(), tuple(h.get_shape())) for name, h in headers.items()}
            del headers  # they keep the file mapped
        if weight_map is not None:
            listed = {name for name, place in weight_map.items() if place == file}
            problems += [f"{file} lacks {name}" for name in listed - found.keys()]
            problems += [
                f"{file} holds {name}, which the index puts "
                + (f"in {weight_map[name]}" if name in weight_map else "nowhere")
                for name in found.keys() - listed
            ]
        stored |= found
    _refuse(f"{folder} mixes files of different checkpoints, or its index is another's", problems)
    return stored


def load_weights(folder: Path, targets: Sequence[Target], ignored: Iterable[str] = ()) -> None:
    """Copy a checkpoint into `targets`, whose type may be another; FP8 is dequantised on the way.

    Names that are missing, unknown (and not `ignored`) or misshapen are a CheckpointError before anything is copied.
    """
    stored = read_headers(folder)
    weights = {name: entry for name, entry in stored.items() if not _is_scale(name, stored)}
    for name in ignored:
        weights.pop(name, None)
    check_fit({name: entry.shape for name, entry in weights.items()}, targets, str(folder))
    _refuse(f"{folder} can't be read", _storage_problems(weights, stored))
    with torch.no_grad():
        for aliases in (False, True):  # what aliases are compared with must be there first
            chosen = [t for t in targets if t.alias == aliases and t.into is not None and t.name in weights]
            for file in sorted({weights[target.name].file for target in chosen}):
                _read_file(folder, file, [t for t in chosen if weights[t.name].file == file], stored)


def check_fit(given: Mapping[str, tuple[int, ...]], targets: Iterable[Target], where: str) -> None:
    """CheckpointError that lists what is missing in `given`, unknown to the targets, or of another shape."""
    wanted = {target.name: target for target in targets}
    problems = [f"missing {name}" for name, target in wanted.items() if name not in given and not target.alias]
    problems += [f"unknown {name}" for name in given.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(given[name])}, the config says {list(target.shape)}"
        for name, target in wanted.items()
        if name in given and tuple(given[name]) != tuple(target.shape)
    ]
    _refuse(f"{where} does not fit the policy", problems)


def check_alias(name: str, own: Tensor, values: Tensor, where: str) -> None:
    """CheckpointError when a weight stored a second time is not the weight it repeats."""
    if not torch.equal(own, values.to(own.device, own.dtype)):
        raise CheckpointError(
            f"{where}: {name} differs from the weight it should share. This policy has but one for both; "
            "a checkpoint that holds multi-token-prediction layers can be read without them (drop_mtp)."
        )


@contextmanager
def open_file(folder: Path, file: str) -> Iterator[Any]:
    """A mapped safetensors file; one that is absent, damaged or shorter than its header says is a CheckpointError."""
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {file}")
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from error


def config_values(folder: Path) -> dict[str, Any]:
    """What a checkpoint's config.json says of the model; how the weights are stored is checked here and left out."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    values = json_object(path)
    if problem := quantization_problem(values):
        raise CheckpointError(f"{path} has {problem}; of quantised weights, e4m3 in blocks of 128 x 128 can be read")
    values.pop("quantization_config", None)
    return values


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else in it is a CheckpointError."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # of JSON or of UTF-8
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return values


def _read_index(folder: Path) -> dict[str, str] | None:
    """File by tensor name, None when there is no index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    weight_map = json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} puts {name} in {file!r}, which is no file of this folder")
    return weight_map


def _is_scale(name: str, stored: Mapping[str, Stored]) -> bool:
    """Whether a tensor is the scales of an FP8 weight."""
    weight = stored.get(name.removesuffix(SCALE_SUFFIX))
    return name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype == _FP8


def _storage_problems(weights: Mapping[str, Stored], stored: Mapping[str, Stored]) -> list[str]:
    problems = []
    for name, (_, dtype, shape) in weights.items():
        if dtype not in _READABLE:
            problems.append(f"{name} is stored as {dtype}; {', '.join(sorted(_READABLE))} can be read")
        if dtype != _FP8:
            continue
        scale = stored.get(name + SCALE_SUFFIX)
        if scale is None or len(shape) != 2:
            problems.append(f"{name} is {list(shape)} in FP8 without its scales, {name + SCALE_SUFFIX}")
        elif scale.dtype != "F32" or scale.shape != scale_shape(shape):
            expected = f"F32 {list(scale_shape(shape))}"
            problems.append(f"{name + SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}, not {expected}")
    return problems


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        places = f"in {len(problems)} place{'s' if len(problems) > 1 else ''}"
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{what} {places}: {'; '.join(sorted(problems)[:_SHOWN])}{more}")


def _read_file(folder: Path, file: str, targets: Iterable[Target], stored: Mapping[str, Stored]) -> None:
    """Fill, or compare, the targets that lie in one file."""
    with open_file(folder, file) as opened:
        for target in targets:
            assert target.into is not None
            scale = None
            if stored[target.name].dtype == _FP8:
                scale = _read_scale(folder, file, opened, target.name + SCALE_SUFFIX, stored)
            for rows, values in _pieces(opened, target, scale, f"{folder / file}"):
                if target.alias:
                    check_alias(target.name, target.into[rows], values, str(folder / file))
                else:
                    target.into[rows].copy_(values)


def _read_scale(folder: Path, file: str, opened: Any, name: str, stored: Mapping[str, Stored]) -> Tensor:
    """Scales as a copy; a weight at the end of a file may have them in the next one."""
    if stored[name].file == file:
        return opened.get_tensor(name).clone()
    with open_file(folder, stored[name].file) as other:
        return other.get_tensor(name).clone()


def _pieces(opened: Any, target: Target, scale: Tensor | None, where: str) -> Iterator[tuple[Any, Tensor]]:
    """(index into the target, values) for all of it, by a few rows at a time where values are made from what is mapped."""
    assert target.into is not None
    if scale is None and not target.alias and target.into.shape == target.shape:
        yield ..., opened.get_tensor(target.name)
        return
    lazy = opened.get_slice(target.name)
    size = len(target.into)
    step = max(1, _PIECE // max(1, target.into[:1].numel()))
    for start in range(0, size, step):
        stop = min(start + step, size)
        values = lazy[target.start_row + start : target.start_row + stop]
        if scale is not None:
            try:
                values = dequantise(values, scale, target.start_row + start)
            except ValueError as error:
                raise CheckpointError(f"{where}: {target.name} {error}") from error
        yield slice(start, stop), values
