"""Tensors to sharded safetensors files, one tensor in memory at a time.

A file is 8 bytes of header length, the header in JSON (type, shape and place of each tensor), and the values. Files are
planned from shapes alone, so that a tensor may be fetched, converted and written before the next one is there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import torch
from torch import Tensor

from policy.atomic import CheckpointError, check_space
from policy.checkpoint_read import INDEX, SINGLE_FILE
from policy.fp8_format import BLOCK, FP8, SCALE_SUFFIX, is_quantised, quantise, scale_shape

SaveDtype = Literal["float32", "bfloat16", "float8_e4m3fn"]
MAX_SHARD_BYTES = 4 * 2**30
_PIECE = 2**19  # elements converted at a time
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", FP8: "F8_E4M3"}


@dataclass(frozen=True)
class Source:
    """A tensor to write: name on disk, shape, type in memory, and what brings all of it to this process.

    `keep_dtype` exempts it from the type that is asked for when writing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]
    keep_dtype: bool = False


@dataclass
class _Entry:
    """One tensor of a file; `offset` counts from the first value."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class _Shard:
    """What one file holds; FP8 weights lie together with their scales."""

    sources: list[Source] = field(default_factory=list)
    entries: list[list[_Entry]] = field(default_factory=list)  # one or two for each source
    num_bytes: int = 0

    def header(self) -> bytes:
        """Places the tensors, wide types first so that each is aligned, and says where."""
        offset, described = 0, {"__metadata__": {"format": "pt"}}
        for entry in sorted((e for both in self.entries for e in both), key=lambda e: -e.dtype.itemsize):
            entry.offset, offset = offset, offset + entry.num_bytes
            place = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": (entry.offset, offset)}
            described[entry.name] = place
        text = json.dumps(described).encode()
        return text + b" " * (-len(text) % 8)


def write_weights(
    sources: Sequence[Source],
    folder: Path | None,
    dtype: SaveDtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `sources` in their order as `dtype`, or each as it is, with an index if one file does not suffice.

    Where fetching is a collective, every process passes the same sources and all but one no folder: they fetch too.
    FP8 is for the weights that `is_quantised` names, the others become bfloat16. Raises CheckpointError for a value
    that FP8 can't hold, and, before anything is written, when the disk lacks space.
    """
    shards = _plan(sources, dtype, max_shard_bytes)
    if folder is None:
        for source in sources:
            source.fetch()
        return
    check_space(folder, sum(shard.num_bytes for shard in shards), folder)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard)
    if len(shards) > 1:
        weight_map = {
            e.name: name for name, shard in zip(names, shards, strict=True) for es in shard.entries for e in es
        }
        metadata = {"total_size": sum(shard.num_bytes for shard in shards)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _plan(sources: Sequence[Source], dtype: SaveDtype | None, max_shard_bytes: int) -> list[_Shard]:
    """Files of at most `max_shard_bytes` of values each, or of a single larger tensor."""
    if dtype is not None and dtype not in get_args(SaveDtype):
        raise ValueError(f"weights can be written as {', '.join(get_args(SaveDtype))}, not {dtype!r}")
    if twice := [name for name, count in Counter(source.name for source in sources).items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} given twice")
    shards = [_Shard()]
    for source in sources:
        entries = _entries(source, dtype)
        size = sum(entry.num_bytes for entry in entries)
        if shards[-1].sources and shards[-1].num_bytes + size > max_shard_bytes:
            shards.append(_Shard())
        shards[-1].sources.append(source)
        shards[-1].entries.append(entries)
        shards[-1].num_bytes += size
    return shards


def _entries(source: Source, dtype: SaveDtype | None) -> list[_Entry]:
    """What a source becomes on disk."""
    name, shape = source.name, tuple(source.shape)
    if dtype is None or source.keep_dtype:
        return [_Entry(name, source.dtype, shape)]
    if dtype == "float8_e4m3fn" and is_quantised(name, shape):
        return [_Entry(name, FP8, shape), _Entry(name + SCALE_SUFFIX, torch.float32, scale_shape(shape))]
    return [_Entry(name, torch.float32 if dtype == "float32" else torch.bfloat16, shape)]


@torch.no_grad()
def _write_shard(path: Path, shard: _Shard) -> None:
    header = shard.header()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for source, entries in zip(shard.sources, shard.entries, strict=True):
            _write_source(file, start, source, entries)


def _write_source(file: BinaryIO, start: int, source: Source, entries: Sequence[_Entry]) -> None:
    """Fetch and write a tensor, and its scales if it has any, piece by piece, at the places planned for them."""
    tensor = source.fetch()
    if tuple(tensor.shape) != tuple(source.shape):
        raise ValueError(f"{source.name} came as {list(tensor.shape)}, not {list(source.shape)}")
    places = [start + entry.offset for entry in entries]
    for rows in _pieces(tensor):
        try:
            values = quantise(rows.cpu()) if len(entries) == 2 else (rows.cpu().to(entries[0].dtype),)
        except ValueError as error:
            raise CheckpointError(f"{source.name} {error}") from error
        for i, value in enumerate(values):
            file.seek(places[i])
            places[i] += file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor by blocks of rows."""
    if tensor.dim() == 0:
        yield tensor[None]
        return
    columns = max(1, tensor[:1].numel())
    yield from tensor.split(max(1, _PIECE // columns // BLOCK) * BLOCK)
