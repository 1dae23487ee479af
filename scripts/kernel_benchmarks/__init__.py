"""What scripts/bench_kernels.py measures: every `bench_*` module here has `cases(shapes, device) -> list[BenchCase]`.

Nothing here needs more than torch and policy/; peers are used where they can be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """An expert layer: T tokens with k choices each among E experts, widths D (model) and F (expert)."""

    name: str
    num_tokens: int
    top_k: int
    num_experts: int
    hidden: int
    width: int

    @property
    def rows(self) -> int:
        """Rows that experts compute, padding left out."""
        return self.num_tokens * self.top_k


# Rows per expert: 4096 and 2048 (a rank's share of DeepSeek-V3's 256 experts), 768 and 3072 (DeepSeek-V2-Lite's 64).
SHAPES = (
    Shape("V3 E=8", 16384, 2, 8, 7168, 2048),
    Shape("V3 E=32", 16384, 4, 32, 7168, 2048),
    Shape("V2-Lite 8k", 8192, 6, 64, 2048, 1408),
    Shape("V2-Lite 32k", 32768, 6, 64, 2048, 1408),
)


@dataclass(frozen=True)
class Contenders:
    """What is timed, on inputs that exist: each gives what `error` compares with the truth, 0 being right.

    The first of `ours` is what the policy runs, the others are its variants. An `exact` peer computes the same numbers as
    ours and is checked; the others compute something near it (bf16, other scales), and their error is only shown.
    """

    ours: dict[str, Callable[[], Any]]
    error: Callable[[Any], float]
    tolerance: float
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchCase:
    """One operation on one shape: its arithmetic, the bytes it can't do without, and how to make its contenders.

    `precision` is that of its matrix products, which the floor is taken from.
    """

    name: str
    shape: str
    prepare: Callable[[], Contenders]
    flops: float = 0.0
    bytes: float = 0.0
    precision: Literal["fp8", "bf16"] = "fp8"


def normal(*shape: int, device: str, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gaussian numbers, the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(shape, dtype=dtype, device=device)
    for part in out.view(-1, shape[-1]).split(65536):  # float32 of all at once would be most of the memory
        part.copy_(torch.randn(part.shape, generator=generator, device=device) * scale)
    return out


def balanced_choices(shape: Shape, device: str) -> Tensor:
    """Choices [T, k] that give every expert as many rows, spread over all tokens."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(shape.num_tokens, generator=generator)[:, None] * shape.top_k
    return ((order + torch.arange(shape.top_k)) % shape.num_experts).to(device)


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Frobenius; infinite where anything is NaN."""
    error = float((got.detach().double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def sampled(num_rows: int, device: str, count: int = 64) -> Tensor:
    """Some row numbers, ascending."""
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(num_rows, generator=generator)[:count].sort().values.to(device)
