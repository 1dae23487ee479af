"""Routing from logits: the definition is the policy's router, the kernels choose and weigh as the definition does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.deepseek import Router
from policy.kernels.route import route
from tests.policy.builders import TINY
from tests.policy.kernels.interpreter import DEVICE

# NumPy announces what the kernels are to compute.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
V3 = {"num_groups": 8, "topk_group": 4, "top_k": 8, "normalise": True, "scale": 2.5}
V2 = {"num_groups": 8, "topk_group": 3, "top_k": 6, "normalise": False, "scale": 16.0}
V2 |= {"scoring": "softmax", "group_score": "max"}
V2_LITE = V2 | {"num_groups": 1, "topk_group": 1, "scale": 1.0}
SMALL = {"num_groups": 3, "topk_group": 2, "top_k": 3, "normalise": True, "scale": 1.5}
# Rules with numbers of experts; groups of 20 and of 3 and 5 experts leave lanes of the kernel empty.
RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "V3": (256, V3),
    "V2": (160, V2),
    "V2-Lite": (64, V2_LITE),
    "three groups of three, normalised softmax": (9, SMALL | {"scoring": "softmax"}),
    "sigmoid, groups by their best, not normalised": (15, SMALL | {"group_score": "max", "normalise": False}),
    "five experts, all chosen": (5, SMALL | {"num_groups": 1, "topk_group": 1, "top_k": 5}),
    "one expert": (1, SMALL | {"num_groups": 1, "topk_group": 1, "top_k": 1}),
}
EVERY_RULE = pytest.mark.parametrize("name", RULES)


def logits_for(name: str, num_tokens: int = 37, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits [T, E], a bias [E] and the rule."""
    num_experts, rule = RULES[name]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator) * 2
    return logits.to(DEVICE), (torch.randn(num_experts, generator=generator) * 0.1).to(DEVICE), rule


def by_backend(backend: str, logits: Tensor, *args: Any, slope: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    """Experts, weights, and the gradient of logits where the weights' is `slope`."""
    leaf = logits.clone().requires_grad_()
    indices, weights = route(leaf, *args, backend=backend, **kwargs)  # type: ignore[arg-type]
    weights.backward(slope)
    assert leaf.grad is not None
    return indices, weights.detach(), leaf.grad


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        {"topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ],
)
def test_the_definition_is_the_policys_router(changes: dict[str, Any], ties: bool) -> None:
    """The same experts in the same order, weights and gradients to the last bit, with a replay and without."""
    config = replace(TINY, n_routed_experts=16, num_experts_per_tok=4, **changes)
    router = Router(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(16, config.hidden_size))  # so that logits are the first values of x
    x = torch.randn(60, config.hidden_size, generator=generator)
    x = x.round() if ties else x
    bias = None
    if config.topk_method == "noaux_tc":
        bias = router.e_score_correction_bias.normal_(generator=generator)
    slope = torch.randn(60, 4, generator=generator)
    replay = torch.randint(-1, 16, (60, 4), generator=generator)
    for given_choice in (None, replay):
        leaf = x.clone().requires_grad_()
        want = router(leaf, given_choice)
        (grad,) = torch.autograd.grad(want.gates, leaf, slope)
        experts, gates, grad_logits = by_backend(
            "torch", x[:, :16], bias, slope=slope, replay=given_choice,
            num_groups=config.n_group, topk_group=config.topk_group, top_k=4, scoring=config.scoring_func,
            normalise=config.norm_topk_prob, scale=config.routed_scaling_factor,
            group_score="top2_sum" if bias is not None else "max",
        )  # fmt: skip
        assert torch.equal(experts, want.experts)
        assert torch.equal(gates, want.gates.detach())
        assert torch.equal(grad_logits, grad[:, :16])


@EVERY_RULE
@pytest.mark.parametrize("biased", [True, False])
def test_the_kernels_are_the_definition(name: str, biased: bool) -> None:
    logits, bias, rule = logits_for(name)
    given_bias = bias if biased else None
    slope = torch.randn(37, rule["top_k"], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got, want = (by_backend(b, logits, given_bias, slope=slope, **rule) for b in ("triton", "torch"))
    assert got[0].dtype == torch.int64
    assert torch.equal(got[0], want[0])
    assert torch.allclose(got[1], want[1], rtol=2e-6, atol=0)
    assert torch.allclose(got[2], want[2], rtol=1e-5, atol=2e-7 * rule["scale"])


@EVERY_RULE
def test_gradients_are_those_of_float64(name: str) -> None:
    logits, bias, rule = logits_for(name, num_tokens=5)
    slope = torch.randn(5, rule["top_k"], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    indices, _, grad = by_backend("triton", logits, bias, slope=slope, **rule)
    wide = logits.double().requires_grad_()
    scores = wide.softmax(-1) if rule.get("scoring") == "softmax" else wide.sigmoid()
    weights = scores.gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if rule["normalise"] else weights
    (want,) = torch.autograd.grad(weights * rule["scale"], wide, slope.double())
    assert torch.allclose(grad.double(), want, rtol=1e-5, atol=3e-7 * rule["scale"])


def test_replayed_experts_are_weighed_by_todays_scores() -> None:
    logits, bias, rule = logits_for("V2-Lite")
    replay = torch.randint(0, 64, (37, 6), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    replay[4] = -1
    replay[5] = torch.tensor([7, 7, 3, -1, -1, 0])  # repeated: both weights count in the gradient
    slope = torch.randn(37, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got, want = (by_backend(b, logits, bias, slope=slope, replay=replay, **rule) for b in ("triton", "torch"))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[0][:4], replay[:4])
    assert torch.equal(got[0][4], route(logits[4:5], bias, **rule)[0][0])
    assert torch.allclose(got[1], want[1], rtol=2e-6, atol=0)
    assert torch.allclose(got[2], want[2], rtol=1e-5, atol=2e-7)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=8, max_size=8), min_size=1, max_size=8))
def test_of_equal_scores_the_kernel_takes_the_lower_expert(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows, device=DEVICE)
    rule: dict[str, Any] = {"num_groups": 4, "topk_group": 2, "top_k": 3, "normalise": False, "scale": 1.0}
    indices, weights = route(logits, **rule, group_score="max", backend="triton")
    for row, chosen, weight in zip(rows, indices.tolist(), weights.tolist(), strict=True):
        groups = sorted(range(4), key=lambda group: (-max(row[2 * group : 2 * group + 2]), group))[:2]
        allowed = [expert for expert in range(8) if expert // 2 in groups]
        want = sorted(allowed, key=lambda expert: (-row[expert], expert))[:3]
        assert chosen == want
        assert weight == pytest.approx(torch.tensor([row[expert] for expert in want]).sigmoid().tolist(), rel=1e-6)


def test_saturated_scores_choose_different_experts() -> None:
    """All scores 0 or all 1: still k different experts of allowed groups, finite weights."""
    rule = RULES["V3"][1]
    for value in (-torch.inf, -200.0, 200.0, torch.inf):
        indices, weights = route(torch.full((3, 256), value, device=DEVICE), **rule, backend="triton")
        assert indices.tolist() == [list(range(8))] * 3
        assert torch.equal(weights, torch.full((3, 8), 2.5 / 8 if value > 0 else 0.0, device=DEVICE))


@EVERY_RULE
def test_experts_forbidden_by_a_bias_of_minus_infinity_come_last(name: str) -> None:
    """More are chosen than the last two, which are allowed: each of the others once then, and nothing that is no expert."""
    logits, bias, rule = logits_for(name)
    forbidden = max(len(bias) - 2, 0)
    bias[:forbidden] = -torch.inf
    indices, _ = route(logits, bias, **rule, backend="triton")
    assert (indices[:, :2] >= forbidden).all()
    for chosen in indices.tolist():
        assert len(set(chosen)) == rule["top_k"]
        assert 0 <= min(chosen) <= max(chosen) < len(bias)


def test_where_too_few_are_allowed_the_rest_are_experts_too() -> None:
    """Groups of three take four lanes: the fourth is no expert, not even in a group that was not chosen."""
    bias = torch.full((9,), -torch.inf, device=DEVICE)
    bias[[3, 6]] = 0  # so that the first group is not chosen, and its experts are the first of those forbidden
    rule: dict[str, Any] = SMALL | {"group_score": "max", "top_k": 6}
    indices, _ = route(torch.zeros(2, 9, device=DEVICE), bias, **rule, backend="triton")
    assert indices.tolist() == [[3, 6, 0, 1, 2, 4]] * 2


@EVERY_RULE
def test_an_expert_with_a_bias_of_nan_comes_first_as_in_torch(name: str) -> None:
    logits, bias, rule = logits_for(name)
    bias[-1] = -torch.tensor(torch.nan)  # whose bits are the least of all
    for backend in ("triton", "torch"):
        indices, _ = route(logits, bias, **rule, backend=backend)
        assert (indices[:, 0] == len(bias) - 1).all()


@EVERY_RULE
def test_nan_stays_in_its_token_and_choices_are_experts(name: str) -> None:
    logits, bias, rule = logits_for(name)
    broken = logits.clone()
    broken[3] = torch.nan
    broken[5, 0], broken[6, 0] = torch.nan, -torch.tensor(torch.nan)  # either sign
    slope = torch.ones(37, rule["top_k"], device=DEVICE)
    whole, got = (by_backend("triton", x, bias, slope=slope, **rule) for x in (logits, broken))
    others = [token for token in range(37) if token not in (3, 5, 6)]
    for before, after in zip(whole, got, strict=True):
        assert torch.equal(before[others], after[others])
    for token in (3, 5, 6):
        chosen = got[0][token].tolist()
        assert len(set(chosen)) == rule["top_k"]
        assert 0 <= min(chosen) <= max(chosen) < len(bias)
    assert got[1][3].isnan().all()
    if rule.get("scoring") != "softmax":  # which makes all of the token NaN
        assert got[0][5:7, 0].tolist() == [0, 0]  # the largest of all, as in torch


@EVERY_RULE
def test_a_token_does_not_depend_on_the_others(name: str) -> None:
    logits, bias, rule = logits_for(name)
    slope = torch.randn(37, rule["top_k"], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    together = by_backend("triton", logits, bias, slope=slope, **rule)
    for part in (slice(0, 37), slice(20, 21), slice(30, 37)):
        alone = by_backend("triton", logits[part], bias, slope=slope[part], **rule)
        assert all(torch.equal(one, all_[part]) for one, all_ in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens(backend: str) -> None:
    logits, bias, rule = logits_for("V3", num_tokens=0)
    indices, weights, grad = by_backend(backend, logits, bias, slope=torch.ones(0, 8, device=DEVICE), **rule)
    assert (indices.shape, weights.shape, grad.shape) == ((0, 8), (0, 8), (0, 256))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_groups": 5}, "16 experts do not make 5 groups"),
        ({"topk_group": 5}, "of which 5 are chosen"),
        ({"top_k": 9}, "top_k=9 of 8 experts in 2 groups"),
        ({"num_groups": 16, "topk_group": 8}, "needs groups of two"),
        ({"bias": torch.zeros(4)}, r"bias must be float32 \[16\]"),
        ({"replay": torch.zeros(2, 3)}, r"replay must be int64 \[2, 2\]"),
        ({"logits": torch.zeros(2, 16).bfloat16()}, r"logits must be float32 \[T, E\], not torch.bfloat16"),
    ],
)
def test_unfit_input_is_refused(changes: dict[str, Any], says: str) -> None:
    rule = {"num_groups": 4, "topk_group": 2, "top_k": 2, "normalise": True, "scale": 1.0}
    with pytest.raises(ValueError, match=says):
        route(**({"logits": torch.zeros(2, 16)} | rule | changes))
