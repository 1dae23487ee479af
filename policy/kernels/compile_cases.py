"""What a kernel module says of its kernels so that they compile without a GPU, and what compiling them must show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel with the types and constants of one of its launches.

    name: unique among all modules, e.g. "grouped_gemm/tma"; kernel: the `@triton.jit` function; signature: the triton
    type of every run-time argument ("*fp8e4nv", "*bf16", "*i32", "fp32", "i32", ..); constants: the value of every
    `tl.constexpr` argument (an int of 1 or None goes here too); aligned: the names of whole-number arguments that are
    known multiples of 16, as pointers are taken to be; default: False for a configuration that is not launched unless
    asked for, which may therefore spill.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    default: bool = True


@dataclass(frozen=True)
class Figures:
    """What the assembler made of a case: per thread registers and spilled bytes, shared memory of a block, and counts.

    qgmma and hgmma are Hopper's matrix instructions on FP8 and on 16-bit operands, tma its bulk tensor loads and stores,
    fp8_products the products of FP8 tiles in the source.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    qgmma: int
    hgmma: int
    tma: int
    fp8_products: int
    default: bool


Table = dict[
    str, dict[str, Any]
]  # case name -> its Figures as a dict, what the committed table holds per triton version


def problems(recorded: Table, compiled: Mapping[str, Figures]) -> list[str]:
    """What must not be in `compiled`, and where it differs from the `recorded` table, a line each."""
    found: list[str] = []
    for name, figures in sorted(compiled.items()):
        if figures.default and figures.spill_bytes:
            found.append(f"{name}: a default configuration spills {figures.spill_bytes} bytes per thread")
        if figures.fp8_products and not figures.qgmma:
            found.append(f"{name}: multiplies FP8 tiles without QGMMA")
        if name not in recorded:
            found.append(f"{name}: is not in the table")
            continue
        now = asdict(figures)
        for field in fields(Figures):
            before = recorded[name].get(field.name)
            if before != now[field.name]:
                found.append(f"{name}: {field.name} was {before}, is {now[field.name]}")
    found += [f"{name}: in the table, but no such case is left" for name in sorted(set(recorded) - set(compiled))]
    return found
