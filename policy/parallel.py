"""A policy over several processes: every layer's weights sharded (FSDP2), experts split over ranks; no model file knows.

Ranks form a grid of world / expert_parallel rows and expert_parallel columns. The experts of one layer are split over the
columns of a row; each part is sharded over the rows. Everything else is sharded over all ranks. Every parameter's
element, gradient and optimizer state therefore lies on one rank only.

The law of gradients: a step's losses are sums that were normalised over all ranks before, so a gradient is the *sum* over
ranks of what each computed, and nothing is divided.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import implicit_replication

from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.expert_parallel import ParallelExperts
from policy.interface import Policy

P = TypeVar("P", DeepseekPolicy, DensePolicy)


class ParallelismError(ValueError):
    """A policy that can't be laid out over these processes; the message says which number to change."""


def parallelize(
    model: P,
    *,
    expert_parallel: int = 1,
    precision: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
) -> P:
    """Shard the policy in place over all processes of the default group; returns it.

    Every rank passes the same weights, or a policy on the meta device, which `materialise` then gives memory. Products
    run in `precision`, gradients are summed in fp32. With `reshard_after_forward` false, layers stay whole until their
    backward: faster, at the memory of a whole policy. Sizes that do not divide are a ParallelismError.
    """
    _check(model, expert_parallel)
    device = _device_type()
    everyone = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("all",))
    # Inputs are not cast: angles of the rotary embedding stay in fp32.
    mixed = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mp_policy": mixed, "reshard_after_forward": reshard_after_forward}
    if expert_parallel > 1:
        shape = (dist.get_world_size() // expert_parallel, expert_parallel)
        grid = init_device_mesh(device, shape, mesh_dim_names=("rows", "columns"))
        for block in model.moe_blocks.values():
            block.experts = ParallelExperts(block.experts, grid["columns"])  # type: ignore[assignment]
            fully_shard(block.experts, mesh=grid["rows"], shard_placement_fn=_placement(grid), **options)
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone, **options)
    # The root too is sharded after forward, or its parameters would stay whole when no backward follows.
    fully_shard(model, mesh=everyone, mp_policy=mixed, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # FSDP takes the mean by default
            module.set_force_sum_reduction_for_comms(True)
    return model


def materialise(model: Policy, device: torch.device | str) -> None:
    """Give a parallelized policy that was built on the meta device memory for its own shards, and its first buffers."""
    model.to_empty(device=device)
    model.reset_buffers()


def initialise(model: Policy, seed: int) -> None:
    """The weights of `reset_parameters(seed)`, of which every rank draws all, one tensor at a time, and keeps its own."""
    with implicit_replication():
        model.reset_parameters(seed)


@torch.no_grad()
def global_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients, over all ranks' shards when there are any; the same number on every rank."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    total = _sum_of_squares(shards, grads)
    if len(shards):
        dist.all_reduce(total)
    return (total + _sum_of_squares([grad for grad in grads if not isinstance(grad, DTensor)], grads)).sqrt().float()


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm over all ranks is at most `max_norm`; returns the norm before that."""
    parameters = list(parameters)
    norm = global_grad_norm(parameters)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor)
    return norm


def sum_over_ranks(tensor: Tensor) -> None:
    """Add up a tensor over all ranks, in place: what `balance_experts` asks for as `all_reduce`."""
    dist.all_reduce(tensor)


def _sum_of_squares(tensors: list[Tensor], like: list[Tensor]) -> Tensor:
    device = like[0].device if like else torch.device("cpu")
    squares = [torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square() for tensor in tensors]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)


def _placement(grid: DeviceMesh) -> Any:
    """How a row's experts are cut for the ranks of a column: whole experts where that comes out even, else their rows."""

    def cut(parameter: nn.Parameter) -> Shard:
        return Shard(0 if len(parameter) // grid["columns"].size() % grid["rows"].size() == 0 else 1)

    return cut


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend_config() else "cpu"


def _check(model: Policy, expert_parallel: int) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise ParallelismError(
            "no process group: start with torchrun and call torch.distributed.init_process_group first"
        )
    if isinstance(model, FSDPModule):
        raise ParallelismError("this policy is already spread over the processes")
    world = dist.get_world_size()
    if expert_parallel < 1 or world % expert_parallel:
        raise ParallelismError(
            f"expert_parallel={expert_parallel} does not divide the {world} processes; choose a divisor of {world}"
        )
    if expert_parallel == 1:
        return
    if not isinstance(model, DeepseekPolicy) or not model.moe_blocks:
        raise ParallelismError(f"expert_parallel={expert_parallel}, but this policy has no experts; set it to 1")
    count, rows = model.config.n_routed_experts, world // expert_parallel
    if count % expert_parallel:
        raise ParallelismError(
            f"expert_parallel={expert_parallel} does not divide n_routed_experts={count}; choose a divisor of both "
            f"{count} and {world}"
        )
    sizes = (2 * model.config.moe_intermediate_size, model.config.hidden_size)
    if count // expert_parallel % rows and any(size % rows for size in sizes):
        raise ParallelismError(
            f"the {rows} ranks that share {count // expert_parallel} experts can divide neither these nor their rows "
            f"({sizes[0]} and {sizes[1]}): choose another expert_parallel or number of processes"
        )
