"""Muon's orthogonalisation where matrices are sharded: each is computed whole, by one rank, and by no other.

A matrix that lies on one rank (an expert, where experts are not cut) stays there. The others are dealt out in turn; the
owner gets the shards of the others, computes, and sends their parts back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from policy.sharding import Piece, Span, local, pieces

MAX_ROUND_MATRICES = 4  # of one owner, whole at the same time


class _Matrix(NamedTuple):
    """A matrix among the given tensors: the tensor's index, one expert of a stack or None, rows, who computes, who holds."""

    tensor: int
    expert: int | None
    rows: Span
    owner: int
    held: list[tuple[Piece, Span]]


def orthogonalise_sharded(tensors: Sequence[Tensor], orthogonalise: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`orthogonalise` of every matrix of sharded tensors [m, n] or stacks [E, m, n]; shards as before.

    All ranks call it with the same tensors in the same order.
    """
    results = [torch.empty_like(tensor) for tensor in tensors]
    shards, out = [local(tensor) for tensor in tensors], [local(result) for result in results]
    for round_ in _rounds(tensors):
        whole = _collect(round_, shards)
        for place, matrix in whole.items():
            whole[place] = orthogonalise(matrix)
        _return(round_, whole, out)
    return results


def _rounds(tensors: Sequence[Tensor]) -> list[list[_Matrix]]:
    """All matrices, dealt out to owners, in portions that fit into memory; the same on every rank."""
    rounds: list[list[_Matrix]] = []
    world, turn = dist.get_world_size(), 0
    busy: dict[int, int] = {}
    for index, tensor in enumerate(tensors):
        parts = pieces(tensor)
        for expert in range(len(tensor)) if tensor.dim() == 3 else [None]:
            rows = (0, tensor.shape[-2])
            held = [(piece, span) for piece in parts if (span := piece.overlap(expert, rows)) is not None]
            owner = held[0][0].rank
            if len(held) > 1:
                owner, turn = turn % world, turn + 1
            if not rounds or busy.get(owner, 0) == MAX_ROUND_MATRICES:
                rounds.append([])
                busy = {}
            busy[owner] = busy.get(owner, 0) + 1
            rounds[-1].append(_Matrix(index, expert, rows, owner, held))
    return rounds


def _collect(round_: list[_Matrix], shards: list[Tensor]) -> dict[int, Tensor]:
    """The matrices of a round that are ours to compute, whole, by place in the round."""
    rank, whole, operations = dist.get_rank(), {}, []
    for place, matrix in enumerate(round_):
        shard = shards[matrix.tensor]
        if matrix.owner == rank:
            whole[place] = shard.new_empty(matrix.rows[1], shard.shape[-1])
        for piece, rows in matrix.held:
            if piece.rank == rank == matrix.owner:
                whole[place][slice(*rows)] = piece.view(shard, matrix.expert, rows)
            elif piece.rank == rank:
                operations.append(dist.P2POp(dist.isend, piece.view(shard, matrix.expert, rows), matrix.owner))
            elif matrix.owner == rank:
                operations.append(dist.P2POp(dist.irecv, whole[place][slice(*rows)], piece.rank))
    _communicate(operations)
    return whole


def _return(round_: list[_Matrix], whole: dict[int, Tensor], out: list[Tensor]) -> None:
    """Every holder's rows of the computed matrices, into its shard."""
    rank, operations = dist.get_rank(), []
    for place, matrix in enumerate(round_):
        for piece, rows in matrix.held:
            if rank not in (piece.rank, matrix.owner):
                continue
            if piece.rank == rank == matrix.owner:
                piece.view(out[matrix.tensor], matrix.expert, rows).copy_(whole[place][slice(*rows)])
            elif piece.rank == rank:
                into = piece.view(out[matrix.tensor], matrix.expert, rows)
                operations.append(dist.P2POp(dist.irecv, into, matrix.owner))
            else:
                operations.append(dist.P2POp(dist.isend, whole[place][slice(*rows)].contiguous(), piece.rank))
    _communicate(operations)


def _communicate(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
