"""Plans of expanded rows: the definition against loops, the kernels against the definition, sizes that always suffice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.kernels import plan_triton
from policy.kernels.plan import BLOCK, Plan, plan, plan_rows
from tests.policy.kernels.interpreter import DEVICE


def plan_by_loops(indices: list[list[int]], num_experts: int, first_expert: int, num_rows: int) -> dict[str, list]:
    """Every field as nested lists: expert after expert, token after token, slot after slot."""
    offsets, owners, sources, slots = [0], [], [], []
    position = [[-1] * len(row) for row in indices]
    for expert in range(num_experts):
        for token, row in enumerate(indices):
            for slot, chosen in enumerate(row):
                if chosen == first_expert + expert:
                    position[token][slot] = len(sources)
                    sources.append(token)
                    slots.append(slot)
        while len(sources) % BLOCK:
            sources.append(-1)
            slots.append(-1)
        offsets.append(len(sources))
        owners += [expert] * (len(sources) // BLOCK - len(owners))
    rest = num_rows - len(sources)
    return {
        "expert_offsets": offsets,
        "tile_expert": owners + [-1] * (rest // BLOCK),
        "source_row": sources + [-1] * rest,
        "source_slot": slots + [-1] * rest,
        "position": position,
    }


def choices(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Different experts for each token, low numbers more often."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator) / torch.arange(1, num_experts + 1)
    return scores.argsort(-1, descending=True)[:, :top_k].to(DEVICE)


@given(
    st.integers(1, 4).flatmap(
        lambda top_k: st.lists(st.lists(st.integers(-1, 6), min_size=top_k, max_size=top_k), min_size=1, max_size=150)
    ),
    st.integers(1, 5),
    st.integers(0, 3),
)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_the_definition_is_the_loops(indices: list[list[int]], num_experts: int, first_expert: int) -> None:
    made = plan(torch.tensor(indices), num_experts, first_expert)
    num_rows = plan_rows(len(indices), len(indices[0]), num_experts)
    want = plan_by_loops(indices, num_experts, first_expert, num_rows)
    assert {name: field.tolist() for name, field in made._asdict().items()} == want
    assert {field.dtype for field in made} == {torch.int32}


CASES = {
    "several chunks, odd number of experts": (choices(400, 3, 6), 6, 0),
    "experts of others": (choices(200, 4, 9), 4, 3),
    "expert 1 has one row, 3 none": (torch.tensor([[0, 2]] * 130 + [[1, 0]], device=DEVICE), 4, 0),
    "exactly one tile": (torch.zeros(128, 1, dtype=torch.long, device=DEVICE), 2, 0),
    "none is ours": (torch.full((5, 2), 7, device=DEVICE), 3, 0),
    "replays of -1 and far numbers": (torch.tensor([[-1, 2**40], [0, -(2**40)], [1, 1]], device=DEVICE), 2, 0),
    "int32, many experts": (choices(20, 8, 160).int(), 160, 0),
    "one token, one expert": (torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), 1, 0),
    "no tokens": (torch.zeros(0, 2, dtype=torch.long, device=DEVICE), 3, 0),
    "not contiguous": (choices(2, 60, 64).T, 64, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_plan_is_the_definitions(name: str) -> None:
    made = plan(*CASES[name], backend="triton")
    want = plan(*CASES[name], backend="torch")
    for field in Plan._fields:
        assert torch.equal(getattr(made, field), getattr(want, field)), field


def test_sums_over_many_chunks_are_exact() -> None:
    """More chunks than one step of the sums takes, so that both loops run more than once."""
    num_chunks, num_experts = plan_triton.PREFIX_STEP + 3, plan_triton.PREFIX_BLOCK_E + 1
    counts = torch.randint(0, 1025, (num_chunks, num_experts), dtype=torch.int32, device=DEVICE)
    before, totals = counts.clone(), torch.empty(num_experts, dtype=torch.int32, device=DEVICE)
    plan_triton.prefix_kernel[(2,)](
        before, totals, num_chunks, num_experts, STEP=plan_triton.PREFIX_STEP, BLOCK_E=plan_triton.PREFIX_BLOCK_E
    )
    assert torch.equal(before, counts.cumsum(0).int() - counts)
    assert torch.equal(totals, counts.sum(0).int())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_rows_suffice_where_every_expert_wastes_a_tile(backend: str) -> None:
    num_experts = 7
    indices = torch.arange(num_experts, device=DEVICE)[:, None]
    made = plan(indices, num_experts, backend=backend)
    assert made.expert_offsets[-1] == num_experts * BLOCK <= plan_rows(num_experts, 1, num_experts)
    assert made.position.flatten().tolist() == [expert * BLOCK for expert in range(num_experts)]


def test_errors_say_what_is_wrong_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"int32 or int64 \[T, k\], not torch.float32 \[3\]"):
        plan(torch.zeros(3), 2)
    with pytest.raises(ValueError, match="needs experts, not 0"):
        plan(torch.zeros(3, 1, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="smaller micro-batches"):
        plan(torch.zeros(1, 1, dtype=torch.long).expand(2**28, 8), 2)
