"""Checkpoints of a policy that is spread over ranks: the same files as of one process, read and written by all of them.

Rank 0 writes the weights, which come to it one tensor at a time; reading, each rank takes its own rows from the files.
So a checkpoint knows nothing of how many ranks wrote it. Optimizer state is in torch.distributed.checkpoint's format:
each rank writes its shards, and any number of ranks can read them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from policy.atomic import CheckpointError, atomic_folder
from policy.checkpoint import ignored_tensors, write_config
from policy.checkpoint_names import EMBEDDING, HEAD, ROUTER_BIAS, shared_names
from policy.checkpoint_read import Target, load_weights
from policy.checkpoint_write import MAX_SHARD_BYTES, SaveDtype, Source, write_weights
from policy.deepseek import DeepseekPolicy
from policy.interface import Policy
from policy.sharding import Place, gather, local, own_piece, places


@contextmanager
def shared_atomic_folder(folder: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """`atomic_folder` for all ranks: one temporary folder, which becomes `folder` once every rank's block ended well.

    A rank that fails raises its own error; the others raise a CheckpointError that names it.
    """
    stack, opened, problem = ExitStack(), [None], None
    if dist.get_rank() == 0:
        try:
            opened: list[Any] = [stack.enter_context(atomic_folder(folder, needed_bytes))]
        except CheckpointError as error:
            problem = error
    _agree(problem, folder)
    dist.broadcast_object_list(opened)
    ended = False
    try:
        with stack:
            try:
                yield opened[0]
            except BaseException as error:
                _agree(error, folder)
                raise
            _agree(None, folder)
            ended = True
    except CheckpointError as error:
        if not ended:
            raise
        problem = error  # of rank 0, when it put the folder in its place
    _agree(problem, folder)


def save_sharded(
    model: Policy, folder: Path, dtype: SaveDtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config.json and safetensors into an existing folder, as `save_policy` does; all ranks call it.

    At most one tensor is whole at a time, on rank 0. What rank 0 can't write is an error on every rank.
    """
    state, problem, num_fetched = model.state_dict(), None, 0

    def fetch(place: Place) -> Tensor:
        nonlocal num_fetched
        num_fetched += 1
        whole = gather(state[place.parameter], place)
        return torch.empty(0) if whole is None else whole

    sources = [
        Source(
            name,
            place.shape(state[place.parameter]),
            state[place.parameter].dtype,
            lambda place=place: fetch(place),
            name.endswith(ROUTER_BIAS),
        )
        for name, place in _stored_places(model).items()
    ]
    try:
        write_weights(sources, folder if dist.get_rank() == 0 else None, dtype, max_shard_bytes)
        if dist.get_rank() == 0:
            write_config(model, folder, dtype)
    except (CheckpointError, OSError, ValueError) as error:
        problem = error
    for source in sources[num_fetched:]:  # the others are still sending
        source.fetch()
    _agree(problem, folder)


def load_sharded(model: Policy, folder: Path, drop_mtp: bool = False) -> None:
    """Fill a parallelized policy from a checkpoint, each rank with its own rows; errors are those of `load_policy`."""
    state, problem = model.state_dict(), None
    targets = [_target(name, state[place.parameter], place) for name, place in _stored_places(model, False).items()]
    if isinstance(model, DeepseekPolicy):
        whole, repeated = places(model), shared_names(model.config)
        if model.config.tie_word_embeddings:
            repeated[HEAD] = EMBEDDING
        for name, of in repeated.items():
            targets.append(_target(name, state[whole[of].parameter], whole[of])._replace(alias=True))
    try:
        ignored = ignored_tensors(folder, model.config, drop_mtp) if isinstance(model, DeepseekPolicy) else ()
        load_weights(folder, targets, ignored)
    except (CheckpointError, OSError) as error:
        problem = error
    _agree(problem, folder)


def save_optimizer(model: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write an optimizer's state into a folder of its own; all ranks call it, each writes what it holds."""
    with _without_hints():
        dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder, no_dist=not dist.is_initialized())


def load_optimizer(model: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take up the state that `save_optimizer` wrote, on whatever number of ranks; also the groups' learning rates."""
    with _without_hints():
        state = get_optimizer_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_optimizer_state_dict(model, optimizer, state)


def _stored_places(model: Policy, repeated: bool = True) -> dict[str, Place]:
    """Every tensor of the policy's checkpoint; `repeated`: also what the prediction layers hold a second time."""
    stored = places(model)
    if repeated and isinstance(model, DeepseekPolicy):
        stored |= {name: stored[of] for name, of in shared_names(model.config).items()}
    return stored


def _target(name: str, tensor: Tensor, place: Place) -> Target:
    """The rows of a stored tensor that this rank holds."""
    piece = own_piece(tensor)
    rows = piece.overlap(place.expert, place.rows)
    if rows is None:
        return Target(name, place.shape(tensor), None)
    into = piece.view(local(tensor.detach()), place.expert, rows)
    return Target(name, place.shape(tensor), into, rows[0] - place.rows[0])


def _agree(problem: BaseException | None, folder: Path) -> None:
    """Raise on every rank when one has a problem: its own there, elsewhere a CheckpointError that names the rank."""
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    if failed := [f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]:
        raise CheckpointError(f"{folder}: other processes failed: {'; '.join(failed[:4])}")


@contextmanager
def _without_hints() -> Iterator[None]:
    with warnings.catch_warnings():
        # That no_dist was given, and that DTensor's own internals use what they deprecate.
        warnings.filterwarnings("ignore", module="torch.distributed")
        yield
