"""Triton kernels of route.py: a few tokens per program, all experts of a token in one row of registers.

Choices are made among whole numbers that order as the scores do, NaN last, so that no comparison depends on rounding and
nothing is chosen twice: what was chosen becomes the smallest of all numbers. Groups are padded to a power of two.
"""
# Kernels are Python in syntax only, which the type checker can't know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.compile_cases import CompileCase
from policy.kernels.route import TINY_SUM, RouteRule

# Scores per program, from which its number of tokens follows, the most of those, and warps.
TILE, MOST_TOKENS, NUM_WARPS = 2048, 64, 4
SMALLEST = tl.constexpr(-(2**31))
MINUS_INFINITY = tl.constexpr(-(2**31) + 0x7FFFFF)  # its place in the order


@triton.jit
def order_of(value):
    """float32 as whole numbers in the same order; NaN above all, -0 as 0; never SMALLEST."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value != value, 0x7FFFFFFF, key)


@triton.jit
def scores_of(logits, place, inside, SIGMOID: tl.constexpr):
    """Scores at `place` [tokens, experts]; 0 outside."""
    if SIGMOID:
        logit = tl.load(logits + place, mask=inside, other=0.0)
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        logit = tl.load(logits + place, mask=inside, other=float("-inf"))
        power = tl.exp(logit - tl.max(logit, 1)[:, None])
        score = power / tl.sum(power, 1)[:, None]
    return tl.where(inside, score, 0.0)


@triton.jit
def keep_best_groups(choice, key, SIZE: tl.constexpr, GROUPS: tl.constexpr, NUM_GROUPS: tl.constexpr,
                     TOPK_GROUP: tl.constexpr, TOP2: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """The keys of `choice` [tokens, GROUPS * SIZE] with those of all but the best groups as those of -inf."""
    grouped = tl.reshape(key, (BLOCK_T, GROUPS, SIZE))
    values = tl.reshape(choice, (BLOCK_T, GROUPS, SIZE))
    member = tl.arange(0, SIZE)[None, None, :]
    best = tl.argmax(grouped, 2)[:, :, None]
    quality = tl.sum(tl.where(member == best, values, 0.0), 2)
    if TOP2:
        second = tl.argmax(tl.where(member == best, SMALLEST, grouped), 2)[:, :, None]
        quality += tl.sum(tl.where(member == second, values, 0.0), 2)
    group = tl.arange(0, GROUPS)[None, :]
    left = tl.where(group < NUM_GROUPS, order_of(quality), SMALLEST)
    kept = tl.zeros((BLOCK_T, GROUPS), tl.int32)
    for _ in tl.static_range(TOPK_GROUP):
        hit = group == tl.argmax(left, 1)[:, None]
        kept = tl.where(hit, 1, kept)
        left = tl.where(hit, SMALLEST, left)
    barred = tl.minimum(grouped, MINUS_INFINITY)
    return tl.reshape(tl.where(kept[:, :, None] == 1, grouped, barred), (BLOCK_T, GROUPS * SIZE))


@triton.jit
def route_kernel(
    logits, bias, replay, indices, weights, num_tokens, scale, tiny_sum,
    NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, CHOICES: tl.constexpr, BLOCK_T: tl.constexpr,
    SIGMOID: tl.constexpr, BIASED: tl.constexpr, REPLAYED: tl.constexpr, TOP2: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """SIZE, GROUPS and CHOICES: experts per group, groups and k, each rounded up to a power of two."""
    MEMBERS: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = (token < num_tokens)[:, None]
    lane = tl.arange(0, GROUPS * SIZE)
    if MEMBERS == SIZE:
        expert = lane
        real = lane < NUM_EXPERTS
    else:
        expert = lane // SIZE * MEMBERS + lane % SIZE
        real = (lane % SIZE < MEMBERS) & (lane // SIZE < NUM_GROUPS)
    place = token.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
    score = scores_of(logits, place, live & real[None, :], SIGMOID)
    choice = score
    if BIASED:
        choice += tl.load(bias + expert, mask=real, other=0.0)[None, :]
    left = tl.where(real[None, :], order_of(choice), SMALLEST)
    if NUM_GROUPS > 1:
        left = keep_best_groups(choice, left, SIZE, GROUPS, NUM_GROUPS, TOPK_GROUP, TOP2, BLOCK_T)

    slot = tl.arange(0, CHOICES)[None, :]
    chosen = tl.zeros((BLOCK_T, CHOICES), tl.int32)
    weight = tl.zeros((BLOCK_T, CHOICES), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(left, 1)
        hit = lane[None, :] == best[:, None]
        left = tl.where(hit, SMALLEST, left)
        own = tl.sum(tl.where(hit, expert[None, :], 0), 1)
        if REPLAYED:
            given = tl.load(replay + token.to(tl.int64) * TOP_K + k, mask=token < num_tokens, other=-1).to(tl.int32)
            own = tl.where(given >= 0, given, own)
        hit = (expert[None, :] == own[:, None]) & real[None, :]
        chosen = tl.where(slot == k, own[:, None], chosen)
        weight = tl.where(slot == k, tl.sum(tl.where(hit, score, 0.0), 1)[:, None], weight)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 1)[:, None] + tiny_sum)
    target = token.to(tl.int64)[:, None] * TOP_K + slot
    mask = live & (slot < TOP_K)
    tl.store(indices + target, chosen.to(tl.int64), mask=mask)
    tl.store(weights + target, weight * scale, mask=mask)


@triton.jit
def route_backward_kernel(
    logits, indices, grad, out, num_tokens, scale, tiny_sum,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
    BLOCK_T: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """out [T, E], zero for sigmoid scores that were not chosen."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = (token < num_tokens)[:, None] & (expert < NUM_EXPERTS)
    place = token.to(tl.int64)[:, None] * NUM_EXPERTS + expert
    score = scores_of(logits, place, inside, SIGMOID)

    slot = tl.arange(0, CHOICES)[None, :]
    mask = (token < num_tokens)[:, None] & (slot < TOP_K)
    choice = token.to(tl.int64)[:, None] * TOP_K + slot
    chosen = tl.load(indices + choice, mask=mask, other=-1).to(tl.int32)
    slope = tl.load(grad + choice, mask=mask, other=0.0) * scale
    if NORMALISE:
        own = tl.zeros((BLOCK_T, CHOICES), tl.float32)
        for k in tl.static_range(TOP_K):
            which = tl.sum(tl.where(slot == k, chosen, 0), 1)[:, None]
            value = tl.sum(tl.where(expert == which, score, 0.0), 1)[:, None]
            own = tl.where(slot == k, value, own)
        total = tl.sum(own, 1)[:, None] + tiny_sum
        slope = (slope - tl.sum(slope * own, 1)[:, None] / total) / total

    along = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
    for k in tl.static_range(TOP_K):
        which = tl.sum(tl.where(slot == k, chosen, 0), 1)[:, None]
        along += tl.where(expert == which, tl.sum(tl.where(slot == k, slope, 0.0), 1)[:, None], 0.0)
    if SIGMOID:
        result = along * (score * (1.0 - score))
    else:
        result = score * (along - tl.sum(along * score, 1)[:, None])
    tl.store(out + place, result, mask=inside)


def _tokens(width: int) -> int:
    """Tokens per program where a row of scores takes `width` lanes."""
    return min(max(TILE // width, 1), MOST_TOKENS)


def _shape(num_experts: int, rule: RouteRule) -> dict[str, int | bool]:
    size = triton.next_power_of_2(num_experts // rule.num_groups)
    groups = triton.next_power_of_2(rule.num_groups)
    return {
        "NUM_EXPERTS": num_experts,
        "NUM_GROUPS": rule.num_groups,
        "TOPK_GROUP": rule.topk_group,
        "TOP_K": rule.top_k,
        "SIZE": size,
        "GROUPS": groups,
        "CHOICES": triton.next_power_of_2(rule.top_k),
        "BLOCK_T": _tokens(size * groups),
        "SIGMOID": rule.scoring == "sigmoid",
        "TOP2": rule.group_score == "top2_sum",
        "NORMALISE": rule.normalise,
    }


def _backward_shape(num_experts: int, rule: RouteRule) -> dict[str, int | bool]:
    experts = triton.next_power_of_2(num_experts)
    kept = ("NUM_EXPERTS", "TOP_K", "CHOICES", "SIGMOID", "NORMALISE")
    shape = _shape(num_experts, rule)
    return {"EXPERTS": experts, "BLOCK_T": _tokens(experts)} | {name: shape[name] for name in kept}


def route(logits: Tensor, bias: Tensor | None, rule: RouteRule, replay: Tensor | None) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    indices = torch.empty(num_tokens, rule.top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, rule.top_k, device=logits.device)
    shape = _shape(num_experts, rule)
    if num_tokens:
        with torch.cuda.device_of(logits):
            route_kernel[(triton.cdiv(num_tokens, shape["BLOCK_T"]),)](
                logits, logits if bias is None else bias, indices if replay is None else replay.contiguous(),
                indices, weights, num_tokens, rule.scale, TINY_SUM,
                BIASED=bias is not None, REPLAYED=replay is not None, **shape, num_warps=NUM_WARPS,
            )  # fmt: skip
    return indices, weights


def route_backward(logits: Tensor, indices: Tensor, grad: Tensor, rule: RouteRule) -> Tensor:
    """The gradient of logits [T, E] from that of the weights [T, k]."""
    num_tokens, num_experts = logits.shape
    out = torch.empty_like(logits)
    shape = _backward_shape(num_experts, rule)
    if num_tokens:
        with torch.cuda.device_of(logits):
            route_backward_kernel[(triton.cdiv(num_tokens, shape["BLOCK_T"]),)](
                logits, indices, grad, out, num_tokens, rule.scale, TINY_SUM, **shape, num_warps=NUM_WARPS
            )
    return out


def _cases(name: str, num_experts: int, rule: RouteRule, biased: bool) -> list[CompileCase]:
    pointers = {"logits": "*fp32", "indices": "*i64"}
    sizes = {"num_tokens": "i32", "scale": "fp32", "tiny_sum": "fp32"}
    forward = {**pointers, "bias": "*fp32", "replay": "*i64", "weights": "*fp32", **sizes}
    constants = _shape(num_experts, rule) | {"BIASED": biased, "REPLAYED": False}
    backward = {**pointers, "grad": "*fp32", "out": "*fp32", **sizes}
    return [
        CompileCase(f"route/{name}", route_kernel, forward, constants, NUM_WARPS),
        CompileCase(
            f"route/{name}_backward", route_backward_kernel, backward, _backward_shape(num_experts, rule), NUM_WARPS
        ),
    ]


COMPILE_CASES = [
    *_cases("v3", 256, RouteRule(8, 4, 8, "sigmoid", True, 2.5, "top2_sum"), biased=True),
    *_cases("v2", 160, RouteRule(8, 3, 6, "softmax", False, 16.0, "max"), biased=False),
    *_cases("v2_lite", 64, RouteRule(1, 1, 6, "softmax", False, 1.0, "max"), biased=False),
]
