"""The options of TRL 1.16.0's GRPOTrainer in groupzero's terms; docs/LOSSES.md has the same mapping as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from grpo.segments import sequence_sums

_TRL_AGGREGATION = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "dr_grpo": "constant",
    "luspo": "sequence_sum",
}
_TRL_SURROGATE = {"cispo": "cispo", "vespo": "cispo", "sapo": "sapo"}


def trl_options(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> LossOptions:
    """TRL's GRPOTrainer: no clamp of log-ratios, `delta` caps r, only the surrogate masked, all sequences count."""
    options = Options("TRL", config)
    kind = options.choose({name: name for name in _TRL_AGGREGATION}, "loss_type", default="dapo")
    levels = {"token": "token", "sequence": "sequence"}
    level = options.choose(levels, "importance_level", "importance_sampling_level", default="token")
    weights: dict[str, Any] = {"aggregation": _TRL_AGGREGATION[kind]}
    length = options.number("dr_grpo_length", "max_completion_length", default=None)
    if kind == "dr_grpo":
        weights["constant_length"] = len(inputs["completion_mask"][0]) if length is None else length
    low = options.number("clip_low", "epsilon", "epsilon_low", default=0.2)
    high = options.number("clip_high", "epsilon_high", default=None)
    upper = options.number("cispo_upper", "cispo_ratio_max", default=None)
    loss: dict[str, Any] = {
        "ratio_level": "none" if kind == "vespo" else level,
        "surrogate": _TRL_SURROGATE.get(kind, "clip"),
        "clip_low": low,
        "clip_high": low if high is None else high,
        "ratio_cap": options.number("ratio_cap", "delta", default=None),
        "cispo_ratio_max": first(math.inf if kind == "vespo" else None, upper, high, low),
        **sapo_temperatures(options),
        "kl_coef": options.number("kl_coef", "beta", default=0.0),
        "kl_estimator": options.choose({"k3": "k3", "k2": "k2", "k1": "k1", None: "k3"}, "kl_estimator", default=None),
        "kl_importance_weighted": bool(options.read("kl_importance_weighted", "use_bias_correction_kl", default=False)),
        "log_ratio_bounds": (-math.inf, math.inf),
        "kl_max_log_ratio": math.inf,
    }
    correction = _trl_correction(options, is_vespo=kind == "vespo")
    gamma = _vespo_options(options)
    advantage = advantage_options(options, eps=1e-4)
    _neutral(options, {"top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False})
    options.finish()
    if kind == "vespo" and loss["kl_importance_weighted"]:
        return LossOptions(advantage=advantage, parts=_split_kl(weights, loss, correction, gamma, level))
    part = Part(weights=weights, loss=loss, correction=correction, factor=gamma if kind == "vespo" else None)
    return LossOptions(advantage=advantage, parts=(part,))


def _split_kl(
    weights: dict[str, Any], loss: dict[str, Any], correction: dict[str, Any], factor: Any, level: str
) -> tuple[Part, Part]:
    """VESPO has no ratio in its surrogate but one in its weighted KL."""
    return (
        Part(weights=weights, loss={**loss, "kl_coef": 0.0}, correction=correction, factor=factor),
        Part(weights=weights, loss={**loss, "ratio_level": level}, change=without_surrogate),
    )


def _trl_correction(options: Options, *, is_vespo: bool) -> dict[str, Any]:
    """TRL's off-policy mask, and its importance sampling against vLLM if the case says that it is on."""
    correction: dict[str, Any] = {"off_policy_threshold": options.number("off_policy_mask_threshold", default=None)}
    modes = {f"{level}_{rule}": (level, rule) for level in ("token", "sequence") for rule in ("truncate", "mask")}
    named = "vllm_importance_sampling_mode" in options.rest
    is_on = options.read("vllm_importance_sampling_correction", "use_vllm", default=named)
    level, rule = options.choose(modes, "vllm_importance_sampling_mode", default="sequence_mask")
    names = ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap")
    largest = options.number(*names, default=3.0)
    smallest = options.number("vllm_importance_sampling_clip_min", default=None)
    if not is_on:
        return correction
    if is_vespo:
        raise UnsupportedPeerOptionError("TRL option vllm_importance_sampling_mode with loss_type 'vespo'")
    if rule == "truncate" and smallest is not None:
        raise UnsupportedPeerOptionError(
            f"TRL option vllm_importance_sampling_clip_min = {smallest} with {level}_truncate has no counterpart here"
        )
    largest = math.inf if largest is None else largest
    if rule == "truncate":
        return {**correction, "truncate": level, "truncate_max": largest}
    # What TRL's mask keeps, it weights too.
    bounds = {"mask_min": 0.0 if smallest is None else smallest, "mask_max": largest}
    return {**correction, "truncate": level, "truncate_max": math.inf, "mask": level, **bounds}


def _vespo_options(options: Options) -> Callable[[PeerTensors], Tensor]:
    """VESPO's factor phi(w) = e^l w^k e^(-l w) of the sequence's whole ratio w, without gradient."""
    k = [options.number(f"vespo_k_{sign}", default=default) for sign, default in (("pos", 2.0), ("neg", 3.0))]
    rate = [options.number(f"vespo_lambda_{sign}", default=default) for sign, default in (("pos", 3.0), ("neg", 2.0))]

    def factor(tensors: PeerTensors) -> Tensor:
        steps = (tensors.logprobs.detach() - tensors.old_logprobs).clamp(-20.0, 20.0)
        log_w = sequence_sums(steps, *tensors.where).clamp(math.log(1e-8), 20.0)[tensors.sequence_ids]
        is_good = tensors.advantages >= 0
        power = torch.where(is_good, *log_w.new_tensor(k).unbind())
        slope = torch.where(is_good, *log_w.new_tensor(rate).unbind()).clamp(min=1e-4)
        return (slope + power * log_w - slope * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)

    return factor


def _neutral(options: Options, values: Mapping[str, Any]) -> None:
    """Options that need what a case does not record: taken at the value that switches them off, refused otherwise."""
    for name, off in values.items():
        if (value := options.read(name, default=off)) not in (off, None):
            raise UnsupportedPeerOptionError(
                f"{options.peer} option {name} = {value!r} cannot be computed from a case: only {off!r} can"
            )
