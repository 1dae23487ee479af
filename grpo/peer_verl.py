"""The options of verl 0.9.1's core_algos in groupzero's terms; docs/LOSSES.md has the same mapping as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo.peer_options import (
    LossOptions,
    Options,
    Part,
    PeerTensors,
    UnsupportedPeerOptionError,
    advantage_options,
    first,
    sapo_temperatures,
    without_surrogate,
)

_VERL_AGGREGATION = {
    "token-mean": "token_mean",
    "token-sum": "sequence_sum",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "constant",
}
_VERL_KL = {"k1": "k1", "kl": "k1", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3", "abs": "abs"}
_VERL_LOSSES = ("vanilla", "gspo", "sapo", "cispo", "gpg", "dppo_tv", "dppo_kl", "geo_mean")


def verl_options(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> LossOptions:
    """verl's core_algos: log-ratios within +-20 nats, k3 within +-10, sequences without completion tokens not counted.

    Its GSPO gives each token the sequence's ratio with the gradient of the token alone; with weights that are equal
    within a sequence, as all of these are, that is the gradient of the sequence's ratio.
    """
    options = Options("verl", config)
    kind = options.choose({name: name for name in _VERL_LOSSES}, "policy_loss", "loss_mode", default="vanilla")
    aggregation = options.choose(
        {name: name for name in _VERL_AGGREGATION}, "aggregation", "loss_agg_mode", default="token-mean"
    )
    scale = options.number("loss_scale_factor", default=None)
    clip = options.number("clip_ratio", default=0.2)
    low = first(options.number("clip_low", "clip_ratio_low", default=None), clip)
    high = first(options.number("clip_high", "clip_ratio_high", default=None), clip)
    dual = options.number("dual_clip", "clip_ratio_c", default=3.0)
    loss: dict[str, Any] = {"clip_low": low, "clip_high": high, **sapo_temperatures(options)}
    kl = _verl_kl(options)
    advantage = advantage_options(options, eps=1e-6)
    options.finish()

    weights = _verl_weights(aggregation, inputs, scale)
    surrogate = _verl_surrogate(kind, loss, dual, low, high)
    if kind == "sapo":  # whatever the option says
        surrogate = replace(surrogate, **_verl_weights("seq-mean-token-mean", inputs, None))
    elif kind != "geo_mean":
        surrogate = replace(surrogate, **weights)
    parts = (surrogate, Part(**weights, loss=kl, change=without_surrogate)) if kl["kl_coef"] else (surrogate,)
    return LossOptions(advantage=advantage, parts=parts, lone_reward=advantage["baseline"] == "group_mean")


def _verl_surrogate(kind: str, loss: dict[str, Any], dual: float | None, low: float, high: float) -> Part:
    nowhere: dict[str, Any] = {}  # its weights are filled in by the caller
    if kind == "gspo":
        return Part(weights=nowhere, loss={**loss, "ratio_level": "sequence", "log_ratio_bounds": (-math.inf, 10.0)})
    if kind == "sapo":
        return Part(weights=nowhere, loss={**loss, "surrogate": "sapo"})
    if kind == "cispo":
        bounds = {"cispo_ratio_min": 1.0 - low, "cispo_ratio_max": 1.0 + high}
        return Part(weights=nowhere, loss={"surrogate": "cispo", **bounds})
    if kind == "gpg":
        return Part(weights=nowhere, loss={"surrogate": "cispo", "ratio_level": "none"})
    if kind in ("dppo_tv", "dppo_kl"):
        held = {"surrogate": "cispo", "cispo_ratio_max": math.inf if dual is None else dual}
        return Part(weights=nowhere, loss=held, factor=_dppo_factor(kind, low, high))
    if kind == "geo_mean":
        unclipped = {"ratio_level": "sequence", "clip_low": math.inf, "clip_high": math.inf}
        unclipped["log_ratio_bounds"] = (-math.inf, math.inf)
        return Part(weights={"aggregation": "sequence_mean"}, loss=unclipped, change=_gmpo_change(low, high))
    return Part(weights=nowhere, loss={**loss, "dual_clip": dual})


def _verl_kl(options: Options) -> dict[str, Any]:
    name = options.read("kl_estimator", "kl_loss_type", default=None)
    coef = options.number("kl_coef", "kl_loss_coef", default=0.0)
    if name is None:
        return {"kl_coef": 0.0}
    base = name.removesuffix("+") if isinstance(name, str) else name
    if base not in _VERL_KL:
        known = ", ".join(_VERL_KL)
        raise UnsupportedPeerOptionError(
            f"verl option kl_estimator = {name!r} has no counterpart here: known are {known}, each also with +"
        )
    estimator = _VERL_KL[base]
    bound = 10.0 if estimator == "k3" else None
    return {"kl_coef": coef, "kl_estimator": estimator, "kl_bound": bound, "kl_k2_gradient": name != base}


def _verl_weights(aggregation: str, inputs: Mapping[str, Any], scale: float | None) -> dict[str, Any]:
    """Keywords of `Part`. verl leaves empty sequences out of N, and divides a sequence's sum by |o| + 1e-8."""
    mask = inputs["completion_mask"]
    weights: dict[str, Any] = {"aggregation": _VERL_AGGREGATION[aggregation]}
    weights["total_sequences"] = sum(sum(row) > 0 for row in mask)
    if aggregation == "token-sum":
        weights["total_sequences"] = 1
    if aggregation == "seq-mean-token-sum-norm":
        weights["constant_length"] = len(mask[0]) if scale is None else scale
    is_mean = aggregation == "seq-mean-token-mean"
    return {"weights": weights, "rescale": _long_by_a_little if is_mean else None}


def _long_by_a_little(tensors: PeerTensors) -> Tensor:
    """n / (n + 1e-8) of every token's sequence."""
    lengths = tensors.lengths
    return (lengths / (lengths + 1e-8))[tensors.sequence_ids]


def _dppo_factor(kind: str, low: float, high: float) -> Callable[[PeerTensors], Tensor]:
    """DPPO's trust region (arXiv 2602.04879): 1 where a token's probability has not moved too far its advantage's way."""

    def factor(tensors: PeerTensors) -> Tensor:
        logprobs, old = tensors.logprobs.detach(), tensors.old_logprobs
        p, q = logprobs.exp(), old.exp()
        if kind == "dppo_tv":
            up, down = p - q <= high, p - q >= -low
        else:
            kl = q * (old - logprobs) + (1.0 - q) * ((1.0 - q + 1e-8) / (1.0 - p + 1e-8)).log()
            up, down = (kl <= high) | (p <= q), (kl <= low) | (p >= q)
        return torch.where(tensors.advantages > 0, up, down).to(p.dtype)

    return factor


def _gmpo_change(low: float, high: float) -> Callable[[PeerTensors], PeerTensors]:
    """GMPO (arXiv 2507.20673): log-ratios clipped per token on their advantage's side, before the geometric mean."""

    def change(tensors: PeerTensors) -> PeerTensors:
        log_ratio = tensors.logprobs - tensors.old_logprobs
        clipped = log_ratio.clamp(-low, high)
        sign = tensors.advantages.sign()
        shrink = _long_by_a_little(tensors)
        step = sign * torch.minimum(sign * log_ratio, sign * clipped) * shrink
        return replace(tensors, logprobs=tensors.old_logprobs + step, advantages=tensors.advantages * shrink)

    return change
