"""The learner's state as files that every rank writes its part of: optimizer, reference and a few numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from policy.atomic import CheckpointError
from policy.interface import Policy
from policy.sharded_checkpoint import load_optimizer, load_sharded, save_optimizer, save_sharded

OPTIMIZER, REFERENCE, COUNTERS = "optimizer", "reference", "learner.json"


def save_learner_state(
    folder: Path,
    model: Policy,
    optimizer: torch.optim.Optimizer,
    reference: Policy | None,
    counters: dict[str, Any],
) -> None:
    """Write into an existing folder, the same one on every rank; all ranks call it."""
    if dist.get_rank() == 0:
        (folder / COUNTERS).write_text(json.dumps(counters) + "\n", encoding="utf-8")
        if reference is not None:
            (folder / REFERENCE).mkdir()
    save_optimizer(model, optimizer, folder / OPTIMIZER)
    if reference is not None:
        save_sharded(reference, folder / REFERENCE)
    dist.barrier()


def load_learner_state(
    folder: Path, model: Policy, optimizer: torch.optim.Optimizer, reference: Policy | None
) -> dict[str, Any]:
    """The counters; optimizer and reference take up theirs. CheckpointError where files are missing or broken."""
    try:
        counters = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / COUNTERS} does not hold a learner's state: {error}") from error
    if reference is not None and not (folder / REFERENCE).is_dir():
        raise CheckpointError(
            f"{folder} has no {REFERENCE}: it was written by a run with algorithm.kl_coef = 0. Set it so again."
        )
    load_optimizer(model, optimizer, folder / OPTIMIZER)
    if reference is not None:
        load_sharded(reference, folder / REFERENCE)
    return counters
