"""Which implementation of an operation runs: by the device of its tensors, or by name."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from policy.kernels.errors import KernelUnavailableError

Backend = Literal["torch", "triton"]
# Hopper: the first with FP8 products of 1x128 and 128x128 scaled blocks in mind; what the kernels are compiled for.
MINIMUM_CAPABILITY = (9, 0)


def choose_backend(operation: str, tensor: Tensor, backend: Backend | None = None) -> Backend:
    """ "torch" for tensors on the CPU, "triton" on a GPU of capability 9.0 or above, or `backend` where it is given.

    Another GPU or device is a KernelUnavailableError that names `operation`, unless backend="torch" asks for the slow
    definition. backend="triton" on the CPU runs in triton's interpreter and needs it to be on.
    """
    if backend is not None:
        if backend not in get_args(Backend):
            raise ValueError(f"{operation}: backend must be 'torch', 'triton' or None (by device), not {backend!r}")
        return backend
    if tensor.device.type == "cpu":
        return "torch"
    if tensor.device.type != "cuda":
        raise KernelUnavailableError(f"{operation} runs on the CPU and on NVIDIA GPUs, not on {tensor.device}")
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < MINIMUM_CAPABILITY:
        raise KernelUnavailableError(
            f"{operation} needs a GPU of compute capability 9.0 (Hopper) or above; {tensor.device} is "
            f"{torch.cuda.get_device_name(tensor.device)} with {capability[0]}.{capability[1]}. "
            f'Use precision = "bf16", or another machine.'
        )
    return "triton"
