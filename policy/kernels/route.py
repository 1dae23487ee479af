"""Which k experts a token goes to, and with what weight, from the router's logits: DeepSeek-V2's and V3's rules.

V3 (arXiv 2412.19437, 2.1.2): sigmoid scores, a bias for the choice alone, groups by the sum of their two best. V2
(arXiv 2405.04434, 2.1.2): softmax scores, groups by their best. T tokens, E experts, k = top_k.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from policy.kernels.dispatch import Backend, choose_backend

TINY_SUM = 1e-20  # added to the sum of the chosen scores, as in DeepSeek's release


class RouteRule(NamedTuple):
    """How experts are chosen and weighed; `route` names the fields."""

    num_groups: int
    topk_group: int
    top_k: int
    scoring: Literal["sigmoid", "softmax"]
    normalise: bool
    scale: float
    group_score: Literal["top2_sum", "max"]


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    num_groups: int = 1,
    topk_group: int = 1,
    top_k: int,
    scoring: Literal["sigmoid", "softmax"] = "sigmoid",
    normalise: bool,
    scale: float,
    group_score: Literal["top2_sum", "max"] = "top2_sum",
    replay: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts [T, k] (int64, best first) and their weights [T, k] (float32, differentiable in logits [T, E] float32).

    The choice goes by score + `bias` [E] among the `topk_group` best of `num_groups` groups of experts, a group being as
    good as its best score ("max") or its two best ("top2_sum"). Weights are the scores without bias, divided by their
    sum with `normalise`, times `scale`. Where `replay` [T, k] is not negative, it is the choice. Of equal scores the
    kernel takes the lower expert, torch whichever its topk takes; NaN counts as the largest in both.
    """
    rule = RouteRule(num_groups, topk_group, top_k, scoring, normalise, scale, group_score)
    _check(logits, bias, rule, replay)
    if choose_backend("route", logits, backend) == "triton":
        indices, weights = _Route.apply(logits.contiguous(), bias, rule, replay)  # type: ignore[misc]
        return indices, weights
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    indices = _choose(scores.detach(), bias, rule)
    if replay is not None:
        indices = torch.where(replay >= 0, replay, indices)
    weights = scores.gather(-1, indices)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY_SUM)
    return indices, weights * scale


def _choose(scores: Tensor, bias: Tensor | None, rule: RouteRule) -> Tensor:
    choice = scores if bias is None else scores + bias
    if rule.num_groups > 1:
        by_group = choice.unflatten(-1, (rule.num_groups, -1))
        best_two = rule.group_score == "top2_sum"
        quality = by_group.topk(2, -1).values.sum(-1) if best_two else by_group.amax(-1)
        best = quality.topk(rule.topk_group, -1).indices
        allowed = torch.zeros_like(quality, dtype=torch.bool).scatter(-1, best, True)
        choice = by_group.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    return choice.topk(rule.top_k, -1).indices


class _Route(torch.autograd.Function):
    """The kernels: backward scores the logits again, so that forward keeps them and the choice alone."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, rule: RouteRule, replay: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        from policy.kernels import route_triton

        indices, weights = route_triton.route(logits, bias, rule, replay)
        ctx.save_for_backward(logits, indices)
        ctx.rule = rule
        ctx.mark_non_differentiable(indices)
        return indices, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from policy.kernels import route_triton

        logits, indices = ctx.saved_tensors
        return route_triton.route_backward(logits, indices, grads[1].contiguous(), ctx.rule), None, None, None


def _check(logits: Tensor, bias: Tensor | None, rule: RouteRule, replay: Tensor | None) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [T, E], not {logits.dtype} {list(logits.shape)}")
    num_tokens, num_experts = logits.shape
    if rule.num_groups < 1 or num_experts % rule.num_groups or not 1 <= rule.topk_group <= rule.num_groups:
        raise ValueError(
            f"{num_experts} experts do not make {rule.num_groups} groups of which {rule.topk_group} are chosen"
        )
    size = num_experts // rule.num_groups
    if not 1 <= rule.top_k <= size * rule.topk_group:
        raise ValueError(f"top_k={rule.top_k} of {size * rule.topk_group} experts in {rule.topk_group} groups")
    if rule.num_groups > 1 and rule.group_score == "top2_sum" and size < 2:
        raise ValueError("group_score='top2_sum' needs groups of two experts or more: use 'max'")
    if bias is not None and (bias.shape != (num_experts,) or bias.dtype != torch.float32):
        raise ValueError(f"bias must be float32 [{num_experts}], not {bias.dtype} {list(bias.shape)}")
    if replay is not None and (replay.shape != (num_tokens, rule.top_k) or replay.dtype != torch.int64):
        raise ValueError(f"replay must be int64 {[num_tokens, rule.top_k]}, not {replay.dtype} {list(replay.shape)}")
