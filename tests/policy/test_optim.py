"""Parameter groups, schedules, and Muon against torch's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from policy.layer_groups import layer_group
from policy.optim import Muon, orthogonalise, parameter_groups, warmup_constant, warmup_then_linear
from tests.policy.builders import TINY, tiny_policy


def test_groups_carry_every_parameter_once_with_its_rate() -> None:
    model = tiny_policy(replace(TINY, q_lora_rank=20))
    groups = parameter_groups(model, 1e-3, 0.1, {"norms": 100.0, "head": 10.0})
    by_name = {group["name"]: group for group in groups}
    assert by_name["norms"]["lr"] == pytest.approx(0.1)
    assert by_name["head"]["lr"] == pytest.approx(1e-2)
    assert {by_name[name]["lr"] for name in by_name.keys() - {"norms", "head"}} == {1e-3}
    assert by_name["norms"]["weight_decay"] == 0.0
    assert {by_name[name]["weight_decay"] for name in by_name.keys() - {"norms"}} == {0.1}
    carried = {id(p): group["name"] for group in groups for p in group["params"]}
    assert carried == {id(p): layer_group(name) for name, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(carried)
    torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize("name", ["nrms", "router_bias"])
def test_a_scale_that_no_parameter_takes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"lr_scale names \['{name}'\].*norms"):
        parameter_groups(tiny_policy(), 1e-3, 0.0, {"norms": 2.0, name: 3.0})


def test_norms_do_not_decay_and_the_rest_does() -> None:
    model = tiny_policy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, 0.5, {"head": 2.0}), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    factors = {"norms": 1.0, "head": 0.9}
    for name, parameter in model.named_parameters():
        expected = before[name] * factors.get(layer_group(name), 0.95)
        assert torch.allclose(parameter, expected, atol=1e-7), name


def test_warmup_rises_to_one_and_stays() -> None:
    factor = warmup_constant(4)
    assert [factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_constant(0)(0) == 1.0


def test_warmup_then_linear_falls_to_zero_at_the_end() -> None:
    factor = warmup_then_linear(2, 6, 10)
    assert [factor(step) for step in range(11)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert factor(12) == 0
    assert [warmup_then_linear(0, 3, 3)(step) for step in range(4)] == [1, 1, 1, 0]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 20), st.integers(0, 60), st.integers(1, 60), st.integers(0, 80))
def test_the_factor_of_a_schedule_is_between_zero_and_one(warmup: int, decay: int, extra: int, step: int) -> None:
    factor = warmup_then_linear(warmup, decay, decay + extra)
    assert 0 <= factor(step) <= 1
    assert factor(step + 1) <= factor(step) or step < warmup


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (5, 12, 30), (5, 30, 12), (2, 3, 10, 8)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    x = 1e-4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(x, num_iterations=7 if shape == (24, 24) else 5)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.65
    assert values.max() < 1.25
    # The singular vectors stay, so it is the polar factor up to those values and bfloat16's rounding.
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ result @ vh.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.norm() < 0.1 * inner.norm()


def test_stacked_matrices_are_taken_one_by_one() -> None:
    scales = torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    x = scales * torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(1))
    for stack in (x, x.mT):
        alone = torch.stack([orthogonalise(matrix) for matrix in stack])
        assert torch.allclose(orthogonalise(stack), alone, atol=0.05)  # of bfloat16's rounding; entries are near 0.3


def test_a_zero_gradient_stays_zero_and_types_are_kept() -> None:
    assert orthogonalise(torch.zeros(3, 4, 5)).abs().max() == 0
    half = orthogonalise(torch.randn(8, 16, generator=torch.Generator().manual_seed(2)).bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_muon_is_torchs_on_matrices_and_one_per_expert_on_stacks(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2, *shape, generator=generator)
    gradients = [torch.randn(2, *shape, generator=generator) for _ in range(4)]
    stacked = nn.Parameter(start.clone())
    singles = [nn.Parameter(matrix.clone()) for matrix in start]
    ours = Muon([stacked], lr=0.05, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.Muon(singles, lr=0.05, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        stacked.grad = gradient.clone()
        for single, own in zip(singles, gradient, strict=True):
            single.grad = own.clone()
        ours.step()
        theirs.step()
    moved = stacked.detach() - start
    gap = stacked.detach() - torch.stack([single.detach() for single in singles])
    assert moved.abs().max() > 0.05
    # Both iterate in bfloat16 and round at different places; another momentum or scale is off by far more.
    assert gap.norm() < 0.06 * moved.norm()


def test_muon_leaves_alone_what_has_no_gradient() -> None:
    frozen, learning = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([frozen, learning], lr=0.1, weight_decay=0.5)
    learning.grad = torch.eye(3, 4)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3, 4))
    assert not torch.equal(learning, torch.ones(3, 4))
    assert frozen not in optimizer.state
