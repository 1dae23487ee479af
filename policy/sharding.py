"""Where the shards of a spread policy lie, and bringing whole weights to one process, one stored tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from policy.checkpoint_names import HEAD
from policy.deepseek import DeepseekPolicy
from policy.interface import Policy

Span = tuple[int, int]  # first and one past the last


class Place(NamedTuple):
    """Where a stored tensor lies in the policy's memory: the parameter, and if it is stacked, one expert's rows."""

    parameter: str
    expert: int | None
    rows: Span

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The stored tensor's shape."""
        columns = parameter.shape[1:] if self.expert is None else parameter.shape[2:]
        return (self.rows[1] - self.rows[0], *columns)


def places(model: Policy) -> dict[str, Place]:
    """The place of every tensor of a checkpoint by its name there; a tied head has none."""
    if not isinstance(model, DeepseekPolicy):
        return {name: Place(name, None, (0, len(value))) for name, value in model.hf_state_dict().items()}
    found: dict[str, Place] = {}
    for name, value in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith("mlp.experts"):
            if not (name == HEAD and model.config.tie_word_embeddings):
                found[name] = Place(name, None, (0, len(value)))
            continue
        width = model.config.moe_intermediate_size
        for expert in range(len(value)):
            if kind == "gate_up_proj":
                found[f"{stem}.{expert}.gate_proj.weight"] = Place(name, expert, (0, width))
                found[f"{stem}.{expert}.up_proj.weight"] = Place(name, expert, (width, 2 * width))
            else:
                found[f"{stem}.{expert}.down_proj.weight"] = Place(name, expert, (0, value.shape[1]))
    return found


class Piece(NamedTuple):
    """What one rank holds of a tensor: a span of each dimension."""

    rank: int
    spans: tuple[Span, ...]

    def overlap(self, expert: int | None, rows: Span) -> Span | None:
        """The rows of `expert` (None: the tensor is not stacked) within `rows` that this rank holds; None for none."""
        if expert is not None and not self.spans[0][0] <= expert < self.spans[0][1]:
            return None
        held = self.spans[0 if expert is None else 1]
        first, last = max(held[0], rows[0]), min(held[1], rows[1])
        return (first, last) if first < last else None

    def view(self, local: Tensor, expert: int | None, rows: Span) -> Tensor:
        """Rows that this rank holds, in its shard."""
        if expert is not None:
            local = local[expert - self.spans[0][0]]
        first = self.spans[0 if expert is None else 1][0]
        return local[rows[0] - first : rows[1] - first]


def pieces(tensor: Tensor) -> list[Piece]:
    """All ranks' pieces of a tensor, by rank; of one that is not sharded, the whole of it on this rank."""
    if isinstance(tensor, DTensor):
        return _pieces(tensor.shape, tensor.device_mesh, tuple(tensor.placements))
    return [Piece(_rank(), tuple((0, size) for size in tensor.shape))]


def own_piece(tensor: Tensor) -> Piece:
    """This rank's piece."""
    return next(piece for piece in pieces(tensor) if piece.rank == _rank())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@lru_cache(maxsize=256)  # few layouts, but asked for once per expert
def _pieces(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> list[Piece]:
    whole = tuple((0, size) for size in shape)
    held = []
    for coordinate in torch.ones_like(mesh.mesh).nonzero().tolist():
        held.append(Piece(int(mesh.mesh[tuple(coordinate)]), _spans(whole, mesh, placements, coordinate)))
    return sorted(held)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory; of a tensor that is not sharded, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spans(
    whole: tuple[Span, ...], mesh: DeviceMesh, placements: tuple[Placement, ...], coordinate: list[int]
) -> tuple[Span, ...]:
    """The last dimension of the mesh cuts first: experts over columns, then FSDP over rows, each as torch.chunk does."""
    spans = list(whole)
    for axis in reversed(range(mesh.ndim)):
        placement = placements[axis]
        dim: int | None = getattr(placement, "dim", None)
        if dim is None:
            if isinstance(placement, Replicate) and mesh.size(axis) == 1:
                continue
            raise ValueError(f"a parameter is laid out as {placements}; parallelize() makes only sharded ones")
        first, last = spans[dim]
        step = -(-(last - first) // mesh.size(axis))
        start = min(first + coordinate[axis] * step, last)
        spans[dim] = (start, min(start + step, last))
    return tuple(spans)


@torch.no_grad()
def gather(tensor: Tensor, place: Place, to: int = 0) -> Tensor | None:
    """A stored tensor, whole, on rank `to`, and None on the others; all ranks call it, in the same order."""
    rank = _rank()
    if not isinstance(tensor, DTensor):
        return own_piece(tensor).view(tensor.detach(), place.expert, place.rows).clone() if rank == to else None
    shard, operations = tensor.to_local(), []
    out = shard.new_empty(place.shape(tensor)) if rank == to else None
    for piece in pieces(tensor):
        rows = piece.overlap(place.expert, place.rows)
        if rows is None or rank not in (to, piece.rank):
            continue
        if out is not None:
            into = out[rows[0] - place.rows[0] : rows[1] - place.rows[0]]
            if piece.rank == to:
                into.copy_(piece.view(shard, place.expert, rows))
            else:
                operations.append(dist.P2POp(dist.irecv, into, piece.rank))
        else:
            operations.append(dist.P2POp(dist.isend, piece.view(shard, place.expert, rows).contiguous(), to))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return out


def gathered_weights(model: Policy, to: int = 0) -> Iterator[tuple[str, Tensor | None]]:
    """The weights under the released names, one after the other, whole on rank `to` and None on the others.

    What `hf_state_dict` is for a policy of one process. All ranks run it to its end, or all to the same place.
    """
    state = model.state_dict()
    for name, place in places(model).items():
        yield name, gather(state[place.parameter], place, to)
