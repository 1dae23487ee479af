"""Triton kernels of plan.py: count, add up, place. Counts and ranks come from comparisons and prefix sums, not atomics.

Choices are read in chunks, each chunk twice: once to count its experts and once, when everyone knows where its rows
begin, to place them. The order of rows therefore follows from the choices alone.
"""
# Kernels are Python in syntax only, which the type checker can't know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.compile_cases import CompileCase
from policy.kernels.plan import BLOCK, Plan, plan_rows

CHUNK = 1024  # choices per program
PREFIX_BLOCK_E, PREFIX_STEP = 16, 64  # experts per program and chunks per step of the sums
TILES = 8  # tiles of rows per program whose padding is marked
NUM_WARPS = 4


def _step(experts: int) -> int:
    """Choices compared at a time with `experts` experts: as many as registers hold."""
    return min(max(8192 // experts, 16), 256)


@triton.jit
def load_own(indices, choice, num_choices, first_expert, num_experts):
    """Our number of each choice's expert, -1 where it is not ours."""
    own = tl.load(indices + choice, mask=choice < num_choices, other=-1).to(tl.int64) - first_expert
    return tl.where((own >= 0) & (own < num_experts) & (choice < num_choices), own, -1).to(tl.int32)


@triton.jit
def count_kernel(
    indices, counts, num_choices, first_expert, num_experts,
    CHUNK: tl.constexpr, STEP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """counts [chunks, E]: how often each chunk chose each expert."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, CHUNK, STEP):
        choice = chunk * CHUNK + start + tl.arange(0, STEP)
        own = load_own(indices, choice, num_choices, first_expert, num_experts)
        total += tl.sum((own[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + chunk.to(tl.int64) * num_experts + expert, total, mask=expert < num_experts)


@triton.jit
def prefix_kernel(counts, totals, num_chunks, num_experts, STEP: tl.constexpr, BLOCK_E: tl.constexpr):
    """Turns counts [chunks, E] into those of all chunks before, in place, and adds up totals [E]."""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    running = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_chunks, STEP):
        chunk = start + tl.arange(0, STEP)
        place = counts + chunk.to(tl.int64)[:, None] * num_experts + expert[None, :]
        mask = (chunk < num_chunks)[:, None] & (expert < num_experts)[None, :]
        count = tl.load(place, mask=mask, other=0)
        tl.store(place, tl.cumsum(count, 0) - count + running[None, :], mask=mask)
        running += tl.sum(count, 0)
    tl.store(totals + expert, running, mask=expert < num_experts)


@triton.jit
def place_kernel(
    indices, counts, totals, expert_offsets, tile_expert, source_row, source_slot, position,
    num_choices, num_chunks, num_tiles, first_expert, num_experts,
    TOP_K: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Places the choices of a chunk, and marks the padding and the owners of TILES tiles."""
    program = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    ours = expert < num_experts
    total = tl.load(totals + expert, mask=ours, other=0)
    padded = (total + 127) // 128 * 128
    end = tl.cumsum(padded, 0)
    begin = end - padded
    if program == 0:
        tl.store(expert_offsets + expert, begin, mask=ours)
        tl.store(expert_offsets + 1 + expert, end, mask=expert == num_experts - 1)

    if program < num_chunks:
        running = begin + tl.load(counts + program.to(tl.int64) * num_experts + expert, mask=ours, other=0)
        for start in range(0, CHUNK, STEP):
            choice = program * CHUNK + start + tl.arange(0, STEP)
            own = load_own(indices, choice, num_choices, first_expert, num_experts)
            hit = (own[:, None] == expert[None, :]).to(tl.int32)
            rank = tl.cumsum(hit, 0) - 1
            row = tl.sum(hit * (rank + running[None, :]), 1)
            tl.store(position + choice, tl.where(own >= 0, row, -1), mask=choice < num_choices)
            tl.store(source_row + row, choice // TOP_K, mask=own >= 0)
            tl.store(source_slot + row, choice % TOP_K, mask=own >= 0)
            running += tl.sum(hit, 0)

    tile = program * TILES + tl.arange(0, TILES)
    behind = (end[None, :] <= tile[:, None] * 128) & ours[None, :]
    owner = tl.sum(behind.to(tl.int32), 1)
    tl.store(tile_expert + tile, tl.where(owner < num_experts, owner, -1), mask=tile < num_tiles)
    owned = (owner[:, None] == expert[None, :]) & ours[None, :]
    last = tl.sum(tl.where(owned, (begin + total)[None, :], 0), 1)  # 0 for the tiles of nobody
    row = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    padding = (row >= last[:, None]) & (tile < num_tiles)[:, None]
    nothing = tl.full((TILES, 128), -1, tl.int32)
    tl.store(source_row + row, nothing, mask=padding)
    tl.store(source_slot + row, nothing, mask=padding)


def plan(indices: Tensor, num_experts: int, first_expert: int) -> Plan:
    num_tokens, top_k = indices.shape
    num_rows, num_choices = plan_rows(num_tokens, top_k, num_experts), indices.numel()
    num_tiles, num_chunks = num_rows // BLOCK, triton.cdiv(num_choices, CHUNK)
    experts = triton.next_power_of_2(num_experts)
    shape = {"STEP": _step(experts), "EXPERTS": experts, "CHUNK": CHUNK}

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=indices.device)

    counts, totals = empty(num_chunks, num_experts), empty(num_experts)
    made = Plan(empty(num_experts + 1), empty(num_tiles), empty(num_rows), empty(num_rows), empty(num_tokens, top_k))
    with torch.cuda.device_of(indices):
        if num_chunks:
            count_kernel[(num_chunks,)](
                indices, counts, num_choices, first_expert, num_experts, **shape, num_warps=NUM_WARPS
            )
        prefix_kernel[(triton.cdiv(num_experts, PREFIX_BLOCK_E),)](
            counts, totals, num_chunks, num_experts,
            STEP=PREFIX_STEP, BLOCK_E=PREFIX_BLOCK_E, num_warps=NUM_WARPS,
        )  # fmt: skip
        place_kernel[(max(num_chunks, triton.cdiv(num_tiles, TILES)),)](
            indices, counts, totals, *made, num_choices, num_chunks, num_tiles, first_expert, num_experts,
            TOP_K=max(top_k, 1), TILES=TILES, **shape, num_warps=NUM_WARPS,
        )  # fmt: skip
    return made


def _cases(experts: int) -> list[CompileCase]:
    shape = {"STEP": _step(experts), "EXPERTS": experts, "CHUNK": CHUNK}
    sizes = dict.fromkeys(("num_choices", "first_expert", "num_experts"), "i32")
    counted = {"indices": "*i64", "counts": "*i32", **sizes}
    placed = dict.fromkeys(("totals", *Plan._fields), "*i32") | dict.fromkeys(("num_chunks", "num_tiles"), "i32")
    constants = shape | {"TOP_K": 8, "TILES": TILES}
    return [
        CompileCase(f"plan/count_{experts}", count_kernel, counted, shape, NUM_WARPS),
        CompileCase(f"plan/place_{experts}", place_kernel, counted | placed, constants, NUM_WARPS),
    ]


COMPILE_CASES = [
    *_cases(8),
    *_cases(256),
    CompileCase(
        "plan/prefix",
        prefix_kernel,
        {"counts": "*i32", "totals": "*i32", "num_chunks": "i32", "num_experts": "i32"},
        {"STEP": PREFIX_STEP, "BLOCK_E": PREFIX_BLOCK_E},
        NUM_WARPS,
    ),
]
