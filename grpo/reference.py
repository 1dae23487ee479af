"""The reference that the KL is measured against: a frozen policy beside the one that learns, spread as that one is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.interface import Policy
from policy.parallel import materialise, parallelize
from policy.sharding import local


def reference_of(model: Policy, *, expert_parallel: int = 1, precision: torch.dtype = torch.float32) -> Policy:
    """A frozen copy of the policy; of one that is spread over ranks, every rank copies its own shards."""
    if not isinstance(model, FSDPModule):
        return copy.deepcopy(model).eval().requires_grad_(False)
    with torch.device("meta"):
        empty: Any = DeepseekPolicy(model.config) if isinstance(model, DeepseekPolicy) else DensePolicy(model.config)
    reference: Policy = parallelize(empty, expert_parallel=expert_parallel, precision=precision)
    materialise(reference, next(model.parameters()).device)
    move_towards(reference, model, 1.0)
    return reference.eval().requires_grad_(False)


@torch.no_grad()
def move_towards(reference: Policy, model: Policy, share: float) -> None:
    """Reference becomes (1 - share) * itself + share * model; with a share of 1 exactly the model. Routing biases too."""
    theirs = model.state_dict()
    for name, value in reference.state_dict().items():
        own: Tensor = local(value)
        own.copy_(local(theirs[name])) if share == 1 else own.lerp_(local(theirs[name]), share)
