"""What processes that share one policy have in common, whoever trains it: joining, reading weights, and whose errors show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from policy.checkpoint import read_config
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.interface import Policy
from policy.parallel import materialise, parallelize
from policy.sharded_checkpoint import load_sharded
from rollout.cluster import Rank, RankError
from rollout.errors import UserError


def join(rank: Rank, *, num_threads: int, timeout_s: float) -> None:
    """Make this process one of the ranks: gloo, and NCCL with a GPU each where there are GPUs."""
    torch.set_num_threads(num_threads)
    backend = "gloo"
    if torch.cuda.is_available():
        if rank.count > torch.cuda.device_count():
            raise UserError(
                f"num_ranks={rank.count} exceeds this machine's {torch.cuda.device_count()} GPUs: each rank needs one of "
                "its own"
            )
        torch.cuda.set_device(rank.index)
        backend = "cpu:gloo,cuda:nccl"
    place: dict[str, Any] = {"init_method": rank.rendezvous} if rank.count > 1 else {"store": dist.HashStore()}
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, rank=rank.index, world_size=rank.count, timeout=limit, **place)


def spread_policy(weights_dir: Path, *, expert_parallel: int, dtype: str) -> Policy:
    """The policy of a checkpoint, spread over the process group; each rank reads its own rows from the files."""
    shape = read_config(weights_dir)
    with torch.device("meta"):
        model: Any = DeepseekPolicy(shape) if isinstance(shape, PolicyConfig) else DensePolicy(shape)
    parallelize(model, expert_parallel=expert_parallel, precision=getattr(torch, dtype))
    materialise(model, "cuda" if torch.cuda.is_available() else "cpu")
    load_sharded(model, weights_dir)
    return model


@contextmanager
def showing(own: tuple[type[BaseException], ...]) -> Iterator[None]:
    """A rank's error of one of these kinds is raised as itself; any other stays a RankError."""
    try:
        yield
    except RankError as error:
        if isinstance(error.cause, own):
            raise error.cause from error
        raise
